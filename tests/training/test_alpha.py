"""Alpha, fitted by the loss and never worse than 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from batches import regression, squared_error
from grafts import MLP, graft, held, output, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import fit_alpha
from peft_graft.training.alpha import AlphaFit, find_head_start, minimise
from peft_graft.training.loss import mean_loss


class Quadratic(nn.Module):
    """Loss |w - target|^2, so the best alpha is known."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.unit = nn.Linear(len(values), 1, bias=False)
        self.unit.weight.data.copy_(torch.tensor([values]))

    def forward(self) -> torch.Tensor:
        return self.unit.weight


def distance_to(*target: float) -> Callable[[nn.Module, object], torch.Tensor]:
    return lambda model, _: (model() - torch.tensor([target])).square().sum()


def quiet(model: nn.Module, batches: list[Any], **options: Any) -> AlphaFit:
    return fit_alpha(model, batches, show_progress_bar=False, **({"loss_fn": squared_error} | options))


@given(centre=st.floats(math.log(1e-4), math.log(1e4)), curvature=st.floats(0.1, 10), start=st.floats(-5, 5))
def test_the_minimum_of_a_convex_function_is_found(centre: float, curvature: float, start: float) -> None:
    seen = minimise(lambda point: curvature * (point - centre) ** 2, start)
    best = min(seen, key=lambda point: seen[point])
    assert abs(best - centre) < 0.2
    assert len(seen) <= 25


@given(values=st.lists(st.floats(-1e3, 1e3) | st.just(math.inf), min_size=60, max_size=60), start=st.floats(-11, 11))
def test_it_ends_and_has_seen_one_whatever_the_function(values: list[float], start: float) -> None:
    calls = iter(values)
    seen = minimise(lambda point: next(calls), start)
    assert 0.0 in seen
    assert min(seen.values()) <= seen[0.0]
    assert len(seen) <= 40


@pytest.mark.parametrize("sign", [1, -1])
def test_a_function_without_a_minimum_stops_at_the_limit(sign: int) -> None:
    seen = minimise(lambda point: sign * point)
    assert 1e4 < max(math.exp(abs(point)) for point in seen) < 1e7


@pytest.mark.parametrize("best", [0.02, 0.6, 1.0, 7.0, 900.0])
def test_the_best_alpha_of_a_quadratic_is_found(best: float) -> None:
    base, donor = Quadratic([1.0, -2.0]), Quadratic([1.5, -1.0])
    target = [1 + best * 0.5, -2 + best * 1.0]
    model = graft(base, donor, density=1.0, alpha="auto")
    fit = quiet(model, [{}], loss_fn=distance_to(*target))
    assert fit.alpha == pytest.approx(best, rel=0.15)
    assert fit.loss <= fit.loss_at_one and (best == 1.0 or fit.loss < fit.loss_at_one)
    assert fit.passes <= 25
    assert model.peft_config["default"].alpha == fit.alpha
    assert distance_to(*target)(model.eval(), {}).item() == pytest.approx(fit.loss)


def test_a_patch_that_only_harms_is_scaled_away_and_alpha_one_wins_a_tie() -> None:
    base, donor = Quadratic([0.0]), Quadratic([1.0])
    assert quiet(graft(base, donor, density=1.0), [{}], loss_fn=distance_to(-1.0)).alpha < 1e-3
    assert quiet(graft(base, donor, density=1.0), [{}], loss_fn=lambda model, _: model().sum() * 0).alpha == 1.0


def test_the_recorded_losses_are_the_models() -> None:
    base = MLP()
    model = graft(base, perturbed(base, scale=0.5), density=0.3, alpha="auto")
    batches = regression()
    fit = quiet(model, batches)
    assert mean_loss(model.eval(), batches, squared_error) == fit.loss
    model.peft_config["default"].alpha = 1.0
    assert mean_loss(model, batches, squared_error) == fit.loss_at_one


def test_the_search_starts_where_alpha_is_and_still_looks_at_one() -> None:
    base, donor = Quadratic([0.0]), Quadratic([1.0])
    model = graft(base, donor, density=1.0, alpha=500.0)
    seen = []

    def loss_fn(model: nn.Module, batch: object) -> torch.Tensor:
        seen.append(model().item())
        return distance_to(400.0)(model, batch)

    fit = quiet(model, [{}], loss_fn=loss_fn)
    assert 1.0 in seen and fit.alpha == pytest.approx(400, rel=0.15)
    assert len([value for value in seen if value < 100]) == 1


@pytest.mark.parametrize("selection", ["magnitude", "learned"])
def test_one_alpha_per_tensor_is_at_least_as_good(selection: str) -> None:
    base = MLP()
    model = graft(base, perturbed(base, scale=0.5), density=0.3, selection=selection, alpha="auto")
    batches = regression()
    single = quiet(model, batches)
    model.peft_config["default"].alpha = 1.0
    each = quiet(model, batches, alpha_scope="tensor")
    assert each.loss < single.loss <= single.loss_at_one == each.loss_at_one
    assert isinstance(each.alpha, dict) and set(each.alpha) == set(held(model))
    assert len(set(each.alpha.values())) > 1
    assert model.peft_config["default"].alpha == each.alpha
    assert mean_loss(model.eval(), batches, squared_error) == pytest.approx(each.loss, rel=1e-5)
    assert each.passes > single.passes


def test_alpha_per_tensor_finds_each_tensors_own() -> None:
    class Two(nn.Module):
        def __init__(self, one: float, other: float) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
            self.one.weight.data.fill_(one), self.other.weight.data.fill_(other)

        def forward(self) -> torch.Tensor:
            return torch.cat([self.one.weight, self.other.weight], 1)

    model = graft(Two(0, 0), Two(1, 1), density=1.0, alpha="auto", alpha_scope="tensor")
    fit = quiet(model, [{}], loss_fn=distance_to(2.0, 3.0))
    assert fit.alpha["one.weight"] == pytest.approx(2, rel=0.1)
    assert fit.alpha["other.weight"] == pytest.approx(3, rel=0.1)


def test_fitting_touches_no_gradient_and_no_mode() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base).bert, density=0.1, selection="learned", task_type="SEQ_CLS").train()
    model.base_model.model.bert.pooler.eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > 2  # the logits, and a head that the donor lacks
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    modes = [module.training for module in model.modules()]
    for scope in ("global", "tensor"):
        quiet(model, [inputs(base)], alpha_scope=scope, loss_fn=lambda model, batch: model(**batch).loss)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained)
    assert [p for p in model.parameters() if p.grad is not None] == trained


@pytest.mark.parametrize("alpha", ["auto", 2.0])
def test_a_failed_fit_changes_nothing(alpha: object, tmp_path: Path) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha=alpha)
    before = output(model, regression()[0]["x"])
    with pytest.raises(ValueError, match="loss must be finite at alpha = 1, got inf"):
        quiet(model, regression(), loss_fn=lambda m, b: squared_error(m, b) * float("nan"))
    assert model.peft_config["default"].alpha == alpha
    assert same_bits(output(model, regression()[0]["x"]), before)
    if alpha == "auto":
        with pytest.raises(ValueError, match="must be complete before it is saved"):
            model.save_pretrained(tmp_path)


def test_a_loss_that_explodes_beyond_some_alpha_is_no_obstacle() -> None:
    base, donor = Quadratic([0.0]), Quadratic([1.0])

    def loss_fn(model: nn.Module, batch: object) -> torch.Tensor:
        loss = distance_to(4.0)(model, batch)
        return loss if model().item() < 5 else loss * float("inf")

    assert quiet(graft(base, donor, density=1.0), [{}], loss_fn=loss_fn).alpha == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize(("best", "wanted"), [(10.0, 3.0), (1.0, 3**0.25), (0.9, 3**0.25), (0.5, 1.0), (1.6, 3**0.75)])
def test_a_head_start_keeps_half_of_the_gain(best: float, wanted: float) -> None:
    """The loss (alpha - best)^2 + 1 falls from best^2 + 1 at the base."""
    model = graft(Quadratic([0.0]), Quadratic([1.0]), density=1.0, alpha=1.0)
    loss_fn = distance_to(best)
    found = find_head_start(model, [{}], 3.0, loss_fn=loss_fn)
    assert found.loss == pytest.approx((1 - best) ** 2, abs=1e-6) and found.loss_of_base == pytest.approx(best**2)
    assert found.factor == pytest.approx(wanted)
    assert model.peft_config["default"].alpha == 1.0 and model.base_model.states["default"].trial is None
