"""Callbacks of a Trainer: alpha fitted in turns with the mask, and complete checkpoints."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from batches import regression
from grafts import MLP, graft
from learning import Rows, learner, trainer
from models import perturbed
from peft_graft import AlphaCallback
from peft_graft.training import callbacks
from peft_graft.training.callbacks import COMPLETE, GraftCallback, last_checkpoint


@pytest.mark.parametrize(
    ("rounds", "steps", "ends"), [(1, 10, [10]), (2, 10, [5, 10]), (3, 10, [3, 6, 10]), (9, 2, [1, 2])]
)
def test_alpha_is_fitted_at_the_end_of_every_round(
    rounds: int, steps: int, ends: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []
    monkeypatch.setattr(callbacks, "fit_alpha", lambda model, data, **options: fitted.append((model, data, options)))
    callback = AlphaCallback(iter(regression()), rounds=rounds, adapter_name="skill")
    model, arguments = MLP(), TrainingArguments(str(tmp_path), report_to="none")
    for step in range(1, steps + 1):
        before = len(fitted)
        callback.on_step_end(arguments, TrainerState(global_step=step, max_steps=steps), TrainerControl(), model=model)
        assert (len(fitted) > before) == (step in ends)
    assert len(callback.fits) == len(ends)
    given, data, options = fitted[-1]
    assert given is model and len(data) == 3 and options["adapter_name"] == "skill"


def test_a_round_at_least() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0. Leave the callback out"):
        AlphaCallback(regression(), rounds=0)


@pytest.mark.parametrize(
    ("alpha", "wanted"), [("auto", 3.0), (2.0, 6.0), ({"first.weight": 2.0}, {"first.weight": 6.0})]
)
def test_alpha_has_a_head_start_once(alpha: object, wanted: object) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection="learned", alpha=alpha)
    callback = AlphaCallback(regression())
    callback.on_train_begin(None, TrainerState(global_step=0), TrainerControl(), model=model)
    assert model.peft_config["default"].alpha == wanted
    callback.on_train_begin(None, TrainerState(global_step=2), TrainerControl(), model=model)
    assert model.peft_config["default"].alpha == wanted


@pytest.mark.parametrize("head_start", [0, -1.0, float("nan")])
def test_a_head_start_above_nothing(head_start: float) -> None:
    with pytest.raises(ValueError, match="head_start must be above 0"):
        AlphaCallback(regression(), head_start=head_start)


def test_only_complete_checkpoints_are_resumed(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "none") is None
    for step in (2, 10, 9, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step < 12:
            (tmp_path / f"checkpoint-{step}" / COMPLETE).touch()
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-best" / COMPLETE).touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_checkpoints_without_a_mark_are_passed_over_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.warns(UserWarning, match=r"marked as complete, although there are \[4\].*name it in resume_"):
        assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("options", [{}, {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}], ids=str)
def test_a_checkpoint_is_complete_only_when_it_is_written(options: dict[str, Any], tmp_path: Path) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append((tmp_path / f"checkpoint-{state.global_step}" / COMPLETE).exists())

    for _ in range(2):  # the second run writes over the checkpoints of the first
        trainer(learner(), tmp_path, callbacks=[Look(), GraftCallback()], **options).train()
    assert seen and not any(seen)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_alpha_is_in_the_log_of_the_trainer_and_goes_on_from_there(tmp_path: Path) -> None:
    run = trainer(learner(), tmp_path, callbacks=[AlphaCallback([Rows(8).batch], rounds=2)])
    run.train()
    state = TrainerState.load_from_json(str(tmp_path / "checkpoint-4" / "trainer_state.json"))
    alphas = [entry["graft_alpha"]["default"] for entry in state.log_history if "graft_alpha" in entry]
    assert alphas == [3.0, *(fit.alpha for fit in run.callback_handler.callbacks[1].fits)]
    model = learner()
    AlphaCallback([Rows(8).batch]).on_train_begin(None, state, TrainerControl(), model=model)
    assert model.peft_config["default"].alpha == alphas[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraftCallback().on_train_begin(None, state, TrainerControl(), model=MLP())  # a model without a graft
