"""Evidence from data: every rule against a dense computation by hand, on a base that is the same afterwards."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from grafts import DTYPES, FAMILIES, MLP, TASKS, assert_same, graft, held, parameters
from models import inputs, perturbed, tiny_bert, tiny_vit, tiny_whisper
from peft_graft import GraftConfig, SelectionError, initialize_graft
from peft_graft.selection.rules import RULES
from peft_graft.selection.topk import top_k_mask
from peft_graft.training import measure as measure_module
from peft_graft.training.measure import batch_size, default_loss, mean_loss, measure

Batch = dict[str, torch.Tensor]
DATA_DRIVEN = sorted(name for name, rule in RULES.items() if rule.kind == "scored")


def examples(sizes: tuple[int, ...] = (4, 1, 3), outputs: int = 3) -> list[Batch]:
    """Batches of unequal sizes: a mean of batch means would not be the mean over examples."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(size, 4, generator=generator), "y": torch.randint(outputs, (size,), generator=generator)}
        for size in sizes
    ]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def whole(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def gradient(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def between(base: nn.Module, donor: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += share * (donor.get_parameter(name) - parameter)
    return model


def measured(base: nn.Module, donor: nn.Module, needs: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    model = graft(base, donor, density=0.5, selection="fisher")
    return measure(model, model.base_model, "default", needs, batches, loss_of, progress=False)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7), name


# Against dense references


def test_the_gradient_is_that_of_the_mean_over_all_examples() -> None:
    base = MLP()
    wanted = gradient(base, whole(examples()))
    assert_close(measured(base, perturbed(base), "gradient", examples()), wanted)


def test_the_path_gradient_is_the_mean_over_the_midpoints() -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    points = [gradient(between(base, donor, (p + 0.5) / 4), whole(examples())) for p in range(4)]
    wanted = {name: sum(point[name] for point in points) / 4 for name in points[0]}
    assert_close(measured(base, donor, "path_gradient", examples()), wanted)


def test_the_squared_gradient_is_the_weighted_mean_of_squares() -> None:
    base = MLP()
    gradients = [(gradient(base, batch), len(batch["y"]) / 8) for batch in examples()]
    wanted = {name: sum(share * g[name] ** 2 for g, share in gradients) for name, _ in base.named_parameters()}
    assert_close(measured(base, perturbed(base), "squared_gradient", examples()), wanted)


def test_the_input_norm_is_that_of_what_multiplies_each_entry() -> None:
    base = MLP().eval()
    nn.init.normal_(base.norm.weight), nn.init.normal_(base.norm.bias)
    x = whole(examples())["x"]
    first = base.first(x)
    normal = (base.norm(first) - base.norm.bias) / base.norm.weight
    wanted = {
        "first.weight": x.norm(dim=0)[None],
        "norm.weight": normal.norm(dim=0),
        "second.weight": torch.tanh(base.norm(first)).norm(dim=0)[None],
        **{f"{name}.bias": torch.tensor(8.0).sqrt() for name in ("first", "norm", "second")},
    }
    with torch.no_grad():
        assert_close(measured(base, perturbed(base), "input_norm", examples()), wanted)


class Single(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit(x)


@pytest.mark.parametrize("unit", [Conv1D(3, 4), nn.Linear(4, 3), LlamaRMSNorm(4), nn.Embedding(5, 3)], ids=repr)
def test_the_input_norm_is_the_size_of_the_gradient_of_a_linear_module(unit: nn.Module) -> None:
    """d output / d entry is the input that multiplies the entry, so its norm over positions is the norm asked for."""
    base = Single(unit).eval()
    integers = isinstance(unit, nn.Embedding)
    x = torch.randint(5, (3, 2)) if integers else torch.randn(3, 2, 4)
    model = graft(base, "zeros", density=0.5, selection="wanda", target_modules="all")
    found = measure(model, model.base_model, "default", "input_norm", [x], lambda m, b: m(b).sum(), progress=False)
    squares = {name: torch.zeros_like(p) for name, p in base.named_parameters()}
    for row in x.reshape(-1) if integers else x.reshape(-1, 4):
        base.zero_grad()
        base(row[None]).sum().backward()
        for name, parameter in base.named_parameters():
            squares[name] += parameter.grad.square()
    for name, square in squares.items():
        assert torch.allclose(found[name].expand_as(square), square.sqrt(), rtol=1e-4, atol=1e-6), name


def test_the_input_norm_of_a_convolution_is_per_channel() -> None:
    base = Single(nn.Conv2d(3, 4, 2)).eval()
    x = torch.randn(2, 3, 5, 5)
    model = graft(base, "zeros", density=0.5, selection="wanda")
    found = measure(model, model.base_model, "default", "input_norm", [x], lambda m, b: m(b).sum(), progress=False)
    assert torch.allclose(found["unit.weight"], x.square().sum((0, 2, 3)).sqrt().view(1, 3, 1, 1))
    assert found["unit.bias"].item() == pytest.approx((2 * 4 * 4) ** 0.5)  # how many outputs the bias is added to


def test_inputs_given_by_keyword_count() -> None:
    x = torch.randn(3, 4)
    base = Single(nn.Linear(4, 2))
    base.forward = lambda x: base.unit(input=x)  # type: ignore[method-assign]
    model = get_peft_model(base, GraftConfig(donor="zeros", density=0.5, selection="wanda"))
    found = measure(model, model.base_model, "default", "input_norm", [x], lambda m, b: m(b).sum(), progress=False)
    assert torch.allclose(found["unit.weight"], x.norm(dim=0)[None])


SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "taylor": lambda delta, evidence: (delta * evidence).abs(),
    "path_taylor": lambda delta, evidence: (delta * evidence).abs(),
    "fisher": lambda delta, evidence: delta**2 * evidence,
    "wanda": lambda delta, evidence: delta.abs() * evidence,
}


@pytest.mark.parametrize("selection", DATA_DRIVEN)
def test_a_data_driven_mask_is_the_dense_top_k_of_its_scores(selection: str) -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    evidence = measured(base, donor, RULES[selection].evidence, examples())
    names = sorted(evidence)
    scores = [
        SCORES[selection]((donor.get_parameter(name) - base.get_parameter(name)).detach(), evidence[name]).flatten()
        for name in names
    ]
    model = graft(base, donor, num_params=11, selection=selection)
    assert held(model) == {}
    assert initialize_graft(model, examples(), loss_fn=loss_of, progress=False) is None
    masks = top_k_mask(torch.cat(scores), 11).split([len(part) for part in scores])
    wanted = {name: mask.nonzero().flatten().tolist() for name, mask in zip(names, masks, strict=True) if mask.any()}
    assert held(model) == wanted


def test_the_published_procedure_is_followed_step_by_step() -> None:
    base = MLP()
    train, validation, budget, lr = examples(), examples((5, 2)), 20, 1e6
    donor = copy.deepcopy(base)
    optimizer = torch.optim.Adam(donor.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(donor, whole([*train, *validation])).backward()
        optimizer.step()
    names = sorted(name for name, _ in base.named_parameters())
    before = torch.cat([base.get_parameter(name).detach().flatten() for name in names])
    delta = torch.cat([donor.get_parameter(name).detach().flatten() for name in names]) - before

    def at(mask: torch.Tensor) -> nn.Module:
        model, values = copy.deepcopy(base), before + mask * delta
        for name in names:
            parameter = model.get_parameter(name)
            parameter.data.copy_(values[: parameter.numel()].view_as(parameter))
            values = values[parameter.numel() :]
        return model

    logits = torch.rand(len(delta), generator=torch.Generator().manual_seed(3))
    start = top_k_mask(delta.abs(), budget).float()
    losses, masks = [], []
    for _ in range(4):
        soft = start + (1 - 2 * start) * torch.sigmoid(logits - 10)
        masks.append(top_k_mask(soft, budget))
        losses.append(mean_loss(at(masks[-1].float()), validation, loss_of))
        found = gradient(at(soft), whole(train))
        push = torch.cat([found[name].flatten() for name in names]) * delta * (1 - 2 * start)
        logits -= lr * push * torch.sigmoid(logits - 10) * (1 - torch.sigmoid(logits - 10))
    best = masks[losses.index(min(losses))]
    assert losses.index(min(losses)) > 0 and not torch.equal(best, start.bool())

    model = graft(base, donor, num_params=budget, selection="sigmoid", seed=3)
    options = {"budget": budget, "steps": 3, "validation": validation, "seed": 3, "lr": lr}
    found = measure(model, model.base_model, "default", "sigmoid", train, loss_of, progress=False, **options)
    assert torch.equal(torch.cat([found[name].flatten() for name in names]), best.float())


def test_the_published_procedure_starts_at_magnitude_and_never_ends_worse() -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    batches, validation = examples(), examples((6,))
    start = graft(base, donor, num_params=15)
    model = graft(base, donor, num_params=15, selection="sigmoid")
    assert held(model) == held(start)
    initialize_graft(model, batches, calibration=validation, loss_fn=loss_of, progress=False, steps=0)
    assert held(model) == held(start)
    initialize_graft(model, batches, calibration=validation, loss_fn=loss_of, progress=False, steps=5)
    assert sum(map(len, held(model).values())) == model.peft_config["default"].entries == 15
    losses = [mean_loss(each.eval(), validation, loss_of) for each in (model, start)]
    assert losses[0] <= losses[1]


def test_the_signed_scores_along_the_path_add_up_to_the_loss_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    batch = whole(examples())
    wanted = (loss_of(donor, batch) - loss_of(base, batch)).item()
    errors = []
    for points in (1, 4, 32):
        monkeypatch.setattr(measure_module, "PATH_POINTS", points)
        found = measured(base, donor, "path_gradient", [batch])
        total = sum((g * (donor.get_parameter(n) - base.get_parameter(n))).sum().item() for n, g in found.items())
        errors.append(abs(total - wanted))
    assert errors[2] < errors[1] / 20 and errors[1] < errors[0]


def test_on_a_quadratic_loss_they_add_up_exactly() -> None:
    base = Single(nn.Linear(4, 2)).double()
    donor = perturbed(base, scale=0.5)
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return mse_loss(model(batch), y)

    model = graft(base, donor, density=0.5, selection="path_taylor")
    found = measure(model, model.base_model, "default", "path_gradient", [x], loss_fn, progress=False)
    total = sum((g * (donor.get_parameter(n) - base.get_parameter(n))).sum().item() for n, g in found.items())
    assert total == pytest.approx((loss_fn(donor, x) - loss_fn(base, x)).item(), rel=1e-4)


# The base is the same afterwards


@pytest.mark.parametrize("selection", [*DATA_DRIVEN, "sigmoid"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_scoring_leaves_the_base_as_it_was(family: str, selection: str) -> None:
    base = FAMILIES[family](torch.bfloat16)
    model = graft(base, perturbed(base), density=0.02, selection=selection, task_type=TASKS[family])
    model.train()
    model.base_model.model.get_input_embeddings().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    initialize_graft(model, [inputs(base, seed=seed) for seed in range(2)], progress=False, steps=1)
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.disable_adapters for layer in model.base_model._layers())
    config = model.peft_config["default"]
    assert config.entries == round(0.02 * config.eligible) == sum(map(len, held(model).values()))
    head = {name for name, _ in base.named_parameters() if "classifier" in name}
    plain = parameters(model.unload())
    assert_same(*({n: v for n, v in each.items() if n not in head} for each in (plain, parameters(base))))


@pytest.mark.parametrize("needs", ["gradient", "path_gradient", "squared_gradient", "sigmoid"])
def test_an_error_in_the_loss_leaves_the_base_as_it_was(needs: str) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, selection="fisher")
    calls = 0

    def breaks(model: nn.Module, batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return loss_of(model, batch)

    options = {"budget": 5, "steps": 2, "validation": examples((2,)), "seed": 0} if needs == "sigmoid" else {}
    with pytest.raises(RuntimeError, match="out of luck"):
        measure(model, model.base_model, "default", needs, examples(), breaks, progress=False, **options)
    assert not any(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())
    assert_same(parameters(model.unload()), parameters(base))


def test_what_an_earlier_training_left_behind_does_not_count() -> None:
    base = MLP()
    donor = perturbed(base)
    wanted = measured(base, donor, "gradient", examples())
    for parameter in base.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    model = get_peft_model(base, GraftConfig(donor=donor, density=0.5, selection="taylor"))
    assert_close(measure(model, model.base_model, "default", "gradient", examples(), loss_of, progress=False), wanted)


def test_another_active_adapter_does_not_count() -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    alone = graft(base, donor, num_params=9, selection="fisher")
    initialize_graft(alone, examples(), loss_fn=loss_of, progress=False)
    model = graft(base, perturbed(base, seed=8), density=0.5, adapter_name="other")
    model.add_adapter("default", GraftConfig(donor=donor, num_params=9, selection="fisher"))
    model.base_model.set_adapter(["other", "default"])
    initialize_graft(model, examples(), loss_fn=loss_of, progress=False)
    assert held(model) == held(alone)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scores_are_float32_in_half_precision(dtype: torch.dtype) -> None:
    base = tiny_bert(dtype)
    model = graft(base, perturbed(base), density=0.05, selection="fisher")
    found = measure(model, model.base_model, "default", "squared_gradient", [inputs(base)], progress=False)
    assert {value.dtype for value in found.values()} == {torch.float32}


# Errors


def test_a_batch_without_labels_is_refused() -> None:
    base = tiny_bert()
    batch = {key: value for key, value in inputs(base).items() if key != "labels"}
    model = graft(base, perturbed(base), density=0.1, selection="taylor")
    with pytest.raises(ValueError, match=r"return a loss, got keys \['attention_mask', 'input_ids'\]. Include labels"):
        initialize_graft(model, [batch], progress=False)


@pytest.mark.parametrize(
    ("make", "module"), [(tiny_vit, "ViTEmbeddings"), (tiny_whisper, "Conv1d")], ids=["bare parameters", "conv1d"]
)
def test_wanda_refuses_what_it_has_no_input_for(make: Callable[[], nn.Module], module: str) -> None:
    base = make()
    model = graft(base, perturbed(base), density=0.1, selection="wanda", target_modules="all")
    with pytest.raises(SelectionError, match=f"selection='wanda' must target .*got {module} for .*exclude_modules"):
        initialize_graft(model, [inputs(base)], progress=False)


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, selection="taylor")
    with pytest.raises(SelectionError, match="scores must not be NaN, got NaN in 'first.bias'"):
        initialize_graft(model, examples(), loss_fn=lambda m, b: loss_of(m, b) * float("nan"), progress=False)


# Small parts


def test_the_mean_loss_weighs_examples_alike() -> None:
    base = MLP()
    assert mean_loss(base, examples(), loss_of) == pytest.approx(loss_of(base, whole(examples())).item())


def test_batches_of_any_shape_have_a_size() -> None:
    x, none = torch.zeros(3, 2), torch.zeros(())
    assert [batch_size(b) for b in (x, {"a": 1, "b": x}, (x, x), [x], none, {"a": 1})] == [3, 3, 3, 3, 1, 1]


def test_a_data_loader_of_named_tuples_will_do() -> None:
    pair = namedtuple("pair", ["x", "y"])
    base = MLP()
    rows = [pair(batch["x"][0], batch["y"][0]) for batch in examples((1,) * 6)]
    model = graft(base, perturbed(base), density=0.5, selection="fisher", alpha="auto")
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    fit = initialize_graft(model, loader, loss_fn=lambda m, b: cross_entropy(m(b.x), b.y), progress=False)
    assert fit is not None and held(model)


@pytest.mark.parametrize("give", [dict, lambda **values: type("Output", (), values)], ids=["mapping", "object"])
def test_the_loss_is_found_in_any_output(give: Callable[..., object]) -> None:
    assert default_loss(lambda **batch: give(loss=batch["x"] * 2), {"x": torch.ones(())}) == 2


def test_progress_bars_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    model = graft(MLP(), perturbed(MLP()), density=0.5, selection="path_taylor", alpha="auto")
    initialize_graft(model, examples(), loss_fn=loss_of, progress=True)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("gradient along the path", "reading MLP", "fitting alpha"))
