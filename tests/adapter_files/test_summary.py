"""A saved adapter is read once: its header at once, its values and its hash when they are needed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_cards import METRICS, save
from peft_graft import PatchError
from peft_graft.adapter_files.summary import SavedAdapter, current_fields, fetch_adapter, read_saved
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.patch.patch import Patch
from peft_graft.workflows.push import write_card

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def read(directory: Path) -> SavedAdapter:
    saved = read_saved(directory)
    assert saved is not None
    return saved


def test_the_facts_are_those_of_the_files(tmp_path: Path) -> None:
    save(tmp_path)
    saved, patch = read(tmp_path), Patch.load(tmp_path / WEIGHTS)
    assert saved.counts == {name: part.indices.numel() for name, part in patch.tensors.items()}
    assert (saved.tensors_bytes, saved.config_bytes) == tuple((tmp_path / n).stat().st_size for n in (WEIGHTS, CONFIG))
    assert saved.num_labels == 3 and not saved.in_training
    modules = saved.load_modules_to_save()
    assert {name: value.shape for name, value in modules.items()} == {
        "classifier.weight": (3, 16), "classifier.bias": (3,)
    }  # fmt: skip
    assert saved.modules_to_save_bytes == {"classifier": sum(value.nbytes for value in modules.values())}
    assert saved.load_patch().tensors.keys() == patch.tensors.keys()
    assert saved.record["entries"] == sum(saved.counts.values())


def test_a_mask_in_training_is_seen(tmp_path: Path) -> None:
    save(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    save_file({**state, "base_model.model.x.graft_patch.weight_logits": torch.ones(3)}, tmp_path / WEIGHTS)
    assert read(tmp_path).in_training


def test_the_hash_is_that_of_tensors_and_alpha(tmp_path: Path) -> None:
    def content_hash() -> str:
        return read(tmp_path).content_hash

    save(tmp_path)
    first = content_hash()
    save(tmp_path, seed=9)  # another configuration of the same patch
    assert content_hash() == first
    save(tmp_path, alpha=2.0)
    assert content_hash() != first
    save(tmp_path, density=0.06)
    assert content_hash() != first


def test_the_values_are_read_once_and_not_before_they_are_needed(tmp_path: Path) -> None:
    save(tmp_path)
    saved = read(tmp_path)
    first = saved.content_hash, saved.load_patch()
    weights = (tmp_path / WEIGHTS).read_bytes()
    packed = CheckpointDonor(tmp_path / WEIGHTS, role="adapter").extent("base_model.model.graft_patch.packed")
    (tmp_path / WEIGHTS).unlink()
    assert (saved.content_hash, saved.load_patch()) == first
    size = packed.shape[0]
    (tmp_path / WEIGHTS).write_bytes(weights[: packed.offset] + b"\xff" * size + weights[packed.offset + size :])
    damaged = read(tmp_path)  # which looks at the header and the table alone
    assert damaged.counts == saved.counts
    with pytest.raises(PatchError):
        damaged.load_patch()


def test_a_copy_shares_what_was_read(tmp_path: Path) -> None:
    save(tmp_path / "one")
    saved = read(tmp_path / "one")
    first = saved.content_hash, saved.load_patch()
    (tmp_path / "two").mkdir()
    config = json.loads((tmp_path / "one" / CONFIG).read_text()) | {"donor": None}
    (tmp_path / "two" / CONFIG).write_text(json.dumps(config))
    copied = saved.copied_to(tmp_path / "two")
    assert (copied.content_hash, copied.load_patch()) == first and copied.counts == saved.counts
    assert copied.directory == tmp_path / "two" and copied.config == config
    assert copied.config_bytes == (tmp_path / "two" / CONFIG).stat().st_size
    assert saved.directory == tmp_path / "one" and saved.config != config


def test_a_card_takes_one_reading_of_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path)
    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(hashlib, "file_digest")
    watch(Patch, "load")
    write_card(tmp_path, METRICS)
    assert sorted(calls) == ["file_digest", "load"]


def test_only_whole_grafts_are_read(tmp_path: Path) -> None:
    assert read_saved(tmp_path) is None
    save(tmp_path)
    config, weights = tmp_path / CONFIG, tmp_path / WEIGHTS
    fields = config.read_text()
    for text in (json.dumps(json.loads(fields) | {"peft_type": "LORA"}), "[]"):
        config.write_text(text)
        assert read_saved(tmp_path) is None
    config.write_text("{")
    with pytest.raises(PatchError, match="adapter config must be JSON"):
        read_saved(tmp_path)
    config.write_text(fields)
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PatchError, match="must be whole safetensors"):
        read_saved(tmp_path)


def test_fields_of_0_1_0_get_the_names_of_today() -> None:
    record = {"entries": 3, "provenance": {"versions": {"peft": "1"}}}
    today = {"density": 0.1, "budget_scope": "tensor", "candidate_ratio": 2.0, "record": record}
    assert current_fields({"density": 0.1, "scope": "tensor", "candidates": 2.0, **record}) == today
    assert current_fields(today) == today
    assert current_fields({"density": 0.1, "record": None}) == {"density": 0.1, "record": None}


def test_a_directory_is_fetched_as_it_is(tmp_path: Path) -> None:
    assert fetch_adapter(tmp_path) == tmp_path
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none"):
        with pytest.raises(FileNotFoundError, match="adapter must be an existing directory or a Hub id, got .*none"):
            fetch_adapter(missing)
