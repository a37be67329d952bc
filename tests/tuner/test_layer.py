"""One wrapped module of every kind: patched forward == merged forward == the module with patched parameters."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from grafts import MLP, assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_vit
from peft_graft import GraftConfig
from peft_graft.tuner import GraftLayer, GraftLinear, ParameterHooks


class Holder(nn.Module):
    """A model with one unit in it, which gets all arguments."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        result = self.unit(*args, **kwargs)
        return result[0] if isinstance(result, tuple) else result


class Experts(nn.Module):
    """A leaf whose parameters have three dimensions and no module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 4, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eio,eoj->bj", x, self.up, self.down)


class Tokens(nn.Module):
    """A parent with bare parameters of its own, beside a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.gate = nn.Parameter(torch.randn(()))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate * self.inner(x + self.token)


class Reader(nn.Module):
    """Reads the weight of a submodule without calling it, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.kernel.weight.t() + self.kernel.bias


def attention(**options: object) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(4, 2, batch_first=True, **options)


UNITS = {
    "linear": (nn.Linear(4, 3), (2, 4)),
    "conv1d": (nn.Conv1d(4, 3, 2), (2, 4, 5)),
    "conv1D of transformers": (Conv1D(3, 4), (2, 4)),
    "conv2d": (nn.Conv2d(3, 4, 3, groups=1), (2, 3, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "layer norm": (nn.LayerNorm(4), (2, 4)),
    "group norm": (nn.GroupNorm(2, 4), (2, 4, 3)),
    "batch norm": (nn.BatchNorm1d(4), (5, 4)),
    "rms norm": (LlamaRMSNorm(4), (2, 4)),
    "prelu": (nn.PReLU(4), (2, 4)),
    "bilinear": (nn.Bilinear(4, 4, 2), (2, 4)),
    "experts": (Experts(), (2, 4)),
    "tokens": (Tokens(), (2, 4)),
    "reader": (Reader(), (2, 4)),
    "transformer layer": (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (2, 3, 4)),
}


@pytest.mark.feature("every kind of module that owns parameters")
@pytest.mark.parametrize("alpha", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(UNITS))
def test_every_module_that_owns_parameters_can_be_grafted(name: str, alpha: float) -> None:
    unit, shape = UNITS[name]
    base = Holder(copy.deepcopy(unit)).eval()
    donor = perturbed(base, scale=0.5)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    args = (x, x) if name == "bilinear" else (x,)
    model = graft(base, donor, density=0.5, target_modules="all", alpha=alpha).eval()
    chosen = held(model)
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        for key, index in chosen.items():
            flat, new = wanted.get_parameter(key).view(-1), donor.get_parameter(key).view(-1)[index]
            flat[index] = new if alpha == 1 else flat[index] + alpha * (new - flat[index])
        expected = wanted(*args)
        assert same_bits(model(*args), expected)
        assert not torch.equal(expected, base(*args))
        merged = copy.deepcopy(model).merge_and_unload()
        assert_same(parameters(merged), parameters(wanted))
        with model.disable_adapter():
            assert same_bits(model(*args), base(*args))
    torch.testing.assert_close(model(*args).detach(), expected)  # with gradients wanted, layers run another way
    assert_same(parameters(model.unload()), parameters(base))


@pytest.mark.feature("every kind of module that owns parameters")
def test_a_patched_embedding_looks_up_the_donors_rows() -> None:
    base = Holder(nn.Embedding(5, 3, padding_idx=0))
    donor = perturbed(base)
    model = graft(base, donor, density=1.0, target_modules="all")
    assert same_bits(model(torch.arange(5)), donor(torch.arange(5)))


# Attention as a unit

MHA = pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"kdim": 3, "vdim": 3}, {"add_bias_kv": True}], ids=["", "no bias", "kdim", "kv"]
)


@pytest.mark.feature("every kind of module that owns parameters")
@MHA
@pytest.mark.parametrize("grad", [False, True], ids=["fast path", "slow path"])
def test_attention_is_one_unit(options: dict[str, object], grad: bool) -> None:
    base = Holder(attention(**options)).eval()
    donor = perturbed(base, scale=0.5).requires_grad_(False)  # torch multiplies in another order where it is True
    model = graft(base, donor, density=1.0).eval()
    assert isinstance(model.base_model.model.unit, GraftLayer)
    assert set(held(model)) == {name for name, _ in donor.named_parameters()}
    x = torch.randn(2, 3, 4)
    y = torch.randn(2, 3, options.get("kdim", 4))
    with torch.set_grad_enabled(grad):
        for need_weights in (False, True):
            ours, theirs = (m(x, y, y, need_weights=need_weights) for m in (model, donor))
            assert torch.equal(ours, theirs)


@pytest.mark.feature("every kind of module that owns parameters")
def test_the_fast_path_of_a_transformer_layer_sees_the_whole_patch() -> None:
    """In evaluation without gradients, it reads `self_attn.out_proj.weight` and the like without calling them."""
    base = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    donor = perturbed(base, scale=0.5)
    model = graft(base, donor, density=1.0).eval()
    x = torch.randn(2, 3, 4)
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        assert torch.equal(model(x), donor(x))
        with pytest.warns(UserWarning, match="nested tensors"):
            ours, theirs = (m(x, src_key_padding_mask=mask) for m in (model, donor))
        assert torch.equal(ours, theirs)
        assert not torch.allclose(theirs, base(x), atol=0.1)


def test_naming_a_part_of_a_unit_beside_the_unit_changes_nothing() -> None:
    base = nn.Sequential(Holder(attention()))
    model = graft(base, "zeros", density=0.5, target_modules=["unit", "out_proj"])
    assert [type(module) for module in model.modules() if isinstance(module, GraftLayer)] == [GraftLayer]
    assert held(model) == held(graft(base, "zeros", density=0.5, target_modules=["unit"]))


def test_reading_inside_a_unit_shows_the_patch_and_writing_reaches_the_base() -> None:
    base = Holder(attention())
    model = graft(base, perturbed(base), density=1.0)
    unit = model.base_model.model.unit
    donor = perturbed(base).unit
    assert torch.equal(unit.out_proj.weight, donor.out_proj.weight)
    assert torch.equal(unit.in_proj_weight, donor.in_proj_weight)
    assert unit.out_proj.in_features == 4 and unit.num_heads == 2
    with model.disable_adapter():
        assert torch.equal(unit.out_proj.weight, base.unit.out_proj.weight)
    fresh = nn.Parameter(torch.zeros(4, 4))
    unit.out_proj.weight = fresh
    assert unit.get_base_layer().out_proj.weight is fresh


# The wrapper itself


@pytest.mark.feature("repr")
def test_a_wrapper_reads_and_writes_like_the_module_in_it() -> None:
    base = MLP()
    donor = perturbed(base)
    model = graft(base, donor, density=1.0)
    layer = model.base_model.model.first
    assert isinstance(layer, GraftLinear) and repr(layer).startswith("graft.GraftLinear(")
    assert layer.in_features == 4
    assert torch.equal(layer.weight, donor.first.weight) and torch.equal(layer.bias, donor.first.bias)
    fresh = nn.Parameter(torch.ones(6, 4))
    layer.weight = fresh
    assert layer.get_base_layer().weight is fresh
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    assert nn.Linear(4, 3, bias=False).bias is graft(nn.Sequential(nn.Linear(4, 3, bias=False)), "zeros",
        density=0.5).base_model.model[0].bias  # fmt: skip


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("linear", (4, 3)),
        ("conv2d", (3, 4)),
        ("conv1D of transformers", (4, 3)),
        ("layer norm", (None, None)),
        ("experts", (None, None)),
    ],
)
def test_a_layer_tells_its_widths_as_those_of_peft_do(name: str, widths: tuple[int | None, int | None]) -> None:
    model = graft(Holder(UNITS[name][0]), "zeros", density=1.0)
    layer = model.base_model.model.unit
    assert (layer.in_features, layer.out_features) == widths


def test_an_embedding_and_attention_tell_their_widths() -> None:
    model = graft(nn.Sequential(nn.Embedding(7, 3), attention()), "zeros", density=1.0, target_modules="all")
    emb, unit = model.base_model.model
    assert (emb.in_features, emb.out_features) == (7, 3)
    assert (unit.in_features, unit.out_features) == (4, 4)


@pytest.mark.feature("repr")
def test_the_repr_says_how_many_entries_there_are() -> None:
    base = Holder(nn.Linear(4, 3))
    assert "(default): Slot(bias: 3, weight: 12)" in repr(graft(base, perturbed(base), density=1.0))


def test_nothing_of_size_zero_is_registered() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), num_params=3, selection="learned", candidate_ratio=1)
    names = [name for name in model.state_dict() if "graft_patch" in name]
    assert len(names) <= 9
    assert all(value.numel() for value in model.state_dict().values())


def test_an_error_in_the_forward_leaves_no_patch_behind() -> None:
    base = Holder(Tokens())
    model = graft(base, perturbed(base), density=1.0, target_modules="all")
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="must match the size"):
        model(torch.zeros(2, 7))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    x = torch.randn(2, 4)
    assert torch.equal(model(x), perturbed(base)(x))


@pytest.mark.feature("deepcopy, pickle")
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("selection", ["magnitude", "learned"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_vit], ids=["bert", "vit"])
def test_a_copy_is_a_graft_of_its_own(make: object, selection: str, how: object) -> None:
    base, batch = make(), inputs(make())
    model = graft(base, perturbed(base), density=0.1, target_modules="all", selection=selection)
    model.peft_config["default"].donor = "gone"  # a donor in memory would be copied too
    patched = output(model, batch)
    clone = how(model)
    assert same_bits(output(clone, batch), patched)
    for layer in [*model.base_model._layers()]:
        layer.clear("default")
    assert same_bits(output(model, batch), output(base, batch))
    assert same_bits(output(clone, batch), patched)
    clone.merge_adapter()
    assert same_bits(output(clone, batch), patched)
    clone.unmerge_adapter()
    assert same_bits(output(clone.unload(), batch), output(base, batch))


@pytest.mark.feature("gradient checkpointing, reentrant or not")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny_bert, tiny_vit], ids=["bert", "vit"])
def test_gradient_checkpointing_changes_nothing(make: object, reentrant: bool) -> None:
    base, batch = make(), inputs(make())
    gradients = []
    for checkpointing in (False, True):
        model = graft(base, perturbed(base), density=0.1, selection="learned", target_modules="all")
        if checkpointing:
            kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
            enable = getattr(model, f"{kind}_checkpointing_enable")  # transformers renamed it in 5
            enable(**{f"{kind}_checkpointing_kwargs": {"use_reentrant": reentrant}})
            if reentrant and make is tiny_bert:
                model.enable_input_require_grads()
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    missing = {name for name in plain if plain[name] is not None and checkpointed[name] is None}
    assert not missing
    for name, gradient in plain.items():
        assert (gradient is None) == (checkpointed[name] is None)
        assert gradient is None or torch.allclose(gradient, checkpointed[name])


@pytest.mark.feature("half, bfloat16, to(dtype) of a grafted model")
def test_merging_survives_a_change_of_dtype() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    plain = parameters(model.unload())
    assert_same(plain, {name: value.to(torch.bfloat16) for name, value in parameters(base).items()})


@pytest.mark.feature("merge_adapter, unmerge_adapter, safe_merge")
def test_safe_merge_refuses_what_is_not_finite() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, alpha=1e38 * 1e2)
    with pytest.raises(ValueError, match=r"merged values must be finite, got NaN or Inf in \['first.weight'"):
        model.merge_adapter(safe_merge=True)
    assert_same(parameters(model.unload()), parameters(base))


def test_merging_while_switched_off_has_no_effect_on_the_output() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5)
    x = torch.randn(2, 4)
    patched = output(model, x)
    with model.disable_adapter():
        model.merge_adapter()
        assert same_bits(output(model, x), output(base, x))
    assert same_bits(output(model, x), patched)


@pytest.mark.feature("merge_adapter, unmerge_adapter, safe_merge")
def test_merging_twice_warns_and_keeps_one_backup() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert_same(parameters(model.unload()), parameters(base))


# Refusals


@pytest.mark.feature("recurrent and parametrized modules", "no: their weights are flattened or computed")
@pytest.mark.parametrize(
    ("unit", "reason"),
    [
        (nn.LSTM(4, 4), "recurrent modules read flattened weights"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "its parameters are computed by a parametrization"),
        (nn.Sequential(nn.Linear(4, 4)), "it owns no parameters"),
    ],
    ids=["lstm", "parametrized", "container"],
)
def test_a_module_that_cannot_carry_a_patch_is_refused_by_name(unit: nn.Module, reason: str) -> None:
    base = nn.Sequential(nn.Linear(4, 4), Holder(unit))
    names = list(base.state_dict())
    with pytest.raises(ValueError, match=rf"got '1.unit' \({type(unit).__name__}\): {reason}"):
        get_peft_model(base, GraftConfig(donor="zeros", density=0.5, target_modules=["0", "1.unit"]))
    assert list(base.state_dict()) == names


@pytest.mark.parametrize("unit", [nn.LSTM(4, 4), parametrizations.weight_norm(nn.Linear(4, 4))], ids=["lstm", "norm"])
def test_the_default_leaves_such_modules_out_and_says_so(unit: nn.Module) -> None:
    base = nn.Sequential(nn.Linear(4, 4), Holder(unit))
    with pytest.warns(UserWarning, match=r"Not grafted, because they cannot carry a patch: \['1.unit'\]"):
        model = graft(base, "zeros", density=0.5)
    assert list(model.base_model.targets("default")) == ["0.bias", "0.weight"]


@pytest.mark.feature("integer weights", "no: a patch holds floats")
def test_integer_weights_are_refused() -> None:
    quantized = nn.Linear(4, 4)
    quantized.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"\['weight'\] hold no floating-point values"):
        graft(nn.Sequential(quantized, nn.Linear(4, 4)), "zeros", density=0.5, target_modules=["0"])


def test_parameter_hooks_are_not_called() -> None:
    base = Holder(Tokens())
    hooks = [
        m for m in graft(base, "zeros", density=0.5, target_modules="all").modules() if isinstance(m, ParameterHooks)
    ]
    with pytest.raises(RuntimeError, match="Call the module that contains it"):
        hooks[0](torch.zeros(4))
