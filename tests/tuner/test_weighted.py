"""Grafts made of grafts: against dense arithmetic, and as good as any other adapter afterwards."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from grafts import DTYPES, MLP, assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from peft_graft import GraftConfig, PatchError
from peft_graft.patch.combinations import COMBINATIONS

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def donors(base: nn.Module, count: int = 3) -> list[nn.Module]:
    return [perturbed(base, scale=0.3, seed=20 + i) for i in range(count)]


def several(base: nn.Module, alphas: tuple[object, ...] = (1.0, 1.0, 1.0), **options: object) -> PeftModel:
    """Grafts "x", "y", "z" of different donors, the first one active."""
    options = {"density": 0.5, "target_modules": "all", **options}
    model = None
    for name, donor, alpha in zip("xyz", donors(base, len(alphas)), alphas, strict=False):
        if model is None:
            model = graft(base, donor, adapter_name=name, alpha=alpha, **options)
        else:
            model.add_adapter(name, GraftConfig(donor=donor, alpha=alpha, **options))
    return model


def merged(model: PeftModel, *names: str) -> dict[str, torch.Tensor]:
    """The model's parameters with these adapters in them."""
    model.base_model.set_adapter(list(names))
    return parameters(copy.deepcopy(model).merge_and_unload())


# Against dense arithmetic


def dense(base: nn.Module, model: PeftModel, weights: dict[str, float], kind: str) -> dict[str, torch.Tensor]:
    """What the combined model must be, tensor by tensor, in float64."""
    found = {}
    for name, start in base.named_parameters():
        start = start.detach().double().flatten()
        deltas, masks = [], []
        for (adapter, weight), donor in zip(weights.items(), donors(base), strict=False):
            mask = torch.zeros_like(start, dtype=torch.bool)
            mask[held(model, adapter).get(name, [])] = True
            alpha = model.peft_config[adapter].alpha
            delta = donor.get_parameter(name).detach().double().flatten() - start
            deltas.append(torch.where(mask, weight * alpha * delta, 0.0))
            masks.append(mask)
        delta, mask = torch.stack(deltas), torch.stack(masks)
        if kind == "disjoint":
            mask = mask & (mask.sum(0) == 1)
        if kind == "ties":
            mask = mask & (delta.sign() == delta.sum(0).sign())
        moved = torch.where(mask, delta, 0.0).sum(0)
        if kind in ("mean", "ties"):
            moved = moved / mask.sum(0).clamp(min=1)
        found[name] = (start + moved).view(base.get_parameter(name).shape)
    return found


@pytest.mark.feature("add_weighted_adapter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
def test_the_combined_model_is_the_dense_combination(kind: str, dtype: torch.dtype) -> None:
    base = MLP().to(dtype)
    model = several(base, alphas=(1.0, 0.7, 1.3))
    weights = {"x": 1.0, "y": 0.5, "z": -0.8}
    wanted = dense(base, model, weights, kind)
    model.add_weighted_adapter(list(weights), list(weights.values()), "new", kind)
    for name, value in merged(model, "new").items():
        if dtype == torch.float32:
            torch.testing.assert_close(value.double(), wanted[name], rtol=1e-6, atol=1e-6)
        else:  # rounded once: float32 arithmetic before that hardly ever shows
            assert (value == wanted[name].to(dtype)).double().mean() > 0.99
            torch.testing.assert_close(value.double(), wanted[name], rtol=torch.finfo(dtype).eps, atol=1e-6)
    untouched = {name: set(range(value.numel())) for name, value in base.named_parameters()}
    for name, indices in held(model, "new").items():
        untouched[name] -= set(indices)
    for name, indices in untouched.items():
        assert (wanted[name].flatten() == base.get_parameter(name).flatten().double())[list(indices)].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.7, 1.0, 1.9)], ids=str)
def test_the_mean_is_what_all_adapters_active_together_give(alphas: tuple, dtype: torch.dtype) -> None:
    base = MLP().to(dtype)
    model = several(base, alphas)
    assert sum(model.conflicts(["x", "y", "z"]).values()) > 10
    model.add_weighted_adapter(["z", "x", "y"], [1.0, 1.0, 1.0], "new", "mean")
    assert_same(merged(model, "new"), merged(model, "x", "y", "z"))
    model.base_model.set_adapter(["y", "x", "z"])
    together = output(model, X.to(dtype))
    model.set_adapter("new")
    assert same_bits(output(model, X.to(dtype)), together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", sorted(COMBINATIONS))
@pytest.mark.parametrize("alpha", [1.0, 0.7, {"first.weight": 0.3}], ids=str)
def test_one_adapter_with_weight_1_is_copied(kind: str, alpha: object, dtype: torch.dtype) -> None:
    base = MLP().to(dtype)
    model = several(base, alphas=(alpha,))
    model.add_weighted_adapter(["x"], [1.0], "new", kind)
    assert_same(merged(model, "new"), merged(model, "x"))
    assert held(model, "new") == held(model, "x")


@pytest.mark.feature("add_weighted_adapter")
def test_the_order_of_adapters_does_not_matter() -> None:
    model = several(MLP(), alphas=(1.0, 0.7, 1.3))
    weights = {"x": 1.0, "y": 0.3, "z": -0.8}
    for kind in COMBINATIONS:
        for turn, order in enumerate(("xyz", "zyx", "yxz")):
            model.add_weighted_adapter(list(order), [weights[name] for name in order], f"{kind}{turn}", kind)
            assert_same(merged(model, f"{kind}{turn}"), merged(model, f"{kind}0"))


@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_donors_in_another_dtype_than_the_base(dtype: torch.dtype, alpha: float) -> None:
    plain = MLP()
    one, two, _ = donors(plain)
    other = [copy.deepcopy(module).to(dtype) for module in (plain, one, two)]
    for base, first, second in ((plain, *other[1:]), (other[0], one, two)):
        model = graft(base, first, adapter_name="x", density=0.5, alpha=alpha)
        model.add_adapter("y", GraftConfig(donor=second, density=0.5))
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
        assert_same(merged(model, "new"), merged(model, "x", "y"))
        model.add_weighted_adapter(["y"], [1.0], "copy")
        copied, original = model.patch("copy").tensors, model.patch("y").tensors
        assert all(same_bits(copied[name].values, part.values) for name, part in original.items())


def test_an_adapter_that_drowns_the_others_is_told_with_weights_that_help(caplog: pytest.LogCaptureFixture) -> None:
    model = several(tiny_llama(), alphas=(16.0, 1.0))
    model.base_model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "loud", "linear")
    (line,) = [record.getMessage() for record in caplog.records if "add about as much" in record.getMessage()]
    weights = json.loads(re.search(r"weights=(\[.*?\])", line)[1])
    assert weights[1] / weights[0] == pytest.approx(16, rel=0.1)
    caplog.clear()
    model.base_model.add_weighted_adapter(["x", "y"], weights, "even", "linear")
    assert caplog.records == []


def test_a_learned_mask_contributes_its_exact_mask() -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=0.2, selection="learned", candidate_ratio=3)
    model.add_adapter("y", GraftConfig(donor=two, density=0.2))
    state = model.base_model.states["x"]
    with torch.no_grad():
        for logits in state.logits().values():
            logits.uniform_(-1, 1)
    model.train()
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
    assert sum(map(len, held(model, "x").values())) == 3 * model.patch("x").num_params
    assert_same(merged(model, "new"), merged(model, "x", "y"))
    assert not model.base_model.states["new"].logits()


# As good as any other adapter


MODELS = {"bert": tiny_bert, "gpt2": tiny_gpt2, "mixtral": tiny_mixtral, "t5": tiny_t5, "vit": tiny_vit}


@pytest.mark.feature("add_weighted_adapter")
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_saved_and_loaded_without_its_sources(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    base, batch = make(), inputs(make())
    model = several(base, density=0.05)
    plain = output(base, batch)
    model.add_weighted_adapter(["x", "y"], [0.7, 0.6], "new", "ties")
    for name in "xyz":
        if name == "x":
            model.set_adapter("new")
            combined = output(model, batch)
            assert not same_bits(combined, plain)
        model.delete_adapter(name)
    assert list(model.peft_config) == list(model.base_model.states) == ["new"]
    assert same_bits(output(model, batch), combined)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path / "new")
    assert same_bits(output(loaded, batch), combined)
    assert held(loaded) == held(model, "new")
    for each in (model, loaded):
        each.merge_adapter()
        assert same_bits(output(each, batch), combined)
        with each.disable_adapter():
            assert same_bits(output(each, batch), plain)
        each.unmerge_adapter()
        assert_same(parameters(each.unload()), parameters(base))


def test_the_config_tells_where_it_comes_from(tmp_path: Path) -> None:
    base = MLP()
    model = several(base, alphas=(1.0, 0.7))
    model.add_weighted_adapter(["x", "y"], [1, 0.5], "new", "ties")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert (saved["alpha"], saved["donor"], saved["density"], saved["selection"]) == (1.0, None, None, "magnitude")
    assert saved["record"]["entries"] == model.patch("new").num_params
    assert saved["record"]["eligible"] == sum(value.numel() for value in base.parameters())
    first, second = saved["record"]["provenance"].pop("adapters")
    conflicts = len(set(flat(held(model, "x"))) & set(flat(held(model, "y"))))
    assert saved["record"]["provenance"] == {
        "combination_type": "ties",
        "conflicts": conflicts,
        "modules_to_save_from": None,
    }
    assert (first["name"], first["weight"], first["alpha"], first["donor"]) == ("x", 1.0, 1.0, "MLP")
    assert (second["name"], second["weight"], second["alpha"]) == ("y", 0.5, 0.7)
    assert first["entries"] == second["entries"] == round(0.5 * saved["record"]["eligible"])
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    assert loaded.peft_config["default"].record.provenance == model.peft_config["new"].record.provenance


def flat(found: dict[str, list[int]]) -> list[tuple[str, int]]:
    return [(name, index) for name, indices in found.items() for index in indices]


def test_combined_adapters_can_be_combined() -> None:
    model = several(MLP())
    model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "xy")
    model.add_weighted_adapter(["xy", "z"], [1.0, 1.0], "xyz")
    model.add_weighted_adapter(["x", "y", "z"], [0.5, 0.5, 1.0], "once")
    for one, other in zip(merged(model, "xyz").values(), merged(model, "once").values(), strict=True):
        torch.testing.assert_close(one, other)
    assert model.peft_config["xyz"].record.provenance["adapters"][0]["provenance"]["combination_type"] == "linear"


def test_adapters_with_other_targets() -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=1.0, target_modules=["first"])
    model.add_adapter("y", GraftConfig(donor=two, density=1.0, target_modules=["second"]))
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "disjoint")
    model.set_adapter("new")
    wanted = copy.deepcopy(base)
    wanted.first, wanted.second = one.first, two.second
    assert same_bits(output(model, X), output(wanted, X))
    assert model.peft_config["new"].record.eligible == sum(
        p.numel() for m in (base.first, base.second) for p in m.parameters()
    )


def test_bare_parameters_only(tmp_path: Path) -> None:
    base, batch = tiny_vit(), inputs(tiny_vit())
    options = {"density": 0.5, "target_modules": None, "target_parameters": ["cls_token", "position_embeddings"]}
    model = several(base, alphas=(1.0, 1.0), **options)
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
    assert list(held(model, "new")) == ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings"]
    model.set_adapter("new")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path / "new")
    assert same_bits(output(loaded, batch), output(model, batch))


def test_attention_in_one_piece(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attn(x, x, x)[0]

    base = Attention()
    model = several(base, alphas=(1.0, 1.0))
    model.add_weighted_adapter(["x", "y"], [0.3, 0.3], "new")
    assert "attn.out_proj.weight" in held(model, "new")
    model.set_adapter("new")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "new")
    x = torch.randn(3, 4)
    assert same_bits(output(loaded, x), output(model, x)) and not same_bits(output(loaded, x), output(base, x))


def test_tied_weights(tmp_path: Path) -> None:
    """One adapter patches the tied tensor as the head, the other one as the embedding."""
    base, batch = tiny_llama(tied=True), inputs(tiny_llama())
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=0.3, target_modules=["lm_head"])
    model.add_adapter("y", GraftConfig(donor=two, density=0.3, target_modules=["embed_tokens"]))
    counted = model.conflicts(["x", "y"])
    assert len(counted) == 1 and sum(counted.values()) > 10
    model.base_model.set_adapter(["x", "y"])
    together = output(model, batch)
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
    model.set_adapter("new")
    assert same_bits(output(model, batch), together)
    model.merge_adapter()
    assert same_bits(output(model, batch), together)
    model.unmerge_adapter()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(tied=True), tmp_path / "new")
    assert same_bits(output(loaded, batch), together)
    alone = model.unload()
    assert alone.lm_head.weight is alone.model.embed_tokens.weight
    assert_same(parameters(alone), parameters(base))


def test_combining_while_something_is_merged() -> None:
    base = MLP()
    model = several(base)
    model.add_weighted_adapter(["x", "y"], [0.5, 2.0], "before")
    model.base_model.set_adapter(["x", "z"])
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):  # as PEFT does with every addition
        model.add_weighted_adapter(["x", "y"], [0.5, 2.0], "after")
    assert held(model, "after") == held(model, "before")
    assert_same(merged(model, "after"), merged(model, "before"))


def test_what_trains_and_what_is_active_stay_as_they_were() -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=0.2, selection="learned")
    model.add_adapter("y", GraftConfig(donor=two, density=0.2))
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    before = output(model, X)
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new")
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trained != set()
    assert model.active_adapters == ["x"] and same_bits(output(model, X), before)
    model.set_adapter("new")
    assert not [name for name, value in model.named_parameters() if value.requires_grad]


def test_switching_rows_and_deleting() -> None:
    model = several(MLP(), density=0.3)
    model.add_weighted_adapter(["x", "y", "z"], [1.0, 1.0, 1.0], "new", "ties")
    alone = {}
    for name in ("x", "y", "z", "new"):
        model.set_adapter(name)
        alone[name] = output(model, X)
    order = ["new", "x", "z", "y", "new"]
    for name in [*order, *reversed(order)]:
        model.set_adapter(name)
        assert same_bits(output(model, X), alone[name])
    with torch.no_grad():
        rows = model(X, adapter_names=order)
    torch.testing.assert_close(rows, torch.stack([alone[name][i] for i, name in enumerate(order)]))
    model.base_model.set_adapter(["new", "x"])
    both = output(model, X)
    model.base_model.set_adapter(["x", "new"])
    assert same_bits(output(model, X), both)
    model.delete_adapter("z")
    assert same_bits(output(model, X), both)
    model.delete_adapter("new")
    assert same_bits(output(model, X), alone["x"])
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new")
    assert model.active_adapters == ["x"]


# Heads


def with_heads(**options: object) -> PeftModel:
    return several(tiny_bert(), density=0.1, task_type="SEQ_CLS", target_modules=None, **options)


def head(model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
    return model.base_model.model.classifier.modules_to_save[adapter_name].state_dict()


def test_different_heads_are_a_choice(tmp_path: Path) -> None:
    model, batch = with_heads(), inputs(tiny_bert())
    with pytest.raises(
        ValueError, match=r"must be the same in all adapters, got different \['classifier'\]. Choose an adapter"
    ):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new")
    assert "new" not in model.peft_config and "new" not in model.base_model.model.classifier.modules_to_save
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", modules_to_save_from="y")
    assert_same(head(model, "new"), head(model, "y"))
    assert model.peft_config["new"].record.provenance["modules_to_save_from"] == "y"
    model.set_adapter("new")
    assert not [name for name, value in model.named_parameters() if value.requires_grad]
    wanted = output(model, batch)
    model.delete_adapter("x")
    model.delete_adapter("y")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "new")
    assert same_bits(output(loaded, batch), wanted)


def test_equal_heads_need_no_choice() -> None:
    base = tiny_bert()
    one, two, _ = donors(base)
    two.classifier = one.classifier
    model = graft(base, one, adapter_name="x", density=0.1, task_type="SEQ_CLS")
    model.add_adapter("y", GraftConfig(donor=two, density=0.1, task_type="SEQ_CLS"))
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
    assert_same(head(model, "new"), head(model, "x"))


def test_the_only_head_is_taken() -> None:
    base = tiny_bert()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=0.1)
    model.add_adapter("y", GraftConfig(donor=two, density=0.1, modules_to_save=["classifier"]))
    model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "mean")
    assert_same(head(model, "new"), head(model, "y"))
    assert model.peft_config["new"].modules_to_save == ["classifier"]
    model.set_adapter("new")
    assert same_bits(model.base_model.model.classifier.weight, head(model, "y")["weight"])


def test_a_head_that_was_trained_is_copied_and_stays_trainable() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base).bert, adapter_name="x", density=0.1, task_type="SEQ_CLS")
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["x"].weight.add_(1)
    model.add_weighted_adapter(["x"], [1.0], "new")
    assert_same(head(model, "new"), head(model, "x"))
    model.set_adapter("new")
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 and all(".modules_to_save.new." in name for name in trained)


# Reading a patch, and counting conflicts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_patch_of_an_adapter(dtype: torch.dtype) -> None:
    base = MLP().to(dtype)
    donor, _, _ = donors(base)
    model = graft(base, donor, density=0.5, alpha=0.7)
    plain, scaled = model.patch(), model.patch(with_alpha=True)
    assert {name: part.indices.tolist() for name, part in plain.tensors.items()} == held(model)
    assert plain.shapes == {name: tuple(value.shape) for name, value in base.named_parameters()}
    plain.validate()
    weights = merged(model, "default")
    for name, part in plain.tensors.items():
        assert same_bits(part.values, donor.get_parameter(name).detach().view(-1)[part.indices])
        assert same_bits(scaled.tensors[name].values, weights[name].view(-1)[part.indices])


def test_conflicts_are_counted() -> None:
    model = several(MLP(), density=0.4)
    sets = {name: set(flat(held(model, name))) for name in "xyz"}
    assert model.conflicts() == {}  # one adapter is active
    model.base_model.set_adapter(["x", "z"])
    assert sum(model.conflicts().values()) == len(sets["x"] & sets["z"]) > 0
    twice = (sets["x"] & sets["y"]) | (sets["x"] & sets["z"]) | (sets["y"] & sets["z"])
    by_tensor = model.conflicts(["x", "y", "z"])
    assert by_tensor == {name: sum(one == name for one, _ in twice) for name in by_tensor}
    assert sum(by_tensor.values()) == len(twice)


# Errors


@pytest.mark.feature("add_weighted_adapter")
def test_all_that_is_wrong_is_said_at_once() -> None:
    model = several(MLP())
    model.add_adapter("w", GraftConfig(donor=donors(MLP())[0], density=0.5, selection="fisher"))
    names = set(model.state_dict())
    with pytest.raises(ValueError) as caught:
        model.add_weighted_adapter(["x", "q", "w"], [1.0, math.nan], "y", "svd", modules_to_save_from="z")
    for words in (
        "adapters must be loaded grafts, got ['q']. Loaded are ['w', 'x', 'y', 'z']",
        "adapters must be complete, got ['w'] that wait for data",
        "adapter_name must be a new one, got 'y'",
        "combination_type must be one of ['disjoint', 'linear', 'mean', 'ties'], got 'svd'",
        "weights must be one for each of the 3 patches, got 2",
        "weights must be finite numbers, got [nan]",
        "modules_to_save_from must be one of the adapters, got 'z'",
    ):
        assert words in str(caught.value)
    assert set(model.state_dict()) == names and list(model.peft_config) == ["x", "y", "z", "w"]
    with pytest.raises(ValueError, match="adapters must be at least one, got none"):
        model.add_weighted_adapter([], [], "new")


def test_a_combination_that_leaves_nothing_is_refused() -> None:
    base = MLP()
    model = graft(base, donors(base)[0], adapter_name="x", density=0.5)
    model.add_adapter("y", GraftConfig(donor=donors(base)[0], density=0.5))
    with pytest.raises(ValueError, match=r"at least one entry, got none of \[32, 32\] .*'disjoint'"):
        model.add_weighted_adapter(["x", "y"], [1.0, 1.0], "new", "disjoint")
    assert list(model.peft_config) == ["x", "y"]


def test_an_overflow_is_refused_and_leaves_nothing_behind() -> None:
    model = several(MLP().half())
    names = set(model.state_dict())
    with pytest.raises(PatchError, match="must be finite, got an overflow in"):
        model.add_weighted_adapter(["x", "y"], [1e6, 1.0], "new")
    assert set(model.state_dict()) == names and "new" not in model.peft_config


def test_only_complete_adapters_have_a_patch() -> None:
    base = MLP()
    model = several(base)
    model.add_adapter("w", GraftConfig(donor=donors(base)[0], density=0.5, selection="fisher"))
    with pytest.raises(ValueError, match="must be complete before it is read"):
        model.patch("w")
    with pytest.raises(ValueError, match="must be a loaded graft, got 'q'. Loaded are"):
        model.patch("q")
    with pytest.raises(ValueError, match="must be a loaded graft, got 'q'"):
        model.conflicts(["x", "q"])


def test_an_adapter_without_its_file_has_no_patch(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.1).save_pretrained(tmp_path)
    config = GraftConfig.from_pretrained(tmp_path)
    model = graft(base, perturbed(base), adapter_name="x", density=0.1)
    model.add_adapter("empty", config)
    with pytest.raises(RuntimeError, match="'empty' must be loaded from its file"):
        model.patch("empty")
    with pytest.raises(ValueError, match=r"got \['empty'\] that wait for data or for a file"):
        model.add_weighted_adapter(["x", "empty"], [1.0, 1.0], "new")
