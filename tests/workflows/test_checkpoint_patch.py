"""The file for an engine comes back as it was, and a damaged one is refused by the name of its tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grafts import same_bits
from peft_graft import PatchError
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.workflows.checkpoint_patch import CheckpointEdit, CheckpointPatch

BASE = torch.arange(12, dtype=torch.bfloat16)
PLACES = torch.tensor([1, 5, 11])
PATCH = CheckpointPatch(
    {
        "a.weight": CheckpointEdit((3, 4), -BASE[PLACES], BASE[PLACES], PLACES),
        "head": CheckpointEdit((12,), BASE.float() + 0.5, BASE),
        "new": CheckpointEdit((1,), torch.ones(1), None),
    },
    "org/base",
)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    PATCH.save(tmp_path / "file")
    again = CheckpointPatch.load(tmp_path / "file")
    assert again.base == "org/base" and again.without_base == ["new"]
    for name, edit in PATCH.edits.items():
        other = again.edits[name]
        assert other.shape == edit.shape and same_bits(other.values, edit.values)
        assert (other.base_values is None) == (edit.base_values is None)
        assert edit.base_values is None or same_bits(other.base_values, edit.base_values)
        assert (other.indices is None) == (edit.indices is None)
        assert edit.indices is None or torch.equal(other.indices, edit.indices)


def test_numbers_of_entries_beyond_int32_stay_wide(tmp_path: Path) -> None:
    far = CheckpointEdit((2**31,), torch.ones(1), torch.zeros(1), torch.tensor([2**31 - 1]))
    CheckpointPatch({"x": far}, "").save(tmp_path / "file")
    assert CheckpointPatch.load(tmp_path / "file").edits["x"].indices.tolist() == [2**31 - 1]


ABOUT = {"a": {"shape": [3, 4], "dtype": "bfloat16"}}
GOOD = {"a.values": -BASE[PLACES], "a.base": BASE[PLACES], "a.indices": PLACES.int()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.indices": torch.tensor([1, 1, 2])}, "another order in 'a'"),
        ({"a.indices": torch.tensor([1, 2, 12])}, "indices from 1 to 12 of 12 entries"),
        ({"a.indices": torch.tensor([-1, 2, 3])}, "indices from -1 to 3"),
        ({"a.indices": torch.tensor([1, 2])}, "for 2 entries in 'a'"),
        ({"a.values": torch.tensor([1, torch.nan, 2])}, "got NaN in 'a'"),
        ({"a.base": torch.ones(2)}, "for 3 entries in 'a'"),
        ({"a.values": torch.ones(3, dtype=torch.int64)}, "torch.int64"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file({**GOOD, **change}, tmp_path / "file", {"tensors": json.dumps(ABOUT)})
    with pytest.raises(PatchError, match=message):
        CheckpointPatch.load(tmp_path / "file")


@pytest.mark.parametrize("tensors", [None, "[]", "{", '{"b": {"shape": [1]}}', '{"a": {}}', '{"a": {"shape": ["x"]}}'])
def test_another_file_is_refused(tensors: str | None, tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "file", {} if tensors is None else {"tensors": tensors})
    with pytest.raises(PatchError, match="must be a file of `peft-graft export --to vllm`"):
        CheckpointPatch.load(tmp_path / "file")
    (tmp_path / "file").write_bytes(b"no safetensors")
    with pytest.raises(PatchError, match="must be a file of `peft-graft export --to vllm`"):
        CheckpointPatch.load(tmp_path / "file")


@pytest.mark.parametrize("change", ["nothing", "value", "shape", "dtype", "name"])
def test_a_base_is_known_by_a_sample(change: str, tmp_path: Path) -> None:
    before = BASE.clone()
    if change == "value":
        before[5] += 1
    tensor = before.view(4, 3) if change == "shape" else before.view(3, 4)
    tensors = {"other" if change == "name" else "a.weight": tensor.float() if change == "dtype" else tensor}
    save_file({**tensors, "head": BASE}, tmp_path / "model.safetensors", {"format": "pt"})
    files = CheckpointDonor(tmp_path, role="base")
    if change == "nothing":
        PATCH.require_base(files)
        return
    with pytest.raises(PatchError, match=r"made for \('org/base'\), got other values or none of 'a\.weight'"):
        PATCH.require_base(files)
