"""Tensors coded as steps: in blocks, with checksums, in a patch's file; another base is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from peft_graft.patch import step_tensor
from peft_graft.patch.patch import Patch, PatchError
from peft_graft.patch.step_tensor import StepTensor

NAME = "layers.0.weight"


def bits_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def pair(dtype: torch.dtype = torch.bfloat16, rows: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    base = (torch.randn(rows, 40) * 0.02).to(dtype)
    return base, (base.float() + 1e-4 * torch.randn(base.shape)).to(dtype)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_tensor, "MAX_ENTRIES", 700)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_the_whole_tensor_and_the_changed_entries_are_decoded(small_blocks: None, dtype: torch.dtype) -> None:
    base, donor = pair(dtype)
    part = StepTensor.encode(base, donor)
    part.validate(NAME, base.numel())
    assert bits_equal(part.decode_whole(base), donor)
    if dtype != torch.float8_e4m3fn:  # of which values at indices cannot be made
        changed = (base.view(-1) != donor.view(-1)).nonzero().flatten()
        plain = part.decode(base, NAME)
        assert torch.equal(plain.indices, changed) and bits_equal(plain.values, donor.view(-1)[changed])
        assert part.count == changed.numel()


def test_entries_that_are_not_finite_on_both_sides_are_no_part_of_the_patch() -> None:
    base, donor = pair()
    base[0, :2] = donor[0, :2] = torch.tensor([float("nan"), float("inf")])
    part = StepTensor.encode(base, donor)
    assert bits_equal(part.decode_whole(base), donor)
    assert part.decode(base).indices.min() >= 2
    donor[0, 1] = float("nan")
    with pytest.raises(PatchError, match=f"values must be finite, got 1 NaN or Inf in '{NAME}'"):
        StepTensor.encode(base, donor).decode(base, NAME)


def test_saving_and_loading_keeps_the_code(small_blocks: None, tmp_path: Path) -> None:
    (base, donor), (second_base, second) = pair(), pair(torch.float16)
    parts = {NAME: StepTensor.encode(base, donor), "head.weight": StepTensor.encode(second_base, second)}
    shapes = {NAME: tuple(base.shape), "head.weight": tuple(second_base.shape)}
    Patch(parts, shapes).save(tmp_path / "patch.safetensors")
    loaded = Patch.load(tmp_path / "patch.safetensors", shapes)
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "patch.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert loaded.num_params == sum(part.count for part in parts.values())
    bases = {NAME: base, "head.weight": second_base}
    decoded = loaded.decode(bases.__getitem__).plain
    for name, donor_values in ((NAME, donor), ("head.weight", second)):
        whole = bases[name].clone().view(-1).index_copy_(0, decoded[name].indices, decoded[name].values)
        assert bits_equal(whole.view(donor_values.shape), donor_values)


def test_a_base_of_another_dtype_is_refused() -> None:
    base, donor = pair()
    with pytest.raises(PatchError, match="base must be loaded in the dtype .* bfloat16, got float32 in 'layers.0.w"):
        StepTensor.encode(base, donor).decode(base.float(), NAME)


def test_a_base_of_other_bits_is_refused() -> None:
    base, donor = pair()
    part = StepTensor.encode(base, donor)
    base[7, 7] += 1
    with pytest.raises(PatchError, match=NAME):
        part.decode(base, NAME)


def test_every_damaged_byte_is_noticed(small_blocks: None) -> None:
    base, donor = pair(rows=20)
    part = StepTensor.encode(base, donor)
    for at in range(part.data.numel()):
        data = part.data.clone()
        data[at] ^= 1 + at % 255
        damaged = StepTensor(part.dtype, part.count, data)
        with pytest.raises(PatchError):
            damaged.validate(NAME, base.numel())
            damaged.decode(base, NAME)


def test_a_wrong_number_of_blocks_or_changes_is_refused(small_blocks: None) -> None:
    base, donor = pair()
    part = StepTensor.encode(base, donor)
    with pytest.raises(PatchError, match="number of coded blocks must be 2, got 3"):
        part.validate(NAME, 1400)
    with pytest.raises(PatchError, match=r"number of changed entries must be in \[1, 4\]"):
        part.validate(NAME, 4)
    with pytest.raises(PatchError, match="number of changed entries must be 5, got another"):
        StepTensor(part.dtype, 5, part.data).decode(base, NAME)
    with pytest.raises(PatchError, match="coded block must be .* bytes from byte"):
        StepTensor(part.dtype, part.count, part.data[:-1]).validate(NAME, base.numel())
    with pytest.raises(PatchError, match="steps must be of a dtype of at most 32 bits"):
        StepTensor(torch.float64, part.count, part.data).validate(NAME, base.numel())
