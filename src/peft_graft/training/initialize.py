"""Complete a graft that waits for data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast
from zlib import crc32

from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..selection.rules import get_rule
from ..tuner import GraftModel
from ..tuner.backends import collectives
from .alpha import AlphaFit, fit_alpha
from .donor_objective import objective_loss
from .in_use import find_tuner, require_in_use
from .loss import LossFn
from .measure import measure
from .procedure import sigmoid_mask

_HELD_OUT = 4  # every fourth batch fits alpha where no calibration data is given


def initialize_graft(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    calibration: Iterable[Any] | None = None,
    adapter_name: str = "default",
    loss_fn: LossFn | None = None,
    steps: int = 10,
    show_progress_bar: bool = True,
) -> AlphaFit | None:
    """Complete a graft that waits for data: score the entries, make the mask, and fit `alpha="auto"`.

    Follows PEFT's convention for data-driven initialisation (`initialize_lora_eva_weights`). For a learned mask only
    alpha is fitted, for the mask that training starts from; fit it again with `fit_alpha` after training.

    Under a launcher every rank calls this, with its share of the batches or all the same, and gets the same mask.

    Args:
        model: From `get_peft_model(base, GraftConfig(...))`; not yet sharded by FSDP or ZeRO-3.
        dataloader: Batches, with labels unless the config's objective is `"donor"`; best of examples that the donor was
            not trained on.
        calibration: Batches that alpha is fitted on. Default: all of `dataloader` where the mask is made without
            data, else every fourth batch of it, which the mask then does not see.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default the config's objective: `model(**batch).loss` or `donor_loss`.
        steps: Steps of `selection="sigmoid"`, each one pass over the data.
        show_progress_bar: Show progress bars.

    Returns:
        The fit of alpha, or None where alpha is a number.

    Raises:
        ValueError: No batches, or fewer than two where some must be held out; an adapter that is merged or not active;
            sharded parameters; ranks that found different masks.
    """
    collectives.join()
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    config, state = tuner.peft_config[adapter_name], tuner.states[adapter_name]
    require_in_use(tuner, adapter_name)
    batches, held_out = _share_out(dataloader, calibration, config)
    seen = [*batches, *held_out] if held_out is not batches else batches
    loss_fn = objective_loss(model, seen, adapter_name, loss_fn, show_progress_bar)
    rule = get_rule(config.selection)
    if rule.kind == "procedure":
        mask = sigmoid_mask(
            model,
            tuner,
            adapter_name,
            batches,
            validation=held_out,
            budget=cast(int, state.budget),  # a procedure has one for all tensors
            steps=steps,
            seed=config.seed,
            loss_fn=loss_fn,
            show_progress_bar=show_progress_bar,
        )
        tuner.install_mask(adapter_name, {name: part.flatten().nonzero().flatten() for name, part in mask.items()})
    elif rule.kind == "scored":
        measured = measure(model, tuner, adapter_name, str(rule.evidence), batches, loss_fn, show_progress_bar)
        tuner.build_patch(adapter_name, measured, show_progress_bar=show_progress_bar)
    _require_same_mask(tuner, adapter_name)
    if config.alpha != "auto":
        state.ready = True
        return None
    return fit_alpha(model, held_out, adapter_name=adapter_name, loss_fn=loss_fn, show_progress_bar=show_progress_bar)


def _share_out(
    dataloader: Iterable[Any], calibration: Iterable[Any] | None, config: Any
) -> tuple[list[Any], list[Any]]:
    """Share the batches out between the mask, and alpha or the choice among masks.

    Returns:
        Batches for the mask, and batches for the rest.

    Raises:
        ValueError: There are too few.
    """
    batches, held_out = list(dataloader), None if calibration is None else list(calibration)
    (fewest, most), (_, most_held_out) = collectives.all_reduce_min_max(
        [len(batches), 1 if held_out is None else len(held_out)]
    )
    if not most or not most_held_out:
        raise ValueError("dataloader must hold at least one batch, got none. Check the dataset.")
    rule = get_rule(config.selection)
    if held_out is not None:
        return batches, held_out
    if not rule.needs_data or not (config.alpha == "auto" or rule.kind == "procedure"):
        return batches, batches
    if fewest < 2:
        raise ValueError(
            f"dataloader must hold at least 2 batches to hold one out for alpha, got {fewest}. "
            "Use smaller batches or pass calibration=..."
        )
    kept = set(range(_HELD_OUT - 1, len(batches), _HELD_OUT)) or {len(batches) - 1}
    parts: tuple[list[Any], list[Any]] = [], []
    for turn, batch in enumerate(batches):
        parts[turn in kept].append(batch)
    return parts


def _require_same_mask(tuner: GraftModel, adapter_name: str) -> None:
    """Refuse masks that differ between the ranks: training would go on with a mixture of them."""
    digest = 0
    for name, (layer, param) in tuner.targets(adapter_name).items():
        slot, key = layer.slot(adapter_name), layer.keys[param]
        if key in slot.params:
            digest = crc32(slot.indices(key).cpu().numpy().tobytes(), crc32(name.encode(), digest))
    ((low, high),) = collectives.all_reduce_min_max([digest])
    if low != high:
        raise ValueError(
            f"mask must be the same on every rank, got digests from {low:08x} to {high:08x}. "
            "Give every rank the same base, donor and config."
        )
