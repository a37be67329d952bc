"""Checkpoints of mask training: a Trainer's keep the logits, so that it can resume; every other save packs the mask."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from ..peft_compat.transformers_names import PREFIX_CHECKPOINT_DIR, ExportableState, default_callbacks
from .mask import GraftState

COMPLETE = "complete"  # a file that says that every rank has written its part of a checkpoint


class MaskCheckpoint(TrainerCallback, ExportableState):
    """Mark grafts as in training while a Trainer trains them, and checkpoints as complete.

    Alpha goes into `trainer_state.json`: the engines' own checkpoints hold the logits, but no config.
    """

    def __init__(self) -> None:
        self.alphas: dict[str, Any] = {}
        self._grafts: dict[str, GraftState] = {}

    def state(self) -> dict[str, Any]:
        """Alpha by adapter name, for the Trainer to keep."""
        self.alphas = {name: graft.config.alpha for name, graft in self._grafts.items()}
        return {"args": {}, "attributes": {"alphas": self.alphas}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Expect a training, which may begin with loading a checkpoint into shards."""
        for graft in _grafts(model).values():
            graft.has_trainer = True

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let checkpoints keep the logits; go on with the alpha of the one that is resumed."""
        self._grafts = _grafts(model)
        kept = state.stateful_callbacks.get(type(self).__name__, {}) if state.global_step else {}
        for name, alpha in kept.get("attributes", {}).get("alphas", {}).items():
            if name in self._grafts and alpha != "auto":
                self._grafts[name].config.alpha = alpha
                self._grafts[name].ready = True
        self._mark(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint that is about to be written over is not complete."""
        if control.should_save and state.is_world_process_zero:
            (_checkpoint(args, state) / COMPLETE).unlink(missing_ok=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait until every rank has written its part, then say so."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero and _checkpoint(args, state).is_dir():
            (_checkpoint(args, state) / COMPLETE).touch()

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let saves pack the mask again; every rank is here, so that later one can save it alone."""
        self._mark(False)
        for graft in self._grafts.values():
            graft.settle()

    def _mark(self, in_training: bool) -> None:
        for graft in self._grafts.values():
            graft.in_training = in_training


def last_checkpoint(output_dir: str | os.PathLike[str]) -> str | None:
    """Find where an interrupted mask training can go on: its last checkpoint that all ranks have finished writing.

    Args:
        output_dir: That of the `TrainingArguments`.

    Returns:
        A checkpoint's directory, for `Trainer.train(resume_from_checkpoint=...)`; None to begin at the beginning.
    """
    written = [marker.parent for marker in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{COMPLETE}")]
    steps = {int(step): path for path in written if (step := path.name.rpartition("-")[2]).isdigit()}
    return str(steps[max(steps)]) if steps else None


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _grafts(model: Any) -> dict[str, GraftState]:
    found: dict[str, GraftState] = {}
    for module in model.modules():
        states = vars(module).get("states", {})
        found |= {name: state for name, state in states.items() if isinstance(state, GraftState)}
    return found


def register_with_trainer(callback: type[TrainerCallback] = MaskCheckpoint) -> None:
    """Add a callback to those that every Trainer starts with, once."""
    callbacks = default_callbacks()
    if callback not in callbacks:
        callbacks.append(callback)
