"""Inspection accounts for every byte and entry of an adapter's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from learning import learner, trainer
from models import perturbed, tiny_bert
from peft_graft import GraftConfig, Patch, PatchError, inspect


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A graft with a head, some tensors with one run of entries, and values in bfloat16."""
    base = tiny_bert(torch.bfloat16)
    config = GraftConfig(donor=perturbed(base), density=0.05, task_type="SEQ_CLS", alpha=2.0)
    get_peft_model(base, config).save_pretrained(tmp_path / "skill")
    return tmp_path / "skill"


def test_every_byte_is_accounted_for(adapter: Path) -> None:
    found, file = inspect(adapter), adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    table, packed = (tensors.pop(f"base_model.model.graft_patch.{kind}").nbytes for kind in ("table", "packed"))
    sizes = {"table": table, "values": 2 * found.entries, "modules_to_save": sum(t.nbytes for t in tensors.values())}
    sizes["indices"] = packed - sizes["values"]
    assert {key: found.nbytes[key] for key in sizes} == sizes
    assert all(sizes.values()) and found.nbytes["training"] == found.nbytes["scales"] == 0
    assert sum(found.nbytes.values()) == file.stat().st_size
    assert found.bytes_per_entry == (file.stat().st_size - sizes["modules_to_save"]) / found.entries


def test_entries_are_counted_by_layer_and_module(adapter: Path) -> None:
    found = inspect(adapter)
    patch = Patch.load(adapter / "adapter_model.safetensors")
    counts = {name: part.indices.numel() for name, part in patch.tensors.items()}
    assert found.entries == sum(counts.values()) == patch.num_params == found.fingerprint["count"]
    assert found.by_layer()["1"] == sum(n for name, n in counts.items() if ".layer.1." in name)
    assert found.by_module()["attention.self.query"] == sum(n for name, n in counts.items() if ".query." in name)
    assert found.to_dict()["cells"]["0"]["output.dense"] == sum(
        n for name, n in counts.items() if ".layer.0.output.dense." in name
    )
    assert sum(found.by_layer().values()) == sum(found.by_module().values()) == found.entries
    assert found.values == {"bfloat16": len(counts)} and found.tensors == len(counts)
    assert sum(found.codecs.values()) == len(counts) and found.codecs.keys() == {"run", "Rice"}


def test_everything_goes_into_json(adapter: Path) -> None:
    found = inspect(adapter)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["density"] == 0.05 and fields["alpha"] == 2.0 and fields["task_type"] == "SEQ_CLS"
    assert fields["donor"] == "BertForSequenceClassification" and fields["provenance"]["versions"]["torch"]
    assert fields["fingerprint"]["sha256"] and "sample" not in str(fields)
    assert fields["entries"] == found.entries == round(0.05 * fields["eligible"])
    assert fields["bytes"]["file"] == sum(fields["bytes"].values()) / 2


def test_a_checkpoint_in_training_shows_its_logits(tmp_path: Path) -> None:
    trainer(learner(), tmp_path, steps=2).train()
    assert inspect(tmp_path / "checkpoint-2").nbytes["training"] > 0


def test_what_is_no_graft_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="adapter must be a directory or repository with a graft's adapter_config"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="adapter must be a directory, or a Hub id that can be reached"):
        inspect("nobody/nothing")


def test_a_truncated_file_is_refused(adapter: Path) -> None:
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(3000)
    with pytest.raises(PatchError, match="adapter file must be whole safetensors"):
        inspect(adapter)
