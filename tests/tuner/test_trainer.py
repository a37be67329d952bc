"""Mask training under a Trainer: resume, the best checkpoint, several processes, and a packed patch at the end."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers import trainer as trainer_module
from transformers.utils import PushToHubMixin

from grafts import graft, held, output, same_bits
from learning import BASE, DONOR, Rows, learner, trainer
from models import inputs, perturbed, tiny_bert
from peft_graft import AlphaCallback, GraftConfig, PatchError, fit_alpha


def logits_of(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in model.base_model.states["default"].logits().items()}


def kinds(path: Path) -> set[str]:
    """Kinds of tensors that an adapter's file holds for its patch."""
    return {re.split("[_.]", key)[-1] for key in load_file(path / "adapter_model.safetensors") if "graft_patch" in key}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in one)


@pytest.mark.feature("Trainer: train, checkpoint, resume")
def test_a_trainer_lowers_the_loss_and_saves_a_packed_patch(tmp_path: Path) -> None:
    model = learner()
    run = trainer(model, tmp_path, steps=12)
    before = run.evaluate()["eval_loss"]
    start = held(model)
    run.train()
    assert run.evaluate()["eval_loss"] < before
    assert held(model) == start  # the candidates
    assert kinds(tmp_path / "checkpoint-2") == {"table", "packed", "logits", "alpha"}
    run.save_model(tmp_path / "final")
    model.save_pretrained(tmp_path / "direct")
    for name in ("final", "direct"):
        assert kinds(tmp_path / name) == {"table", "packed"}
        loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / name)
        assert same_bits(output(loaded, Rows().batch), output(model, Rows().batch))
        assert sum(map(len, held(loaded).values())) == model.peft_config["default"].record.entries
        assert not [p for p in loaded.parameters() if p.requires_grad]


@pytest.mark.feature("Trainer: train, checkpoint, resume")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget_scope": "tensor", "density": 0.05},
        pytest.param({"alpha": 7.0}, marks=pytest.mark.slow),
        pytest.param({"task_type": None}, marks=pytest.mark.slow),
        pytest.param({"candidate_ratio": 3}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one(options: dict[str, Any], tmp_path: Path) -> None:
    whole = learner(**options)
    trainer(whole, tmp_path / "whole").train()
    trainer(learner(**options), tmp_path / "half", steps=2).train()
    resumed = learner(**options)
    run = trainer(resumed, tmp_path / "half", steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert run.state.global_step == 4
    assert same(logits_of(resumed), logits_of(whole))
    assert same_bits(output(resumed, Rows().batch), output(whole, Rows().batch))
    for name, model in (("a", whole), ("b", resumed)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_resumed_run_keeps_the_alpha_that_was_fitted_on_the_way(scope: str, tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: bool = False) -> PeftModel:
        model = learner(alpha_scope=scope)
        checkpoint = str(tmp_path / name / "checkpoint-2") if resume else None
        stop = Stop(2) if steps == 2 else Stop(99)
        callbacks = [AlphaCallback([Rows(8).batch], rounds=4), stop]
        trainer(model, tmp_path / name, callbacks=callbacks).train(resume_from_checkpoint=checkpoint)
        return model

    class Stop(TrainerCallback):
        def __init__(self, step: int) -> None:
            self.step = step

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= self.step

    whole = run("whole", 4)
    run("half", 2)
    resumed = run("half", 4, resume=True)
    assert whole.peft_config["default"].alpha != 1.0
    assert resumed.peft_config["default"].alpha == whole.peft_config["default"].alpha
    # Of a best mask from before the checkpoint, the log keeps the mask and not its logits.
    assert same_bits(output(resumed, Rows().batch), output(whole, Rows().batch))


@pytest.mark.feature("is_trainable")
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_checkpoint_can_be_loaded_like_any_adapter_and_trained_on(scope: str, tmp_path: Path) -> None:
    model = learner(budget_scope=scope, density=0.05, alpha=3.0)
    trainer(model, tmp_path, steps=2).train()
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "checkpoint-2", is_trainable=True)
    assert same_bits(output(loaded, Rows().batch), output(model, Rows().batch))
    assert same(logits_of(loaded), logits_of(model))
    assert all(p.requires_grad for p in loaded.base_model.states["default"].logits().values())
    for each, out in ((model, "on"), (loaded, "loaded")):
        head = each.base_model.model.classifier.modules_to_save["default"]
        head.requires_grad_(False)  # only in the first is it known that this head is the donor's
        run = trainer(each, tmp_path / out, steps=2, save_strategy="no")
        run.train()
        assert each.train().training
    trained = [logits_of(each) for each in (model, loaded)]
    assert same(*trained)
    loaded.save_pretrained(tmp_path / "packed")
    assert kinds(tmp_path / "packed") == {"table", "packed"}


def test_a_trainer_of_a_loaded_checkpoint_writes_such_checkpoints_too(tmp_path: Path) -> None:
    trainer(learner(), tmp_path, steps=2).train()
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "checkpoint-2", is_trainable=True)
    trainer(loaded, tmp_path / "on", steps=2).train()
    assert "logits" in kinds(tmp_path / "on" / "checkpoint-2")


def test_other_trainers_have_no_callback_of_a_graft(tmp_path: Path) -> None:
    model = learner()
    trainer(model, tmp_path / "graft", steps=2).train()
    run = trainer(copy.deepcopy(BASE), tmp_path / "plain")
    ours = [*trainer_module.DEFAULT_CALLBACKS, *map(type, run.callback_handler.callbacks)]
    assert [one for one in ours if one.__module__.startswith("peft_graft")] == []


class At(TrainerCallback):
    """Do something at an event of a Trainer."""

    def __init__(self, event: str, do: Callable[[], Any]) -> None:
        setattr(self, event, lambda *args, **kwargs: do())


@pytest.mark.parametrize(
    ("event", "found"),
    [("on_step_end", {"table", "packed", "logits", "alpha"}), ("on_train_end", {"table", "packed"})],
)
def test_what_callbacks_save_can_be_trained_on_until_the_training_ends(
    event: str, found: set[str], tmp_path: Path
) -> None:
    model = learner()
    callback = At(event, lambda: model.save_pretrained(tmp_path / "adapter"))
    trainer(model, tmp_path, callbacks=[callback], save_strategy="no").train()
    assert kinds(tmp_path / "adapter") == found


def test_a_training_that_was_interrupted_leaves_no_trace(tmp_path: Path) -> None:
    model = learner()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, callbacks=[At("on_step_end", interrupt)]).train()
    model.save_pretrained(tmp_path / "adapter")
    assert kinds(tmp_path / "adapter") == {"table", "packed"}


def test_another_model_that_is_saved_meanwhile_is_packed(tmp_path: Path) -> None:
    other = learner()
    callback = At("on_step_end", lambda: other.save_pretrained(tmp_path / "other"))
    trainer(learner(), tmp_path, callbacks=[callback], save_strategy="no").train()
    assert kinds(tmp_path / "other") == {"table", "packed"}


def test_training_cannot_resume_from_a_packed_patch(tmp_path: Path) -> None:
    model = learner()
    model.save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="checkpoint must hold mask logits to resume training, got a packed patch"):
        model.load_adapter(tmp_path, "default", is_trainable=True)


def test_a_packed_patch_can_be_loaded_under_the_config_that_it_was_learned_with(tmp_path: Path) -> None:
    model = learner()
    model.save_pretrained(tmp_path)
    config = GraftConfig(donor=DONOR, density=0.02, selection="learned", task_type="SEQ_CLS")
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path, config=config)
    assert same_bits(output(loaded, inputs(BASE)), output(model, inputs(BASE)))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("logits", lambda value: value[:-1]),
        ("logits", lambda value: value.half()),
        ("logits", lambda value: value * float("nan")),
        ("alpha", lambda value: value.float()),
        ("alpha", lambda value: value * float("inf")),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_tensor(kind: str, change: Any, tmp_path: Path) -> None:
    trainer(learner(), tmp_path, steps=2).train()
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    stored = load_file(path)
    key = next(key for key in stored if key.endswith(f"weight_{kind}"))
    name = key.removeprefix("base_model.model.").replace(f".graft_patch.weight_{kind}", ".weight")
    save_file(stored | {key: change(stored[key])}, path)
    with pytest.raises(PatchError, match=rf"{kind} must be finite torch.float.* for '{name}'. The file is damaged"):
        PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "checkpoint-2", is_trainable=True)


@pytest.mark.feature("Trainer: train, checkpoint, resume")
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = learner()
    seen: dict[int, dict[str, torch.Tensor]] = {}

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step > 2:  # from here on it only gets worse
                with torch.no_grad():
                    for value in model.base_model.states["default"].logits().values():
                        value.copy_(-value)
                model.peft_config["default"].alpha = -20.0
            seen[state.global_step] = {name: value.clone() for name, value in logits_of(model).items()}

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, callbacks=[Spoil()], **options)
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-2")
    assert same(logits_of(model), seen[2])
    assert model.peft_config["default"].alpha == 1.0
    run.save_model(tmp_path / "final")
    assert kinds(tmp_path / "final") == {"table", "packed"}


def test_mask_and_alpha_are_fitted_in_turns(tmp_path: Path) -> None:
    model = learner(alpha="auto")
    callback = AlphaCallback([Rows(8).batch], rounds=2)
    trainer(model, tmp_path, callbacks=[callback]).train()
    assert len(callback.fits) == 2
    last = callback.fits[-1]
    assert model.peft_config["default"].alpha == last.alpha and last.loss <= last.loss_at_one
    model.save_pretrained(tmp_path / "final")
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "final")
    assert loaded.peft_config["default"].alpha == last.alpha
    assert same_bits(output(loaded, Rows().batch), output(model, Rows().batch))


def test_without_a_fit_an_alpha_that_waits_still_waits_after_resuming(tmp_path: Path) -> None:
    trainer(learner(alpha="auto"), tmp_path, steps=2).train()
    model = learner(alpha="auto")
    run = trainer(model, tmp_path, steps=4)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="graft must be complete before it is saved"):
        run.save_model(tmp_path / "final")
    fit_alpha(model, [Rows(8).batch], show_progress_bar=False)
    run.save_model(tmp_path / "final")


def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path) -> None:
    found = []
    for size, steps in ((16, 1), (4, 4)):
        model = learner()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "save_strategy": "no"}
        # Trainer sums the mean losses of a classifier's accumulated batches; it takes their number for tokens.
        options |= {"learning_rate": 10 / steps, "optim": "sgd", "max_grad_norm": 0}
        trainer(model, tmp_path, steps=1, **options).train()
        found.append(logits_of(model))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-4)
    assert any(not torch.equal(value, torch.ones_like(value)) for value in found[0].values())


def test_a_trainer_without_a_learned_mask_saves_patches(tmp_path: Path) -> None:
    model = graft(BASE, DONOR.bert, density=0.02, task_type="SEQ_CLS")  # the head trains
    trainer(model, tmp_path, steps=2).train()
    assert kinds(tmp_path / "checkpoint-2") == {"table", "packed"}


# Several processes


def _train_on_two(out: str) -> None:
    torch.set_num_threads(1)
    model = get_peft_model(
        copy.deepcopy(BASE), GraftConfig(donor=DONOR, density=0.02, selection="learned", task_type="SEQ_CLS")
    )
    options = {"average_tokens_across_devices": False, "ddp_backend": "gloo"}
    run = trainer(model, Path(out), **options)
    run.train()
    rank = torch.distributed.get_rank()
    state = {"world": torch.distributed.get_world_size(), "steps": run.state.global_step, "logits": logits_of(model)}
    torch.save(state | {"output": output(model, Rows().batch)}, f"{out}/rank{rank}.pt")


@pytest.mark.filterwarnings("ignore")  # what other processes and their launcher warn of is not ours to change
def test_two_processes_learn_the_same_mask(tmp_path: Path) -> None:
    debug_launcher(_train_on_two, (str(tmp_path),), num_processes=2)
    one, two = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert one["world"] == two["world"] == 2
    assert one["steps"] == 4
    assert same(one["logits"], two["logits"])
    assert same_bits(one["output"], two["output"])
    assert any(not torch.equal(value, torch.ones_like(value)) for value in one["logits"].values())
    resumed = learner()
    run = trainer(resumed, tmp_path, steps=6)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert run.state.global_step == 6


# Where a graft is published


def base_in(directory: Path) -> str | None:
    return json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"]


def test_classes_of_other_libraries_stay_as_they_are(tmp_path: Path) -> None:
    before = [vars(PeftModel).get("create_or_update_model_card"), vars(PushToHubMixin)["_upload_modified_files"]]
    graft(tiny_bert(), "zeros", density=0.1).save_pretrained(tmp_path)
    assert [vars(PeftModel)["create_or_update_model_card"], vars(PushToHubMixin)["_upload_modified_files"]] == before
    lora = get_peft_model(tiny_bert(), LoraConfig(target_modules=["query"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "create_or_update_model_card" not in vars(lora)
    assert "peft-graft" not in (tmp_path / "lora" / "README.md").read_text()


def test_copies_and_pickles_publish_themselves(tmp_path: Path) -> None:
    model = graft(tiny_bert(), "zeros", density=0.1)
    model.save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    assert twin.create_or_update_model_card.__self__ is twin
    again = pickle.loads(pickle.dumps(model))
    assert again.create_or_update_model_card.__self__ is again
    again.save_pretrained(tmp_path / "again")
    assert "## What it is" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.feature("model card of save_pretrained")
def test_every_adapter_has_its_card(tmp_path: Path) -> None:
    model = graft(tiny_bert(), "zeros", density=0.1)
    model.add_adapter("other", GraftConfig(donor="zeros", density=0.2))
    model.save_pretrained(tmp_path)
    assert "| density | 0.1 |" in (tmp_path / "README.md").read_text()
    assert "| density | 0.2 |" in (tmp_path / "other" / "README.md").read_text()


def test_config_alone_writes_no_card(tmp_path: Path) -> None:
    GraftConfig(donor="zeros", density=0.1).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_only_a_trainer_that_pushes_saves_public_names(tmp_path: Path) -> None:
    base = copy.deepcopy(BASE)
    base.name_or_path = str(tmp_path)
    base.save_pretrained(tmp_path)
    model = graft(base, DONOR, density=0.1, task_type="SEQ_CLS")
    run = trainer(model, tmp_path / "run")
    run.save_model(tmp_path / "here")
    assert base_in(tmp_path / "here") == str(tmp_path)
    run.hub_model_id = "me/skill"  # as Trainer(push_to_hub=True), and push_to_hub before it saves
    with pytest.warns(UserWarning, match="published without the base's name"):
        run.save_model(tmp_path / "there")
    assert base_in(tmp_path / "there") is None
    assert "for_hub" not in (tmp_path / "there" / "adapter_config.json").read_text()
    model.save_pretrained(tmp_path / "later")
    assert base_in(tmp_path / "later") == str(tmp_path)


def test_a_trainer_s_card_becomes_ours_with_its_training_section(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), num_params=30, selection="learned", task_type="SEQ_CLS")
    batch = inputs(base)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", dataloader_pin_memory=False
    )
    run = Trainer(model, arguments, train_dataset=rows)
    run.train()
    run.save_model()
    run.create_model_card(tags=["mine"], dataset_tags="org/data", dataset="Data")
    card = ModelCard.load(tmp_path / "README.md")
    assert "## What it is" in card.text and "- learning_rate: 5e-05" in card.text
    assert "More information needed" not in card.text
    assert {"mine", "graft", "generated_from_trainer"} <= {*card.data.tags}
    assert card.data.library_name == "peft" and card.data.datasets == ["org/data"]
    model.save_pretrained(tmp_path)
    assert "- learning_rate: 5e-05" in (tmp_path / "README.md").read_text()
