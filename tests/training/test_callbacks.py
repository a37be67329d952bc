"""Callbacks of a Trainer: alpha fitted in turns with the mask, and complete checkpoints."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from batches import regression, squared_error
from grafts import MLP, graft
from learning import Rows, learner, trainer
from models import perturbed
from peft_graft import AlphaCallback, DonorObjectiveMixin, fit_alpha, initialize_graft
from peft_graft.training import callbacks
from peft_graft.training.alpha import AlphaFit
from peft_graft.training.callbacks import COMPLETE, GraftCallback, last_checkpoint


class GraftTrainer(DonorObjectiveMixin, Trainer):
    """A Trainer with the objective of the config."""


@pytest.mark.parametrize(
    ("rounds", "steps", "ends"), [(1, 10, [10]), (2, 10, [5, 10]), (3, 10, [3, 6, 10]), (9, 2, [1, 2])]
)
def test_alpha_is_fitted_at_the_end_of_every_round(
    rounds: int, steps: int, ends: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted = []

    def fake(model: Any, data: Any, **options: Any) -> AlphaFit:
        fitted.append((model, data, options))
        return AlphaFit(1.0, 1.0, 1.0, 1)

    monkeypatch.setattr(callbacks, "fit_alpha", fake)
    callback = AlphaCallback(iter(regression()), rounds=rounds, adapter_name="skill")
    base, arguments = MLP(), TrainingArguments(str(tmp_path), report_to="none")
    model = graft(base, perturbed(base), "skill", density=0.3, selection="learned")
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


@pytest.mark.parametrize("alpha", [2.0, {"first.weight": 2.0}])
def test_alpha_has_a_head_start_once(alpha: Any) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection="learned", alpha=alpha)
    callback = AlphaCallback(regression(), head_start=1.01, loss_fn=squared_error)
    state = TrainerState(global_step=0)
    callback.on_train_begin(None, state, TrainerControl(), model=model)
    given = model.peft_config["default"].alpha
    found = given["first.weight"] if isinstance(alpha, dict) else given
    assert 2.0 <= found <= 2.02
    (noted,) = [entry["graft_best"] for entry in state.log_history]
    assert (noted["alpha"], noted["loss"]) == (alpha, callback._best.loss)
    callback.on_train_begin(None, TrainerState(global_step=2), TrainerControl(), model=model)
    assert model.peft_config["default"].alpha == given


def test_alpha_that_was_not_fitted_is_fitted_when_the_training_starts() -> None:
    model = learner(alpha="auto")
    batches = [Rows(8).batch]
    wanted = fit_alpha(learner(alpha="auto"), batches, show_progress_bar=False)
    callback = AlphaCallback(batches, head_start=1.0)
    callback.on_train_begin(None, TrainerState(global_step=0), TrainerControl(), model=model)
    assert (callback._best.alpha, callback._best.loss) == (wanted.alpha, pytest.approx(wanted.loss))


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
    (best,) = [entry for entry in state.log_history if "graft_best" in entry]
    assert best["graft_best"]["alpha"] == (1.0, 0, alphas[1], 0, alphas[2])[best["step"]] and 1.0 <= alphas[0] <= 3.0
    assert alphas[1:] == [fit.alpha for fit in run.callback_handler.callbacks[1].fits]
    model = learner()
    AlphaCallback([Rows(8).batch]).on_train_begin(None, state, TrainerControl(), model=model)
    assert model.peft_config["default"].alpha == alphas[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GraftCallback().on_train_begin(None, state, TrainerControl(), model=MLP())  # a model without a graft


def test_a_training_that_did_not_help_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate that makes the mask worse and worse; the labels are wrong besides."""
    model, calibration = learner(alpha="auto", density=0.05), [Rows().batch]
    start = initialize_graft(model, calibration, show_progress_bar=False)
    before = held_mask(model)
    wrong = Rows()
    wrong.batch = wrong.batch | {"labels": 1 - wrong.batch["labels"]}
    callback = AlphaCallback(calibration)
    run = trainer(model, tmp_path, callbacks=[callback], steps=8)
    run.train_dataset = wrong
    run.train()
    assert callback.helped is False and min(fit.loss for fit in callback.fits) > start.loss
    assert held_mask(model) == before and model.peft_config["default"].alpha == start.alpha
    assert model.eval()(**calibration[0]).loss.item() == pytest.approx(start.loss, rel=1e-5)
    assert "Training the mask did not help: the calibration loss is" in caplog.text


def held_mask(model: Any) -> dict[str, list[bool]]:
    state = model.base_model.states["default"]
    return {name: state.mask(name).tolist() for name in state.logits()}


def test_the_best_mask_on_the_way_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The rows turn wrong after half of the steps."""
    model, calibration = learner(alpha="auto", density=0.05), [Rows().batch]
    initialize_graft(model, calibration, show_progress_bar=False)
    seen: dict[int, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = (held_mask(model), model.peft_config["default"].alpha)
            if state.global_step == 8:
                rows.batch["labels"].sub_(1).mul_(-1)

    rows = Rows()
    callback = AlphaCallback(calibration)
    run = trainer(model, tmp_path, callbacks=[callback, Look()], steps=16)
    run.train_dataset = rows
    run.train()
    assert callback.helped is True and callback.fits[1].loss > callback.fits[0].loss
    assert (held_mask(model), model.peft_config["default"].alpha) == seen[8] != seen[16]
    assert "The end of the training did not help" in caplog.text


def test_a_training_that_ends_early_has_a_fitted_alpha(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    callback = AlphaCallback([Rows(8).batch], rounds=1)
    trainer(learner(alpha="auto"), tmp_path, callbacks=[callback, Stop()], steps=8).train()
    assert len(callback.fits) == 1 and callback.helped is not None


@pytest.mark.parametrize("best", [0, 8])
def test_a_resumed_run_still_knows_the_best_mask(best: int, tmp_path: Path) -> None:
    """Where nothing that comes later is better, the whole run and the resumed one end with the same model."""

    def run(out: Path, resume: str | None = None) -> Any:
        model, callback = learner(alpha="auto", density=0.05), AlphaCallback([Rows().batch])
        initialize_graft(model, [Rows().batch], show_progress_bar=False)
        options: dict[str, Any] = {"steps": 16, "save_steps": 8} if best else {"learning_rate": 2.0}
        training = trainer(model, out, callbacks=[callback], **options)
        if best:
            training.add_callback(Spoil())
        training.train(resume_from_checkpoint=resume)
        return held_mask(model), model.peft_config["default"].alpha, callback._best.step

    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 9:
                for logits in model.base_model.states["default"].logits().values():
                    logits.data.neg_()

    whole = run(tmp_path / "whole")
    assert whole[2] == best
    assert run(tmp_path / "again", str(tmp_path / "whole" / f"checkpoint-{best or 2}")) == whole


@pytest.mark.parametrize("objective", ["labels", "donor"])
def test_more_budget_is_never_worse(objective: str, tmp_path: Path) -> None:
    rows, losses = Rows(), []
    calibration = [rows.batch]
    for density in (0.01, 0.04, 0.16):
        model = learner(density=density, alpha="auto", objective=objective)
        start = initialize_graft(model, calibration, show_progress_bar=False)
        callback = AlphaCallback(calibration)
        arguments = trainer(model, tmp_path, steps=8, save_strategy="no").args
        GraftTrainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
        losses.append(fit_alpha(model, calibration, show_progress_bar=False).loss)
        assert losses[-1] <= start.loss * (1 + 1e-6)
    for smaller, larger in itertools.pairwise(losses):
        assert larger <= 1.05 * smaller
