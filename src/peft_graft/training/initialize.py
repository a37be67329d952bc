"""What a graft needs around a Trainer or an Accelerate loop: scoring on data, and the scale fitted by the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback

from ..selection.rules import get_rule
from ..tuner import GraftModel
from ..tuner.backends import collectives
from ..tuner.backends.sharded import is_sharded
from ..tuner.trainer import last_checkpoint as last_checkpoint
from .measure import LossFn, batch_size, default_loss, evaluating, mean_loss, measure

_STEP = math.log(3.0)
_LIMIT = math.log(1e5)
_REFINEMENTS = 4
_TENSOR_STEPS = 15
_HELD_OUT = 4  # every fourth batch fits alpha where no calibration data is given


@dataclass(frozen=True)
class AlphaFit:
    """What `fit_alpha` found.

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


def find_tuner(model: nn.Module) -> GraftModel:
    """Find the graft model inside a PeftModel (or a wrapper around one).

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        if isinstance(module, GraftModel):
            return module
    raise ValueError(
        f"model must contain a graft, got {type(model).__name__}. Wrap it with get_peft_model(base, GraftConfig(...))."
    )


def initialize_graft(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    calibration: Iterable[Any] | None = None,
    adapter_name: str = "default",
    loss_fn: LossFn = default_loss,
    steps: int = 10,
    progress: bool = True,
) -> AlphaFit | None:
    """Complete a graft that waits for data: score the entries, make the mask, and fit `alpha="auto"`.

    Follows PEFT's convention for data-driven initialisation (`initialize_lora_eva_weights`). For a learned mask only
    alpha is fitted, for the mask that training starts from; fit it again with `fit_alpha` after training.

    Under a launcher every rank calls this, with its share of the batches or all the same, and gets the same mask.

    Args:
        model: From `get_peft_model(base, GraftConfig(...))`; not yet sharded by FSDP or ZeRO-3.
        dataloader: Batches with labels, best of examples that the donor was not trained on.
        calibration: Batches that alpha is fitted on. Default: all of `dataloader` where the mask is made without
            data, else every fourth batch of it, which the mask then does not see.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default `model(**batch).loss`.
        steps: Steps of `selection="sigmoid"`, each one pass over the data.
        progress: Show progress bars.

    Returns:
        The fit of alpha, or None where alpha is a number.

    Raises:
        ValueError: No batches, or fewer than two where some must be held out; an adapter that is merged or not active;
            sharded parameters; ranks that found different masks.
    """
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    config, state = tuner.peft_config[adapter_name], tuner.states[adapter_name]
    _require_in_use(tuner, adapter_name)
    rule = get_rule(config.selection)
    batches, held_out = list(dataloader), None if calibration is None else list(calibration)
    (fewest, most), (_, most_held_out) = collectives.extremes([len(batches), 1 if held_out is None else len(held_out)])
    if not most or not most_held_out:
        raise ValueError("dataloader must hold at least one batch, got none. Check the dataset.")
    wants_held_out = config.alpha == "auto" or rule.kind == "procedure"
    if held_out is None:
        held_out = batches
        if rule.needs_data and wants_held_out:
            if fewest < 2:
                raise ValueError(
                    f"dataloader must hold at least 2 batches to hold one out for alpha, got {fewest}. "
                    "Use smaller batches or pass calibration=..."
                )
            kept = set(range(_HELD_OUT - 1, len(batches), _HELD_OUT)) or {len(batches) - 1}
            held_out = [batch for turn, batch in enumerate(batches) if turn in kept]
            batches = [batch for turn, batch in enumerate(batches) if turn not in kept]
    if rule.kind == "procedure":
        budget = sum(state.budget.values()) if isinstance(state.budget, dict) else state.budget
        options = {"budget": budget, "steps": steps, "validation": held_out, "seed": config.seed}
        mask = measure(model, tuner, adapter_name, str(rule.evidence), batches, loss_fn, progress, **options)
        tuner.install_mask(adapter_name, {name: part.flatten().nonzero().flatten() for name, part in mask.items()})
    elif rule.needs_data:
        measured = measure(model, tuner, adapter_name, str(rule.evidence), batches, loss_fn, progress)
        tuner.make_patch(adapter_name, measured, progress=progress)
    _require_same_mask(tuner, adapter_name)
    if config.alpha != "auto":
        state.ready = True
        return None
    return fit_alpha(model, held_out, adapter_name=adapter_name, loss_fn=loss_fn, progress=progress)


def fit_alpha(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str = "default",
    loss_fn: LossFn = default_loss,
    scope: str | None = None,
    progress: bool = True,
) -> AlphaFit:
    """Fit the scale of a patch by the loss: argmin over alpha of L(base + alpha * mask * delta).

    A bracket grows by factors of 3 from the present alpha in the direction in which the loss falls, and is refined by
    golden sections of log(alpha); alpha = 1 is always tried too, so the calibration loss is never above its.
    One per tensor is found by gradient steps on all log(alpha) from there.

    Args:
        model: A model with a complete mask.
        dataloader: Calibration batches with labels: neither the mask's training data nor test data.
        adapter_name: Name of the adapter; its config records the result.
        loss_fn: Mean loss of a batch; default `model(**batch).loss`.
        scope: `"global"` or `"tensor"`; default the config's `alpha_scope`.
        progress: Show a progress bar.

    Returns:
        The fit.

    Raises:
        ValueError: No batches, an adapter that is merged or not active, or a loss that is not finite at alpha = 1;
            ranks of a sharded model that have different numbers of batches.
    """
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    config, state = tuner.peft_config[adapter_name], tuner.states[adapter_name]
    batches = list(dataloader)
    ((fewest, most),) = collectives.extremes([len(batches)])
    if not most:
        raise ValueError("dataloader must hold at least one batch, got none. Check the calibration dataset.")
    if fewest != most and any(is_sharded(parameter) for parameter in model.parameters()):
        raise ValueError(
            f"dataloader must hold as many batches on every rank of a sharded model, got {fewest} to {most}. "
            "Give every rank all of them, or drop the last."
        )
    _require_in_use(tuner, adapter_name)
    with evaluating(model), tqdm(desc="fitting alpha", unit="pass", disable=not progress, leave=False) as bar:

        def loss_at(log_alpha: float) -> float:
            state.trial = math.exp(log_alpha)
            loss = mean_loss(model, batches, loss_fn)
            bar.update()
            bar.set_postfix(alpha=f"{state.trial:.3g}", loss=f"{loss:.4f}")
            return loss if math.isfinite(loss) else math.inf

        current = state.alpha if isinstance(state.alpha, int | float) and state.alpha > 0 else 1.0
        try:
            seen = minimise(loss_at, math.log(current))
            if not math.isfinite(seen[0.0]):
                raise ValueError(f"loss must be finite at alpha = 1, got {seen[0.0]!r}. Check the calibration data.")
            best = min(seen, key=lambda log_alpha: (seen[log_alpha], abs(log_alpha)))
            fit = AlphaFit(math.exp(best), seen[best], seen[0.0], len(seen))
            if (scope or config.alpha_scope) == "tensor":
                fit = _fit_per_tensor(model, tuner, adapter_name, batches, loss_fn, fit, bar)
        finally:
            state.trial = None
    config.alpha = fit.alpha
    state.ready = True
    state.settle()
    return fit


def _require_in_use(tuner: GraftModel, adapter_name: str) -> None:
    """Refuse to look at the loss of a model that would not show the adapter, or not the base."""
    if adapter_name not in tuner.active_adapters:
        raise ValueError(
            f"adapter_name must be an active adapter, got {adapter_name!r} while {tuner.active_adapters} are active. "
            f"Call model.set_adapter({adapter_name!r}) first."
        )
    if any(layer.merged for layer in tuner._layers()):
        raise ValueError("model must be unmerged, got a merged one. Call model.unmerge_adapter() first.")


def _require_same_mask(tuner: GraftModel, adapter_name: str) -> None:
    """Refuse masks that differ between the ranks: training would go on with a mixture of them."""
    digest = 0
    for name, (layer, param) in tuner.targets(adapter_name).items():
        slot, key = layer.slot(adapter_name), layer.keys[param]
        if key in slot.params:
            digest = crc32(slot.indices(key).cpu().numpy().tobytes(), crc32(name.encode(), digest))
    ((low, high),) = collectives.extremes([digest])
    if low != high:
        raise ValueError(
            f"mask must be the same on every rank, got digests from {low:08x} to {high:08x}. "
            "Give every rank the same base, donor and config."
        )


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
    state = tuner.states[adapter_name]
    names = [
        name
        for name, (layer, param) in tuner.targets(adapter_name).items()
        if layer.keys[param] in layer.slot(adapter_name).params
    ]
    device = next(model.parameters()).device
    logs = torch.full((len(names),), math.log(float(start.alpha)), device=device, requires_grad=True)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam([logs], lr=0.1)
    total = int(collectives.total(torch.tensor(sum(batch_size(batch) for batch in batches))))
    best_loss, best = start.loss, logs.detach().clone()
    for _ in range(_TENSOR_STEPS):
        loss_sum, logs.grad = 0.0, torch.zeros_like(logs)
        for batch in batches:
            state.trial = dict(zip(names, logs.exp().unbind(), strict=True))
            loss = loss_fn(model, send_to_device(batch, device)) * (batch_size(batch) / total)
            logs.grad += torch.autograd.grad(loss, logs)[0]  # and nobody else's: a head may train with the mask
            loss_sum += float(loss.detach())
        bar.update()
        logs.grad = collectives.total(logs.grad)
        loss_sum = float(collectives.total(torch.tensor(loss_sum, dtype=torch.float64)))
        if loss_sum < best_loss:
            best_loss, best = loss_sum, logs.detach().clone()
        optimizer.step()
    alphas = dict(zip(names, best.exp().tolist(), strict=True))
    return AlphaFit(alphas, best_loss, start.loss_at_one, start.passes + 3 * _TENSOR_STEPS)


class AlphaCallback(TrainerCallback):
    """Let a Trainer fit mask and alpha in turns: refit alpha `rounds` times, evenly spaced, the last at the end.

    Args:
        calibration: Batches with labels that the Trainer does not train on; of several ranks each gives all of them,
            or its share.
        rounds: How often alpha is fitted during the training.
        head_start: Factor on alpha when the training starts, > 0. A trained mask bears a larger scale than the mask it
            starts from, and finds better entries when it has that scale from the beginning.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default `model(**batch).loss`.
    """

    def __init__(
        self,
        calibration: Iterable[Any],
        rounds: int = 2,
        head_start: float = 3.0,
        adapter_name: str = "default",
        loss_fn: LossFn = default_loss,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds!r}. Leave the callback out instead.")
        if not head_start > 0:
            raise ValueError(f"head_start must be above 0, got {head_start!r}. Use 1 for none.")
        self.calibration = list(calibration)
        self.head_start = head_start
        self.rounds, self.adapter_name, self.loss_fn = rounds, adapter_name, loss_fn
        self.fits: list[AlphaFit] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give alpha its head start; a resumed training has had it."""
        tuner = find_tuner(model)
        if state.global_step == 0:
            alpha = tuner.states[self.adapter_name].alpha
            scaled = (
                {name: value * self.head_start for name, value in alpha.items()} if isinstance(alpha, dict) else None
            )
            tuner.peft_config[self.adapter_name].alpha = scaled or alpha * self.head_start

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit alpha where a round ends."""
        ends = {max(1, state.max_steps * (turn + 1) // self.rounds) for turn in range(self.rounds)}
        if state.global_step in ends:
            options: dict[str, Any] = {"adapter_name": self.adapter_name, "loss_fn": self.loss_fn, "progress": False}
            self.fits.append(fit_alpha(model, self.calibration, **options))
