"""Fit the scale of a patch by the loss on calibration data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from huggingface_hub.utils import tqdm
from torch import nn

from ..tuner import GraftModel
from ..tuner.backends import collectives
from ..tuner.backends.sharded import is_sharded
from .donor_objective import objective_loss
from .in_use import find_tuner, require_in_use
from .loss import LossFn, batch_size, evaluating, mean_loss

_STEP = math.log(3.0)
_LIMIT = math.log(1e5)
_REFINEMENTS = 4
_TENSOR_STEPS = 15
_BACKTRACKING = (1.0, 0.75, 0.5, 0.25)  # powers of the largest head start

Alpha = Any  # a number, or one by tensor name


@dataclass(frozen=True)
class AlphaFit:
    """Result of `fit_alpha`.

    Args:
        alpha: The scale, or one per tensor name.
        loss: Calibration loss there.
        loss_at_one: Calibration loss at alpha = 1; never below `loss`.
        passes: Forward passes over the calibration data (one with a backward pass counts three).
    """

    alpha: float | dict[str, float]
    loss: float
    loss_at_one: float
    passes: int


@dataclass(frozen=True)
class HeadStart:
    """Result of `find_head_start`.

    Args:
        factor: The factor on alpha.
        loss: Calibration loss before, with the factor 1.
        loss_of_base: Calibration loss of the base.
    """

    factor: float
    loss: float
    loss_of_base: float


def fit_alpha(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str = "default",
    loss_fn: LossFn | None = None,
    alpha_scope: str | None = None,
    show_progress_bar: bool = True,
) -> AlphaFit:
    """Fit the scale of a patch by the loss: argmin over alpha of L(base + alpha * mask * delta).

    A bracket grows by factors of 3 from the present alpha in the direction in which the loss falls, and is refined by
    golden sections of log(alpha); alpha = 1 is always tried too, so the calibration loss is never above its.
    One per tensor is found by gradient steps on all log(alpha) from there.

    Under a launcher every rank calls this, with its share of the batches or all the same, and gets the same fit.

    Args:
        model: A model with a complete mask.
        dataloader: Calibration batches, with labels unless the config's objective is `"donor"`: neither the mask's
            training data nor test data.
        adapter_name: Name of the adapter; its config records the result.
        loss_fn: Mean loss of a batch; default the config's objective: `model(**batch).loss` or `donor_loss`.
        alpha_scope: `"global"` or `"tensor"`; default the config's.
        show_progress_bar: Show a progress bar.

    Returns:
        The fit.

    Raises:
        ValueError: No batches, an adapter that is merged or not active, or a loss that is not finite at alpha = 1;
            ranks of a sharded model that have different numbers of batches.
    """
    collectives.join()
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    config, state = tuner.peft_config[adapter_name], tuner.states[adapter_name]
    batches = list(dataloader)
    _require_batches(model, batches)
    require_in_use(tuner, adapter_name)
    loss_fn = objective_loss(model, batches, adapter_name, loss_fn, show_progress_bar)
    with evaluating(model), tqdm(desc="fitting alpha", unit="pass", disable=not show_progress_bar, leave=False) as bar:
        try:
            fit = _fit_one(model, tuner, adapter_name, batches, loss_fn, bar)
            if (alpha_scope or config.alpha_scope) == "tensor":
                fit = _fit_per_tensor(model, tuner, adapter_name, batches, loss_fn, fit, bar)
        finally:
            state.trial = None
    config.alpha = fit.alpha
    state.ready = True
    state.settle()
    return fit


def _require_batches(model: nn.Module, batches: list[Any]) -> None:
    """Refuse calibration data that some ranks lack."""
    ((fewest, most),) = collectives.all_reduce_min_max([len(batches)])
    if not most:
        raise ValueError("dataloader must hold at least one batch, got none. Check the calibration dataset.")
    if fewest != most and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"dataloader must hold as many batches on every rank of a sharded model, got {fewest} to {most}. "
            "Give every rank all of them, or drop the last."
        )


def _fit_one(
    model: nn.Module, tuner: GraftModel, adapter_name: str, batches: list[Any], loss_fn: LossFn, bar: tqdm
) -> AlphaFit:
    """Find the one best alpha for all tensors."""
    state = tuner.states[adapter_name]

    def loss_at(log_alpha: float) -> float:
        loss = _loss_at(model, tuner, adapter_name, batches, loss_fn, math.exp(log_alpha))
        bar.update()
        bar.set_postfix(alpha=f"{math.exp(log_alpha):.3g}", loss=f"{loss:.4f}")
        return loss

    current = state.alpha if isinstance(state.alpha, int | float) and state.alpha > 0 else 1.0
    seen = minimise(loss_at, math.log(current))
    if not math.isfinite(seen[0.0]):
        raise ValueError(f"loss must be finite at alpha = 1, got {seen[0.0]!r}. Check the calibration data.")
    best = min(seen, key=lambda log_alpha: (seen[log_alpha], abs(log_alpha)))
    return AlphaFit(math.exp(best), seen[best], seen[0.0], len(seen))


def _loss_at(
    model: nn.Module, tuner: GraftModel, adapter_name: str, batches: list[Any], loss_fn: LossFn, alpha: Alpha
) -> float:
    """Compute the loss at another alpha than the config's; infinity where it is not finite."""
    state = tuner.states[adapter_name]
    before, state.trial = state.trial, alpha
    try:
        with tuner.applied():  # written once for all batches
            loss = mean_loss(model, batches, loss_fn)
    finally:
        state.trial = before
    return loss if math.isfinite(loss) else math.inf


def scaled(alpha: Alpha, factor: float) -> Alpha:
    """Multiply alpha, or that of each tensor."""
    return {name: value * factor for name, value in alpha.items()} if isinstance(alpha, dict) else alpha * factor


def find_head_start(
    model: nn.Module,
    batches: list[Any],
    largest: float,
    *,
    adapter_name: str = "default",
    loss_fn: LossFn | None = None,
) -> HeadStart:
    """Find how far alpha may go beyond its fit before a mask is trained, by a backtracking line search.

    A trained mask bears a larger scale than the mask that it starts from, but a scale at which the graft is worse than
    the base teaches it nothing. So the factor is the largest of f, f^(3/4), f^(1/2), f^(1/4) and 1 that keeps half of
    what the patch gains: L(factor * alpha) <= (L(alpha) + L(0)) / 2.

    Args:
        model: A model with a complete mask and alpha.
        batches: Calibration batches.
        largest: f, the factor to begin with, > 0.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default the config's objective.

    Returns:
        The factor, and the losses at alpha and at the base.
    """
    collectives.join()
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    _require_batches(model, batches)
    require_in_use(tuner, adapter_name)
    alpha = tuner.states[adapter_name].alpha
    loss_fn = objective_loss(model, batches, adapter_name, loss_fn, show_progress_bar=False)
    with evaluating(model):
        loss, loss_of_base = (
            _loss_at(model, tuner, adapter_name, batches, loss_fn, each) for each in (alpha, scaled(alpha, 0.0))
        )
        for power in _BACKTRACKING:
            factor = largest**power
            found = _loss_at(model, tuner, adapter_name, batches, loss_fn, scaled(alpha, factor))
            if found <= (loss + loss_of_base) / 2:
                return HeadStart(factor, loss, loss_of_base)
    return HeadStart(1.0, loss, loss_of_base)


def minimise(loss_at: Callable[[float], float], start: float = 0.0) -> dict[float, float]:
    """Look for the minimum of a function of log(alpha) in about a dozen evaluations.

    Args:
        loss_at: The function; may return infinity.
        start: Where to start the bracket.

    Returns:
        Every point seen, with its value; 0 is always among them.
    """
    seen: dict[float, float] = {}

    def at(point: float) -> float:
        if point not in seen:
            seen[point] = loss_at(point)
        return seen[point]

    at(0.0)
    direction = _STEP if at(start + _STEP) < at(start) else -_STEP
    edge = max(start, start + direction)
    while abs(edge) < _LIMIT and at(edge + direction) < at(edge):
        edge += direction
    centre = min(seen, key=lambda point: seen[point])
    low, high = centre - _STEP, centre + _STEP
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(_REFINEMENTS):
        if at(left) < at(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return seen


def _fit_per_tensor(
    model: nn.Module,
    tuner: GraftModel,
    adapter_name: str,
    batches: list[Any],
    loss_fn: LossFn,
    start: AlphaFit,
    bar: tqdm,
) -> AlphaFit:
    """Find one alpha for each tensor by steps of Adam on all log(alpha), from the best common one."""
    state = tuner.states[adapter_name]
    names = [
        name
        for name, (layer, param) in tuner.targets(adapter_name).items()
        if layer.keys[param] in layer.slot(adapter_name).params
    ]
    device = next(model.parameters()).device
    logs = torch.full((len(names),), math.log(float(start.alpha)), device=device, requires_grad=True)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([logs], lr=0.1)
    examples = int(collectives.all_reduce_sum(torch.tensor(sum(batch_size(batch) for batch in batches))))
    best_loss, best = start.loss, logs.detach().clone()
    for _ in range(_TENSOR_STEPS):
        loss_sum, logs.grad = 0.0, torch.zeros_like(logs)
        for batch in batches:
            state.trial = dict(zip(names, logs.exp().unbind(), strict=True))
            loss = loss_fn(model, send_to_device(batch, device)) * (batch_size(batch) / examples)
            logs.grad += torch.autograd.grad(loss, logs)[0]  # and nobody else's: a head may train with the mask
            loss_sum += float(loss.detach())
        bar.update()
        logs.grad = collectives.all_reduce_sum(logs.grad)
        loss_sum = float(collectives.all_reduce_sum(torch.tensor(loss_sum, dtype=torch.float64)))
        if loss_sum < best_loss:
            best_loss, best = loss_sum, logs.detach().clone()
        optimizer.step()
    alphas = dict(zip(names, best.exp().tolist(), strict=True))
    return AlphaFit(alphas, best_loss, start.loss_at_one, start.passes + 3 * _TENSOR_STEPS)
