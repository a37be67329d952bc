"""Completing a graft on data: which batches do what, and alpha, fitted by the loss and never worse than 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss

from grafts import MLP, assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import AlphaCallback, GraftConfig, fit_alpha, initialize_graft, training
from peft_graft.training.initialize import AlphaFit, evaluating, minimise
from peft_graft.training.measure import mean_loss

Batch = dict[str, torch.Tensor]


def examples(count: int = 3, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(4, 4, generator=generator), "y": torch.randn(4, 3, generator=generator)} for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return mse_loss(model(batch["x"]), batch["y"])


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
    return fit_alpha(model, batches, progress=False, **({"loss_fn": loss_of} | options))


# The search


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


# One alpha


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
    batches = examples()
    fit = quiet(model, batches)
    assert mean_loss(model.eval(), batches, loss_of) == fit.loss
    model.peft_config["default"].alpha = 1.0
    assert mean_loss(model, batches, loss_of) == fit.loss_at_one


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
    batches = examples()
    single = quiet(model, batches)
    model.peft_config["default"].alpha = 1.0
    each = quiet(model, batches, scope="tensor")
    assert each.loss < single.loss <= single.loss_at_one == each.loss_at_one
    assert isinstance(each.alpha, dict) and set(each.alpha) == set(held(model))
    assert len(set(each.alpha.values())) > 1
    assert model.peft_config["default"].alpha == each.alpha
    assert mean_loss(model.eval(), batches, loss_of) == pytest.approx(each.loss, rel=1e-5)
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
        quiet(model, [inputs(base)], scope=scope, loss_fn=lambda model, batch: model(**batch).loss)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in trained)
    assert [p for p in model.parameters() if p.grad is not None] == trained


# Errors


@pytest.mark.parametrize("alpha", ["auto", 2.0])
def test_a_failed_fit_changes_nothing(alpha: object, tmp_path: Path) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha=alpha)
    before = output(model, examples()[0]["x"])
    with pytest.raises(ValueError, match="loss must be finite at alpha = 1, got inf"):
        quiet(model, examples(), loss_fn=lambda m, b: loss_of(m, b) * float("nan"))
    assert model.peft_config["default"].alpha == alpha
    assert same_bits(output(model, examples()[0]["x"]), before)
    if alpha == "auto":
        with pytest.raises(ValueError, match="must be complete before it is saved"):
            model.save_pretrained(tmp_path)


def test_a_loss_that_explodes_beyond_some_alpha_is_no_obstacle() -> None:
    base, donor = Quadratic([0.0]), Quadratic([1.0])

    def loss_fn(model: nn.Module, batch: object) -> torch.Tensor:
        loss = distance_to(4.0)(model, batch)
        return loss if model().item() < 5 else loss * float("inf")

    assert quiet(graft(base, donor, density=1.0), [{}], loss_fn=loss_fn).alpha == pytest.approx(4, rel=0.2)


def test_no_batches_are_refused() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha="auto")
    for call in (
        lambda: fit_alpha(model, []),
        lambda: initialize_graft(model, []),
        lambda: initialize_graft(model, examples(), calibration=[]),
    ):
        with pytest.raises(ValueError, match="dataloader must hold at least one batch, got none"):
            call()


@pytest.mark.parametrize("call", [fit_alpha, initialize_graft])
def test_a_merged_or_an_inactive_adapter_is_refused(call: Callable[..., object]) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha="auto")
    model.add_adapter("second", GraftConfig(donor=perturbed(base), density=0.3, alpha="auto"))
    with pytest.raises(ValueError, match=r"an active adapter, got 'second' while \['default'\] are active"):
        call(model, examples(), adapter_name="second", loss_fn=loss_of, progress=False)
    model.peft_config["default"].alpha, model.base_model.states["default"].ready = 1.0, True
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must be unmerged, got a merged one. Call model.unmerge_adapter\(\)"):
        call(model, examples(), loss_fn=loss_of, progress=False)


@pytest.mark.parametrize("options", [{"selection": "path_taylor"}, {"alpha": "auto"}], ids=str)
def test_a_graft_that_waits_for_data_is_not_merged(options: dict[str, Any]) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, **options)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"graft must be complete before it is merged.*initialize_graft"):
            merge()
    assert_same(parameters(model.unload()), parameters(base))


def test_running_before_the_data_came_warns_once() -> None:
    base, x = MLP(), torch.ones(2, 4)
    model = graft(base, perturbed(base), density=0.3, selection="path_taylor")
    with pytest.warns(UserWarning, match="'default' has no patch yet.*'path_taylor' waits for data. Call peft"):
        assert torch.equal(model(x), base(x))
    model(x)
    initialize_graft(model, examples(), loss_fn=loss_of, progress=False)
    assert not torch.equal(model(x), base(x))


@pytest.mark.parametrize("call", [fit_alpha, initialize_graft])
def test_a_model_without_a_graft_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="model must contain a graft, got MLP"):
        call(MLP(), examples())
    with pytest.raises(ValueError, match="model must contain a graft, got PeftModel"):
        call(get_peft_model(MLP(), LoraConfig(target_modules=["first"])), examples())


# Which batches do what


def spied(selection: str, count: int, **options: Any) -> tuple[set[int], set[int], AlphaFit | None]:
    """Numbers of the batches that were seen with gradients (scores) and without (alpha, validation)."""
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection=selection, **options.pop("config", {"alpha": "auto"}))
    batches = [batch | {"number": torch.tensor(i)} for i, batch in enumerate(examples(count))]
    scored, looked = set(), set()

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        (scored if torch.is_grad_enabled() else looked).add(int(batch["number"]))
        return loss_of(model, batch)

    if options.pop("calibrate", False):
        options["calibration"] = [batch | {"number": torch.tensor(100)} for batch in examples(1)]
    fit = initialize_graft(model, batches, loss_fn=loss_fn, progress=False, **options)
    return scored, looked, fit


@pytest.mark.parametrize("selection", ["fisher", "sigmoid"])
def test_every_fourth_batch_is_held_out_from_the_mask(selection: str) -> None:
    assert spied(selection, 9, steps=1)[:2] == ({0, 1, 2, 4, 5, 6, 8}, {3, 7})
    assert spied(selection, 3, steps=1)[:2] == ({0, 1}, {2})


@pytest.mark.parametrize("selection", ["magnitude", "learned"])
def test_a_mask_made_without_data_leaves_all_of_it_to_alpha(selection: str) -> None:
    assert spied(selection, 5)[:2] == (set(), {0, 1, 2, 3, 4})


def test_calibration_data_leaves_all_else_to_the_mask() -> None:
    assert spied("fisher", 4, calibrate=True)[:2] == ({0, 1, 2, 3}, {100})


def test_without_alpha_to_fit_nothing_is_held_out() -> None:
    assert spied("fisher", 4, config={"alpha": 2.0}) == ({0, 1, 2, 3}, set(), None)
    assert spied("magnitude", 4, config={"alpha": 2.0}) == (set(), set(), None)


def test_the_same_batch_twice_is_two_batches() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection="fisher", alpha="auto")
    fit = initialize_graft(model, examples(1) * 4, loss_fn=loss_of, progress=False)
    assert fit is not None and held(model)


@pytest.mark.parametrize("selection", ["fisher", "sigmoid"])
def test_one_batch_cannot_do_both(selection: str) -> None:
    with pytest.raises(ValueError, match="at least 2 batches to hold one out for alpha, got 1"):
        spied(selection, 1)


# In turns with a Trainer


@pytest.mark.parametrize(
    ("rounds", "steps", "ends"), [(1, 10, [10]), (2, 10, [5, 10]), (3, 10, [3, 6, 10]), (9, 2, [1, 2])]
)
def test_alpha_is_fitted_at_the_end_of_every_round(
    rounds: int, steps: int, ends: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    monkeypatch.setattr(training, "fit_alpha", lambda model, data, **options: fitted.append((model, data, options)))
    callback = AlphaCallback(iter(examples()), rounds=rounds, adapter_name="skill")
    for step in range(1, steps + 1):
        before = len(fitted)
        callback.on_step_end(None, SimpleNamespace(global_step=step, max_steps=steps), None, model="model")
        assert (len(fitted) > before) == (step in ends)
    assert len(callback.fits) == len(ends)
    model, data, options = fitted[-1]
    assert model == "model" and len(data) == 3 and options["adapter_name"] == "skill"


def test_a_round_at_least() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0. Leave the callback out"):
        AlphaCallback(examples(), rounds=0)


@pytest.mark.parametrize(
    ("alpha", "wanted"), [("auto", 3.0), (2.0, 6.0), ({"first.weight": 2.0}, {"first.weight": 6.0})]
)
def test_alpha_has_a_head_start_once(alpha: object, wanted: object) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection="learned", alpha=alpha)
    callback = AlphaCallback(examples())
    callback.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    assert model.peft_config["default"].alpha == wanted
    callback.on_train_begin(None, SimpleNamespace(global_step=2), None, model=model)
    assert model.peft_config["default"].alpha == wanted


@pytest.mark.parametrize("head_start", [0, -1.0, float("nan")])
def test_a_head_start_above_nothing(head_start: float) -> None:
    with pytest.raises(ValueError, match="head_start must be above 0"):
        AlphaCallback(examples(), head_start=head_start)


def test_modes_come_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
