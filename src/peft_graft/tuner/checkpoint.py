"""Checkpoints of mask training: a Trainer's keep the logits, so that it can resume; every other save packs the mask."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .mask import GraftState


class MaskCheckpoint(TrainerCallback):
    """Mark grafts as in training while a Trainer trains them."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let checkpoints keep the logits."""
        _mark(model, True)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Let saves pack the mask again; every rank is here, so that later one can save it alone."""
        _mark(model, False)
        for state in _states(model):
            state.settle()


def _states(model: Any) -> list[GraftState]:
    found = [state for module in model.modules() for state in vars(module).get("states", {}).values()]
    return list({id(state): state for state in found if isinstance(state, GraftState)}.values())


def _mark(model: Any, in_training: bool) -> None:
    for state in _states(model):
        state.in_training = in_training


def register_with_trainer(callback: type[TrainerCallback] = MaskCheckpoint) -> None:
    """Add a callback to those that every Trainer starts with, once."""
    from transformers import trainer  # imported late: only who trains needs it

    if callback not in trainer.DEFAULT_CALLBACKS:
        callbacks: list[type[TrainerCallback]] = trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
        callbacks.append(callback)
