"""Task types: every name is one of PEFT's or of transformers'."""

from __future__ import annotations

import peft
import pytest
import transformers
from peft import TaskType
from transformers.models.auto import modeling_auto

from peft_graft.adapter_files.task_types import TASK_TYPES, task_names


@pytest.mark.parametrize("task", TaskType)
def test_every_task_type_of_peft_has_classes_that_exist(task: TaskType) -> None:
    names = task_names(task)
    assert names is not None and names is task_names(task.value)
    assert issubclass(getattr(peft, names.peft_class), peft.auto._BaseAutoPeftModel)
    assert getattr(peft, names.peft_class)._target_class is getattr(transformers, names.auto_class)
    assert names.mapping is None or getattr(modeling_auto, names.mapping)


def test_there_are_no_others() -> None:
    assert TASK_TYPES.keys() == {task.value for task in TaskType}
    assert task_names(None) is None and task_names("LUNCH") is None
