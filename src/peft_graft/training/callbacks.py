"""Callbacks of a Trainer that trains a mask: complete checkpoints, and alpha fitted on the way."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..peft_compat.transformers_names import PREFIX_CHECKPOINT_DIR
from ..tuner.mask import GraftState
from .alpha import AlphaFit, fit_alpha
from .in_use import find_tuner
from .loss import LossFn

COMPLETE = "complete"  # a file in a checkpoint's folder, written when every rank has written its part
_ALPHA = "graft_alpha"  # the key of alpha in a Trainer's log, which its checkpoints keep


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
    """Let a Trainer fit mask and alpha in turns: refit alpha `rounds` times, evenly spaced, the last at the end.

    Args:
        calibration: Batches with labels that the Trainer does not train on; of several ranks each gives all of them,
            or its share.
        rounds: How often alpha is fitted during the training, at least 1.
        head_start: Factor on alpha when the training starts, > 0. A trained mask bears a larger scale than the mask it
            starts from, and finds better entries when it has that scale from the beginning.
        adapter_name: Name of the adapter.
        loss_fn: Mean loss of a batch; default `model(**batch).loss`.

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

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Give alpha its head start; a resumed training has had it."""
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if state.global_step == 0:
            tuner = find_tuner(model)
            alpha = tuner.states[self.adapter_name].alpha
            tuner.peft_config[self.adapter_name].alpha = (
                {name: value * self.head_start for name, value in alpha.items()}
                if isinstance(alpha, dict)
                else alpha * self.head_start
            )

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Fit alpha where a round ends."""
        ends = {max(1, state.max_steps * (turn + 1) // self.rounds) for turn in range(self.rounds)}
        if state.global_step in ends:
            options: dict[str, Any] = {"adapter_name": self.adapter_name, "loss_fn": self.loss_fn}
            self.fits.append(fit_alpha(model, self.calibration, show_progress_bar=False, **options))
        super().on_step_end(args, state, control, model=model, **kwargs)


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
