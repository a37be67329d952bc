"""Task heads that PEFT names only after the graft is made: those of token classification and question answering."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForTokenClassification, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import BertForQuestionAnswering, BertForTokenClassification

from grafts import same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig

BATCH = {"input_ids": inputs(tiny_bert())["input_ids"]}


def answer(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(model.eval()(**BATCH).values()), dim=-1)


@pytest.mark.feature("modules_to_save, task heads")
@pytest.mark.parametrize("modules", [None, ["bert.encoder.layer.1.output.dense"]], ids=["head", "head and more"])
@pytest.mark.parametrize(
    ("model_class", "task", "head"),
    [
        (BertForTokenClassification, "TOKEN_CLS", "classifier"),
        (BertForQuestionAnswering, TaskType.QUESTION_ANS, "qa_outputs"),
    ],
)
def test_the_head_is_the_donors_and_frozen(
    model_class: type[nn.Module], task: str, head: str, modules: list[str] | None, tmp_path: Path
) -> None:
    base = model_class(tiny_bert().config).eval()
    donor, options = perturbed(base), {"task_type": task, "target_modules": "all", "modules_to_save": modules}
    model = get_peft_model(copy.deepcopy(base), GraftConfig(donor=donor, density=1.0, **options))
    assert same_bits(answer(model), answer(donor))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.add_adapter("other", GraftConfig(donor="zeros", density=0.5, task_type=task))
    model.set_adapter("other")
    assert not same_bits(answer(model), answer(donor))
    model.set_adapter("default")
    assert same_bits(answer(model), answer(donor))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert f"base_model.model.{head}.weight" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert same_bits(answer(loaded), answer(donor))
    with loaded.disable_adapter():
        assert same_bits(answer(loaded), answer(base))


@pytest.mark.feature("AutoPeftModelFor...")
def test_the_auto_class_of_the_task_loads_it(tmp_path: Path) -> None:
    base = BertForTokenClassification(tiny_bert().config).eval()
    base.save_pretrained(tmp_path / "base")
    base = BertForTokenClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, GraftConfig(donor=perturbed(base), density=0.1, task_type="TOKEN_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter")
    assert same_bits(answer(loaded), answer(model))
