"""Codes of values: what they say exactly, what they lose, and their bytes."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_graft.patch.patch import Patch, PatchError, TensorPatch
from peft_graft.patch.value_codes import (
    VALUE_CODES,
    ScaledTensor,
    describe_loss,
    encode_candidates,
    encode_values,
    pack_levels,
    unpack_levels,
)

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
CODES = sorted(VALUE_CODES)


def entries(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Indices, a base's values there, and a donor's."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randperm(10 * count + 1, generator=generator)[:count].sort().values
    base = torch.randn(count, generator=generator).to(dtype)
    return indices, base, (base + 0.01 * torch.randn(count, generator=generator).to(dtype)).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", CODES)
def test_a_value_is_base_plus_scale_times_level_in_float32(name: str, dtype: torch.dtype) -> None:
    indices, base, donor = entries(300, dtype=dtype)
    coded, loss = encode_values(indices, donor, base, VALUE_CODES[name])
    coded.validate("w")
    whole = torch.zeros(3001, dtype=dtype).index_copy(0, indices, base)
    part = coded.decode(whole)
    assert torch.equal(part.indices, indices) and part.values.dtype == torch.float32
    lost = norm = 0.0
    for i in range(300):  # a slow loop in numpy's float32
        start, level = np.float32(base[i].float().item()), np.float32(coded.levels[i].item())
        scale = np.float32(coded.scales[i // 128 if name != "sign" else 0].item())
        assert part.values[i].item() == start + scale * level
        delta = donor[i].double().item() - float(start)
        lost += (float(scale) * float(level) - delta) ** 2
        norm += delta**2
    assert loss.share == pytest.approx(math.sqrt(lost / norm), rel=1e-9)


def test_the_scale_of_signs_is_the_mean_and_loses_what_the_variation_says() -> None:
    indices, base, donor = entries(1000)
    coded, loss = encode_values(indices, donor, base, VALUE_CODES["sign"])
    sizes = (donor.double() - base.double()).abs()
    assert coded.scales.tolist() == [sizes.mean().float().item()]
    variation = float(sizes.std(correction=0) / sizes.mean())
    assert loss.share == pytest.approx(variation / math.sqrt(1 + variation**2), rel=1e-6)
    for factor in (0.99, 1.01):  # no other scale loses less
        other = ScaledTensor(indices, coded.levels, coded.scales * factor, coded.value_code)
        assert (other.decode_entries(base).double() - donor.double()).norm() > loss.lost


def test_finer_codes_lose_less() -> None:
    losses = {name: encode_values(*(entries(1000)[i] for i in (0, 2, 1)), VALUE_CODES[name])[1].share for name in CODES}
    assert losses["int8"] < 0.01 < losses["int4"] < 0.2 < losses["sign"]


@pytest.mark.parametrize("name", CODES)
def test_deltas_of_zero_and_no_entries(name: str) -> None:
    indices, base, _ = entries(5)
    coded, loss = encode_values(indices, base, base, VALUE_CODES[name])
    assert torch.equal(coded.decode_entries(base), base) and loss.share == 0
    none = encode_values(indices[:0], base[:0], base[:0], VALUE_CODES[name])[0]
    none.validate("w")
    assert none.decode(base).values.numel() == 0


@pytest.mark.parametrize(
    ("name", "levels", "packed"),
    [
        ("sign", [1, -1, -1, 1, 1, 1, 1, -1, -1], "6180"),
        ("int4", [1, -1, 7, -7, 0], "1f7900"),
        ("int8", [1, -1, 127, -127, 0], "01ff7f8100"),
    ],
)
def test_golden_bytes(name: str, levels: list[int], packed: str) -> None:
    code = VALUE_CODES[name]
    found = pack_levels(torch.tensor(levels, dtype=torch.int8), code)
    assert bytes(found.tolist()).hex() == packed and found.numel() == code.num_bytes(len(levels))
    assert unpack_levels(found, len(levels), code, "w").tolist() == levels


@given(data=st.data())
def test_levels_survive_packing(data: st.DataObject) -> None:
    code = VALUE_CODES[data.draw(st.sampled_from(CODES))]
    allowed = st.sampled_from([-1, 1]) if code.bits == 1 else st.integers(-code.max_level, code.max_level)
    levels = torch.tensor(data.draw(st.lists(allowed, max_size=300)), dtype=torch.int8)
    assert torch.equal(unpack_levels(pack_levels(levels, code), levels.numel(), code, "w"), levels)


def test_the_file_holds_what_the_format_says() -> None:
    code, indices = VALUE_CODES["sign"], torch.tensor([1, 2, 7, 10])
    part = ScaledTensor(indices, torch.tensor([1, -1, -1, 1], dtype=torch.int8), torch.tensor([0.5]), code)
    state = Patch({"layer.3.weight": part}).to_tensors()
    assert bytes(state["graft_patch.table"].tolist()) == b'{"sign":{"layer.*.weight":{"3":[4,4]}}}'
    packed = bytes.fromhex("01006120") + struct.pack("<f", 0.5) + b"\x60"
    assert bytes(state["graft_patch.packed"].tolist()) == packed
    base = torch.arange(12.0)
    decoded = Patch.from_tensors(state).decode(lambda name: base).plain["layer.3.weight"]
    assert decoded.values.tolist() == [1.5, 1.5, 6.5, 10.5] and torch.equal(decoded.indices, indices)


@pytest.mark.parametrize("name", CODES)
def test_reading_and_writing_again_gives_the_same_bytes(name: str) -> None:
    parts = {}
    for number, count in enumerate((1, 7, 128, 129, 1000)):
        indices, base, donor = entries(count, seed=number)
        parts[f"blocks.{number}.weight"] = encode_values(indices, donor, base, VALUE_CODES[name])[0]
    state = Patch(parts).to_tensors()
    again = Patch.from_tensors(state)
    assert again.num_params == Patch(parts).num_params == 1265
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.to_tensors().items())


def test_what_needs_the_base_says_so() -> None:
    indices, base, donor = entries(9)
    coded, _ = encode_values(indices, donor, base, VALUE_CODES["sign"])
    patch = Patch({"a.w": coded, "b.w": TensorPatch(indices, donor)})
    with pytest.raises(PatchError, match=r"values must be plain here, got the code 'sign' in \['a.w'\] \(1 tensors\)"):
        _ = patch.plain
    assert set(patch.indices) == {"a.w", "b.w"}
    whole = torch.zeros(200).index_copy(0, indices, base)
    decoded = patch.decode({"a.w": whole}.__getitem__)
    assert decoded.plain.keys() == {"a.w", "b.w"} and decoded.decode(lambda name: whole) is decoded


def test_values_that_overflow_are_refused() -> None:
    code = VALUE_CODES["int8"]
    part = ScaledTensor(torch.tensor([0]), torch.tensor([127], dtype=torch.int8), torch.tensor([3e38]), code)
    with pytest.raises(PatchError, match=r"decoded values must be finite, got 1 NaN or Inf in 'a.w'"):
        Patch({"a.w": part}).decode(lambda name: torch.zeros(3))


@pytest.mark.parametrize(
    ("levels", "scales", "message"),
    [
        (torch.ones(2, dtype=torch.int8), torch.ones(1), r"levels must be int8 of shape \(3,\)"),
        (torch.ones(3), torch.ones(1), r"levels must be int8 of shape \(3,\)"),
        (torch.tensor([1, 0, -1], dtype=torch.int8), torch.ones(1), "levels must be those of 'sign', got 0"),
        (torch.ones(3, dtype=torch.int8), torch.ones(2), r"scales must be float32 of shape \(1,\)"),
        (torch.ones(3, dtype=torch.int8), torch.ones(1).double(), r"scales must be float32 of shape \(1,\)"),
        (torch.ones(3, dtype=torch.int8), torch.tensor([-1.0]), "scales must be finite and not negative, got -1.0"),
        (torch.ones(3, dtype=torch.int8), torch.tensor([torch.nan]), "scales must be finite and not negative, got nan"),
    ],
)
def test_malformed_codes_are_refused(levels: torch.Tensor, scales: torch.Tensor, message: str) -> None:
    part = ScaledTensor(torch.tensor([1, 2, 3]), levels, scales, VALUE_CODES["sign"])
    with pytest.raises(PatchError, match=f"{message}.*in 'a.w'"):
        Patch({"a.w": part}).validate()


@pytest.mark.parametrize("name", CODES)
def test_candidates_that_are_taken_have_the_values_that_are_saved(name: str) -> None:
    indices, base, donor = entries(400)
    mask = torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.5
    values = encode_candidates(donor, base, mask, VALUE_CODES[name])
    coded, _ = encode_values(indices[mask], donor[mask], base[mask], VALUE_CODES[name])
    assert torch.equal(values[mask], coded.decode_entries(base[mask]))
    assert torch.equal((values - base).sign()[~mask], (donor - base).sign()[~mask])
    nothing = encode_candidates(donor, base, torch.zeros_like(mask), VALUE_CODES[name])
    assert torch.equal((nothing - base).sign(), (donor - base).sign())


def test_a_code_that_loses_much_is_named() -> None:
    indices, base, donor = entries(1000)
    code = VALUE_CODES["sign"]
    flat = encode_values(indices, base + 0.01 * (donor - base).sign(), base, code)[1]
    wide = encode_values(indices, donor, base, code)[1]
    assert describe_loss({"a.w": flat}, code) is None
    note = describe_loss({"a.w": flat, "b.w": wide}, code)
    assert note is not None and "1 of 2 (b.w 60%)" in note and "values='int4'" in note and "a.w" not in note
