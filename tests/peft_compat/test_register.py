"""GRAFT as a method of PEFT: one enum member that behaves like the others, and an early, clear error without it."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from grafts import graft, output, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig, GraftModel
from peft_graft.peft_compat import register

SOURCE = str(Path(register.__file__).parents[2])


def run(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    prelude = f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    command = [sys.executable, "-W", "ignore", "-c", prelude + code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_type_is_known_to_peft() -> None:
    member = PeftType("GRAFT")
    assert member is PeftType.GRAFT is PeftType["GRAFT"]
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is GraftModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is GraftConfig
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "graft_"


def test_the_member_is_like_any_other() -> None:
    member = PeftType.GRAFT
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert (member.name, member.value, str(member)) == ("GRAFT", "GRAFT", str(PeftType.LORA).replace("LORA", "GRAFT"))
    assert member == "GRAFT" and member != PeftType.LORA and hash(member) == hash("GRAFT")
    assert list(PeftType).count(member) == 1 and member in PeftType
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is copy.copy(member) is member
    assert json.loads(json.dumps({"type": member})) == {"type": "GRAFT"}


def test_registering_again_changes_nothing() -> None:
    before = list(PeftType)
    assert register.extend_enum() is PeftType.GRAFT
    importlib.reload(register)
    assert list(PeftType) == before
    with pytest.raises(ValueError, match="'GRAFTS' is not a valid PeftType"):
        PeftType("GRAFTS")


@pytest.mark.feature("AutoPeftModelFor...")
@pytest.mark.feature("loading before `import peft_graft`", "no: KeyError 'GRAFT'; the model card's code imports it")
def test_a_fresh_process_loads_by_task_after_the_import_alone(tmp_path: Path) -> None:
    base = tiny_bert()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    model = graft(base, perturbed(base), density=0.1, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "out")
    torch.save(inputs(base), tmp_path / "batch.pt")
    code = """
import torch
torch.set_num_threads(1)
from peft import AutoPeftModelForSequenceClassification
root = sys.argv[1]
def load():
    model = AutoPeftModelForSequenceClassification.from_pretrained(root + "/out").eval()
    with torch.no_grad():
        torch.save(model(**torch.load(root + "/batch.pt")).logits, root + "/logits.pt")
try:
    load()
except KeyError as error:
    print(error)
import peft_graft
first = peft_graft.GraftConfig
for name in [name for name in sys.modules if name.split(".")[0] == "peft_graft"]:
    del sys.modules[name]
import peft_graft
assert peft_graft.GraftConfig is not first
load()
"""
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "'GRAFT'" in result.stdout  # what PEFT says without the import
    assert same_bits(torch.load(tmp_path / "logits.pt"), output(model, inputs(base)))
