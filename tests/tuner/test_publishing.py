"""What a model gets so that its card and its names stay right, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import PushToHubMixin

from grafts import graft
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig
from peft_graft.tuner.publishing import PublicNames


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


@pytest.mark.parametrize("event", ["on_push_begin", "on_train_begin"])
def test_a_trainer_that_pushes_saves_public_names(tmp_path: Path, event: str) -> None:
    base = tiny_bert()
    base.save_pretrained(tmp_path)
    base.name_or_path = str(tmp_path)
    model = graft(base, perturbed(base), density=0.1)
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none")
    assert PublicNames in [type(one) for one in Trainer(model, arguments).callback_handler.callbacks]
    call = getattr(PublicNames(), event)
    model.save_pretrained(tmp_path / "here")
    assert base_in(tmp_path / "here") == str(tmp_path)
    arguments.push_to_hub = True
    call(arguments, TrainerState(), TrainerControl(), model=model)
    with pytest.warns(UserWarning, match="published without the base's name"):
        model.save_pretrained(tmp_path / "there")
    assert base_in(tmp_path / "there") is None
    assert "for_hub" not in (tmp_path / "there" / "adapter_config.json").read_text()


def test_a_trainer_that_does_not_push_keeps_them(tmp_path: Path) -> None:
    model = graft(tiny_bert(), "zeros", density=0.1)
    arguments = TrainingArguments(str(tmp_path / "run"), report_to="none")
    PublicNames().on_train_begin(arguments, TrainerState(), TrainerControl(), model=model)
    assert not model.peft_config["default"].for_hub
    PublicNames().on_push_begin(arguments, TrainerState(), TrainerControl(), model=tiny_bert())  # no graft, no error


def test_a_trainer_s_card_becomes_ours_with_its_training_section(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), num_params=30, selection="learned", task_type="SEQ_CLS")
    batch = inputs(base)
    rows = [{key: value[row] for key, value in batch.items()} for row in range(3)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_strategy="no", dataloader_pin_memory=False
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(tags=["mine"], dataset_tags="org/data", dataset="Data")
    card = ModelCard.load(tmp_path / "README.md")
    assert "## What it is" in card.text and "- learning_rate: 5e-05" in card.text
    assert "More information needed" not in card.text
    assert {"mine", "graft", "generated_from_trainer"} <= {*card.data.tags}
    assert card.data.library_name == "peft" and card.data.datasets == ["org/data"]
    model.save_pretrained(tmp_path)
    assert "- learning_rate: 5e-05" in (tmp_path / "README.md").read_text()
