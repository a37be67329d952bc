"""Callbacks of a Trainer that trains a mask: complete checkpoints, alpha fitted on the way, and the best mask kept."""

from __future__ import annotations

import base64
import logging
import math
import os
import warnings
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import PartialState
from torch import nn
from transformers import TrainerCallback

from ..peft_compat.transformers_names import PREFIX_CHECKPOINT_DIR
from ..tuner.backends.sharded import own_part, own_part_of, whole, whole_shape
from ..tuner.mask import GraftState
from .alpha import AlphaFit, find_head_start, fit_alpha, scaled
from .in_use import find_tuner
from .loss import LossFn

_LOG = logging.getLogger(__name__)
COMPLETE = "complete"  # a file in a checkpoint's folder, written when every rank has written its part
_ALPHA = "graft_alpha"  # the key of alpha in a Trainer's log, which its checkpoints keep
_BEST = "graft_best"  # the key of the best mask so far there, with its alpha and calibration loss


class GraftCallback(TrainerCallback):
    """Mark a Trainer's checkpoints as complete, keep alpha in its log, and settle the mask at the end.

    A Trainer needs it only for three things: `last_checkpoint` looks for the marks; DeepSpeed's and FSDP's own
    checkpoints hold mask logits, but no alpha; and one rank can save a sharded model alone only once its mask is
    settled. `AlphaCallback` does all of this too.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Go on with the alpha of the checkpoint that is resumed."""
        logged = [entry[_ALPHA] for entry in state.log_history if _ALPHA in entry] if state.global_step else []
        grafts = _graft_states(model)
        for name, alpha in (logged[-1] if logged else {}).items():
            if name in grafts:
                grafts[name].config.alpha = alpha
                grafts[name].ready = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log alpha where it has changed, and take the mark off a checkpoint that is about to be written over."""
        alphas = {name: graft.alpha for name, graft in _graft_states(model).items() if graft.config.alpha != "auto"}
        logged = [entry[_ALPHA] for entry in state.log_history if _ALPHA in entry]
        if alphas and alphas != (logged[-1] if logged else None):
            state.log_history.append({_ALPHA: alphas, "step": state.global_step})
        if state.is_world_process_zero and (control.should_save or args.save_strategy == "best"):
            (_checkpoint(args, state) / COMPLETE).unlink(missing_ok=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do the same for checkpoints at the end of an epoch."""
        GraftCallback.on_step_end(self, args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every rank has written its part, then mark the checkpoint."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and _checkpoint(args, state).is_dir():
            (_checkpoint(args, state) / COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Settle the masks while every rank is here, so that one of them can save the model later."""
        for graft in _graft_states(model).values():
            graft.settle()


class AlphaCallback(GraftCallback):
    """Let a Trainer fit mask and alpha in turns, and keep the best mask: a training that did not help changes nothing.

    Alpha is refitted `rounds` times, evenly spaced, the last at the end. The calibration loss is compared each time,
    also with that of the mask and the alpha from which the training starts; at the end the model has the best of them.

    Args:
        calibration: Batches that the Trainer does not train on, with labels unless the config's objective is
            `"donor"`; of several ranks each gives all of them, or its share.
        rounds: How often alpha is fitted during the training, at least 1.
        head_start: Largest factor on alpha when the training starts, > 0: a trained mask bears a larger scale than the
            mask it starts from, and finds better entries when it has that scale from the beginning. Smaller ones are
            tried if the graft then loses too much, see `find_head_start`.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default the config's objective: `model(**batch).loss` or `donor_loss`.

    Attributes:
        fits: The fits of alpha so far.
        losses: Calibration loss by the number of steps, where it was looked at: 0 is the start.
        helped: Whether the training lowered the calibration loss; None before its end.

    Raises:
        ValueError: `rounds` or `head_start` is out of range.
    """

    def __init__(
        self,
        calibration: Iterable[Any],
        rounds: int = 2,
        head_start: float = 3.0,
        adapter_name: str = "default",
        loss_fn: LossFn | None = None,
    ) -> None:
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds!r}. Leave the callback out instead.")
        if not head_start > 0:
            raise ValueError(f"head_start must be above 0, got {head_start!r}. Use 1 for none.")
        self.calibration = list(calibration)
        self.head_start = head_start
        self.rounds, self.adapter_name, self.loss_fn = rounds, adapter_name, loss_fn
        self.fits: list[AlphaFit] = []
        self.losses: dict[int, float] = {}
        self.helped: bool | None = None
        self._best: _Point | None = None
        self._last: _Point | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Note where the training starts, and give alpha its head start; or go on where a run is resumed."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self._best, self._last, self.helped = None, None, None
        if state.global_step:
            self._best = _recall(state, model, self.adapter_name)
            return
        options: dict[str, Any] = {"adapter_name": self.adapter_name, "loss_fn": self.loss_fn}
        graft = find_tuner(model).states[self.adapter_name]
        if graft.config.alpha == "auto":
            fit_alpha(model, self.calibration, show_progress_bar=False, **options)
        found = find_head_start(model, self.calibration, self.head_start, **options)
        self.losses = {0: found.loss}
        self._keep(state, model, found.loss)
        graft.config.alpha = scaled(graft.alpha, found.factor)

    def _keep(self, state: Any, model: Any, loss: float) -> None:
        """Keep the present mask and alpha as the best ones."""
        graft = find_tuner(model).states[self.adapter_name]
        logits = {name: _copy(values) for name, values in graft.logits().items()}
        others = {name: _copy(values) for name, values in _beside_masks(model)}
        self._best = _Point(state.global_step, loss, graft.alpha, logits, others)
        _note(state, self._best, {name: graft.mask(name) for name in graft.logits()})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit alpha where a round ends."""
        ends = {max(1, state.max_steps * (turn + 1) // self.rounds) for turn in range(self.rounds)}
        if state.global_step in ends:
            self._fit(state, model)
        super().on_step_end(args, state, control, model=model, **kwargs)

    def _fit(self, state: Any, model: Any) -> None:
        options: dict[str, Any] = {"adapter_name": self.adapter_name, "loss_fn": self.loss_fn}
        fit = fit_alpha(model, self.calibration, show_progress_bar=False, **options)
        self.fits.append(fit)
        self.losses[state.global_step] = fit.loss
        self._last = _Point(state.global_step, fit.loss, fit.alpha)
        if self._best is None or fit.loss < self._best.loss:
            self._keep(state, model, fit.loss)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit alpha if the training has ended early, go back to the best mask and alpha, and say so."""
        if not args.load_best_model_at_end:  # that has chosen already
            if self._last is None or self._last.step != state.global_step:
                self._fit(state, model)
            self._go_back(model)
        super().on_train_end(args, state, control, model=model, **kwargs)

    def _go_back(self, model: Any) -> None:
        best, last = self._best, self._last
        if best is None or last is None:
            return
        self.helped = best.step > 0
        if best.step == last.step:
            return
        graft = find_tuner(model).states[self.adapter_name]
        held = graft.logits()
        for name, values in best.logits.items():
            own_part(held[name]).copy_(own_part_of(held[name], values))
        for name, parameter in _beside_masks(model):
            own_part(parameter).copy_(own_part_of(parameter, best.others[name]))
        graft.config.alpha = best.alpha
        graft.invalidate()
        _LOG.warning(
            "%s: the calibration loss is %.4g after %d steps, and was %.4g %s. %s",
            "The end of the training did not help" if self.helped else "Training the mask did not help",
            last.loss,
            last.step,
            best.loss,
            f"after {best.step}" if self.helped else "with the mask and alpha that it started from",
            "The best mask and alpha are kept. Try more rows, fewer epochs, or a lower learning rate.",
        )


@dataclass(frozen=True)
class _Point:
    """A point of a training.

    Args:
        step: Steps so far.
        loss: Calibration loss.
        alpha: The scale.
        logits: Logits of the mask by tensor name, whole and on the CPU.
        others: What trains beside them, such as a head that the donor lacks, by parameter name.
    """

    step: int
    loss: float
    alpha: Any
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    others: dict[str, torch.Tensor] = field(default_factory=dict)


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return whole(parameter).to("cpu", copy=True)


def _beside_masks(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Find what trains beside masks, by name."""
    named = model.named_parameters()
    return [(name, each) for name, each in named if each.requires_grad and ".graft_patch." not in name]


def _note(state: Any, point: _Point, masks: dict[str, torch.Tensor]) -> None:
    """Note the best point in a Trainer's log, where checkpoints keep it: a bit for each candidate."""
    state.log_history[:] = [entry for entry in state.log_history if _BEST not in entry]
    if masks:
        bits = torch.cat([masks[name].cpu() for name in sorted(masks)]).numpy()
        mask = base64.b64encode(zlib.compress(numpy.packbits(bits).tobytes())).decode()
        noted = {"loss": point.loss, "alpha": point.alpha, "mask": mask}
        state.log_history.append({_BEST: noted, "step": point.step})


def _recall(state: Any, model: nn.Module, adapter_name: str) -> _Point | None:
    """Read the best point from a Trainer's log; None where there is none, or where more than the mask trains."""
    noted = next((entry for entry in state.log_history if _BEST in entry), None)
    if noted is None or _beside_masks(model):
        return None
    shapes = {name: whole_shape(each) for name, each in find_tuner(model).states[adapter_name].logits().items()}
    sizes = [math.prod(shapes[name]) for name in sorted(shapes)]
    packed = numpy.frombuffer(zlib.decompress(base64.b64decode(noted[_BEST]["mask"])), dtype=numpy.uint8)
    bits = torch.from_numpy(numpy.unpackbits(packed, count=sum(sizes))).float()
    # Logits of 1 in the mask and 0 elsewhere give this very mask.
    logits = {name: part.clone() for name, part in zip(sorted(shapes), bits.split(sizes), strict=True)}
    return _Point(noted["step"], noted[_BEST]["loss"], noted[_BEST]["alpha"], logits)


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the checkpoint from which an interrupted mask training can go on: the last that all ranks have written.

    Args:
        output_dir: That of the `TrainingArguments` of a Trainer with a `GraftCallback` or an `AlphaCallback`.

    Returns:
        A checkpoint's directory, for `Trainer.train(resume_from_checkpoint=...)`; None to begin at the beginning.

    Warns:
        UserWarning: There are checkpoints, but none is marked as complete.
    """
    folders = {
        int(step): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (step := path.name.rpartition("-")[2]).isdigit() and path.is_dir()
    }
    complete = [step for step, path in folders.items() if (path / COMPLETE).is_file()]
    if folders and not complete:
        warnings.warn(
            f"No checkpoint in {os.fspath(output_dir)!r} is marked as complete, although there are {sorted(folders)}: "
            "the run was killed while it wrote the first one, or its Trainer had no GraftCallback. To go on from one "
            "of them nevertheless, name it in resume_from_checkpoint.",
            stacklevel=2,
        )
    return str(folders[max(complete)]) if complete else None


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _graft_states(model: Any) -> dict[str, GraftState]:
    """States of all grafts in the model, by adapter name."""
    found: dict[str, GraftState] = {}
    for module in model.modules():
        states = vars(module).get("states", {})
        found |= {name: state for name, state in states.items() if isinstance(state, GraftState)}
    return found
