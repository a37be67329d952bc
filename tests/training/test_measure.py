"""Measurements: each against a dense computation by hand, on a base that is the same afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.functional import mse_loss

from batches import Batch, assert_close, examples, gradient, loss_of, measured, quietly, whole
from grafts import DTYPES, MLP, Single, assert_same, graft, parameters
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig
from peft_graft.training import measure as measure_module
from peft_graft.training.loss import default_loss
from peft_graft.training.procedure import sigmoid_mask


def between(base: nn.Module, donor: nn.Module, share: float) -> nn.Module:
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += share * (donor.get_parameter(name) - parameter)
    return model


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
    found = quietly(model, "path_gradient", [x], loss_fn)
    total = sum((g * (donor.get_parameter(n) - base.get_parameter(n))).sum().item() for n, g in found.items())
    assert total == pytest.approx((loss_fn(donor, x) - loss_fn(base, x)).item(), rel=1e-4)


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

    options = {"budget": 5, "steps": 2, "validation": examples((2,)), "seed": 0, "show_progress_bar": False}
    with pytest.raises(RuntimeError, match="out of luck"):
        if needs == "sigmoid":
            sigmoid_mask(model, model.base_model, "default", examples(), loss_fn=breaks, **options)
        quietly(model, needs, examples(), breaks)
    assert not any(p.requires_grad for p in model.parameters()) and all(p.grad is None for p in model.parameters())
    assert_same(parameters(model.unload()), parameters(base))


def test_what_an_earlier_training_left_behind_does_not_count() -> None:
    base = MLP()
    donor = perturbed(base)
    wanted = measured(base, donor, "gradient", examples())
    for parameter in base.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    model = get_peft_model(base, GraftConfig(donor=donor, density=0.5, selection="taylor"))
    assert_close(quietly(model, "gradient", examples(), loss_of), wanted)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_scores_are_float32_in_half_precision(dtype: torch.dtype) -> None:
    base = tiny_bert(dtype)
    model = graft(base, perturbed(base), density=0.05, selection="fisher")
    found = quietly(model, "squared_gradient", [inputs(base)], default_loss)
    assert {value.dtype for value in found.values()} == {torch.float32}
