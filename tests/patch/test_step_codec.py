"""The step codec: every bit comes back, at about the entropy given the base's exponents; bad bytes are refused."""

from __future__ import annotations

import zlib
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_graft.patch.patch import PatchError
from peft_graft.patch.step_codec import EXPONENT_AND_MANTISSA, MAX_ENTRIES, bits_of, decode_steps, encode_steps

DTYPES = sorted(EXPONENT_AND_MANTISSA, key=str)


def as_array(code: bytes) -> np.ndarray:
    return np.frombuffer(code, np.uint8)


def pair(
    size: int, scale: float, dtype: torch.dtype = torch.bfloat16, share: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and the same after a Gaussian change of a share of them, both rounded to the dtype."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 0.03).to(dtype)
    delta = torch.randn(size, generator=generator) * scale
    moved = torch.rand(size, generator=generator) < share
    return base, torch.where(moved, base.float() + delta, base.float()).to(dtype)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and np.array_equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0, 1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("size", [0, 1, 9, 3000])
def test_every_bit_of_the_donor_comes_back(dtype: torch.dtype, scale: float, size: int) -> None:
    base, donor = pair(size, scale, dtype)
    assert same_bits(decode_steps(as_array(encode_steps(base, donor)), base), donor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_bits_come_back_whatever_the_base_has(dtype: torch.dtype) -> None:
    """NaN with any payload, infinities, both zeros and subnormals, on either side."""
    generator = np.random.default_rng(0)
    base, donor = (torch.from_numpy(generator.integers(0, 256, 4096 * 4, np.uint8)).view(dtype) for _ in range(2))
    donor = torch.where(torch.arange(donor.numel()) % 3 == 0, base.view(torch.uint8).view(dtype), donor)
    assert same_bits(decode_steps(as_array(encode_steps(base, donor)), base), donor)


@given(
    st.sampled_from(DTYPES),
    st.integers(0, 5000),
    st.sampled_from([0.0, 1e-7, 1e-5, 1e-4, 1e-2, 10.0]),
    st.sampled_from([0.001, 0.1, 1.0]),
    st.integers(0, 9),
)
@example(torch.bfloat16, 300_000, 2e-5, 1.0, 0)  # several chunks, and every form of a group
@settings(max_examples=25, deadline=None)
def test_coding_is_lossless(dtype: torch.dtype, size: int, scale: float, share: float, seed: int) -> None:
    base, donor = pair(size, scale, dtype, share, seed)
    code = encode_steps(base, donor)
    assert same_bits(decode_steps(as_array(code), base), donor)
    assert len(code) <= donor.numel() * dtype.itemsize + 16


def conditional_entropy(base: torch.Tensor, donor: torch.Tensor) -> float:
    """Return the bytes of the steps in an ideal code that knows how often each occurs beside each exponent."""
    ours, theirs = bits_of(base), bits_of(donor)
    exponents = ours >> 7 & 255
    _, joint = np.unique(exponents.astype(np.uint32) << 16 | (theirs - ours), return_counts=True)
    _, alone = np.unique(exponents, return_counts=True)
    return float((alone * np.log2(alone)).sum() - (joint * np.log2(joint)).sum()) / 8


@pytest.mark.parametrize("scale", [1e-5, 1e-4])
def test_a_code_takes_little_more_than_the_entropy_given_the_exponents(scale: float) -> None:
    base, donor = pair(1 << 20, scale)
    assert len(encode_steps(base, donor)) < 1.05 * conditional_entropy(base, donor)


def test_an_unchanged_block_takes_a_few_bytes() -> None:
    base, _ = pair(100_000, 0)
    assert len(encode_steps(base, base)) < 32


def test_a_change_that_no_sample_sees_is_kept() -> None:
    base, donor = pair(200_000, 0)
    donor[77_777] += 1
    code = encode_steps(base, donor)
    assert same_bits(decode_steps(as_array(code), base), donor) and len(code) < 64


def test_an_unrelated_donor_takes_no_more_than_its_own_bytes() -> None:
    for dtype in DTYPES:
        noise = torch.randint(0, 256, (30_000 * dtype.itemsize,), dtype=torch.uint8).view(dtype)
        assert len(encode_steps(pair(30_000, 0, dtype)[0], noise)) <= 1.01 * 30_000 * dtype.itemsize


def bfloat16(*bits: int) -> torch.Tensor:
    return torch.from_numpy(np.array(bits, np.uint16).view(np.int16)).view(torch.bfloat16)


BASE = bfloat16(0x3C00, 0xBC01, 0x3C02, 0x0000)
# The example of docs/patch_format.md: one group of four entries with the steps 1, 0, -1, 300.
EXAMPLE = bytes.fromhex("01 00  01 04 04  00 87  00 70 34")


def test_the_example_of_the_format_is_read() -> None:
    decoded = decode_steps(as_array(EXAMPLE), BASE)
    assert bits_of(decoded).tolist() == [0x3C01, 0xBC01, 0x3C01, 0x012C]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("", "coded block must be 1 bytes"),
        ("02", "kind of a coded block must be 0 .planes. or 1 .steps., got 2"),
        ("01", "coded block must be 1 bytes from byte 1 on"),
        ("01 01 00 00 00", "exponents of groups must be increasing and below 256, got .0."),
        ("01 02 05 05 00 00 00", "exponents of groups must be increasing"),
        ("01 80 00 00", "number in a coded block must be in .0, 255. and in its shortest form"),
        ("01 ff ff ff ff ff ff ff ff ff ff ff", "number in a coded block must be"),
        ("01 00 03", "form of a group must be 0 .unchanged., 1 .dense. or 2 .sparse., got 3"),
        ("01 00 01 05 04", "symbols of a step must be one of .1, 2, 3, 4, 6, 16., got 5"),
        ("01 00 01 03 05 00 bd", "number in a coded block must be in .0, 4."),
        ("01 00 01 03 03 00 00", "base's entries in group 0 must be 3, got 4"),
        ("01 00 01 03 04 00 f3", "coded steps must be below 243 in a byte, got 243"),
        ("01 00 01 03 04 00 01", "coded steps must be 4 and then zeros"),
        ("01 00 01 03 04 01 bd", "number in a coded block must be in .0, 0."),
        ("01 00 01 01 04 00 ff ff ff ff", "classes of steps must be at most 207, got 255"),
        ("01 00 01 01 04 00 20 20 20 20 01", "planes of a coded block must be padded with zeros"),
        ("01 00 02 01 04 05", "number in a coded block must be in .0, 4."),
        ("01 00 02 01 04 01 00 a8", "classes of gaps must be at most 15"),
        ("01 00 02 01 04 01 00 04 00 00", "positions in a group must be below 4, got 4"),
        ("01 00 00 00", "coded block must be 3 bytes, got 4"),
        ("00 00 01 02 03", "coded block must be 4 bytes from byte 2 on, got 3"),
    ],
)
def test_malformed_codes_are_refused_by_name(code: str, message: str) -> None:
    with pytest.raises(PatchError, match=message) as error:
        decode_steps(as_array(bytes.fromhex(code)), BASE, "h.0.weight")
    assert "'h.0.weight'" in str(error.value)


def test_streams_that_inflate_to_another_size_are_refused() -> None:
    base, donor = pair(4096, 1e-3)

    def with_plane(raw: bytes) -> bytes:
        compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
        coded = compressor.compress(raw) + compressor.flush()
        return bytes([0, len(coded)]) + coded + bytes([0]) + bytes(4096)

    assert same_bits(decode_steps(as_array(with_plane(bytes(4096))), base), torch.zeros_like(base))
    for wrong in (bytes(4095), bytes(4097), bytes(1 << 16)):
        with pytest.raises(PatchError, match="stream of a coded block must be one of 4096 bytes"):
            decode_steps(as_array(with_plane(wrong)), base)
    with pytest.raises(PatchError, match="stream of a coded block must be as RFC 1951 says"):
        decode_steps(as_array(bytes([0, 3, 255, 255, 255])), base)


def test_more_entries_than_a_block_may_have_are_refused() -> None:
    base = torch.zeros(MAX_ENTRIES + 1, dtype=torch.float8_e5m2)
    with pytest.raises(PatchError, match="entries of a coded block must be at most"):
        decode_steps(as_array(b"\0"), base)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_codes_end_in_an_error_or_in_other_bits(data: st.DataObject) -> None:
    base, donor = pair(2500, 3e-5, data.draw(st.sampled_from(DTYPES)))
    code = bytearray(encode_steps(base, donor))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(code) - 1))
        code[at] = data.draw(st.integers(0, 255))
    code = code[: data.draw(st.integers(0, len(code)))] if data.draw(st.booleans()) else code
    try:
        found = decode_steps(as_array(bytes(code)), base)
    except PatchError:
        return
    assert found.shape == base.shape and found.dtype == base.dtype


def test_another_base_gives_an_error_or_other_bits() -> None:
    base, donor = pair(5000, 1e-4)
    other, _ = pair(5000, 1e-4, seed=1)
    try:
        found = decode_steps(as_array(encode_steps(base, donor)), other)
    except PatchError:
        return
    assert not same_bits(found, donor)


class SlowReader:
    """Read the code of a block number by number, as docs/patch_format.md says it, without the package."""

    def __init__(self, code: bytes, base: list[int], width: int, mantissa: int) -> None:
        self.code, self.at, self.base, self.width, self.mantissa = code, 0, base, width, mantissa

    def take(self, count: int) -> bytes:
        self.at += count
        return self.code[self.at - count : self.at]

    def varint(self) -> int:
        number = shift = 0
        while True:
            (byte,) = self.take(1)
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number

    def stream(self, size: int) -> bytes:
        length = self.varint()
        return zlib.decompress(self.take(length), -15) if length else self.take(size)

    def classes(self, size: int, detail: int, flags: int) -> list[tuple[int, int]]:
        """Return numbers and the flags in the lowest bits of their class bytes."""
        split = [(byte >> flags, byte & (1 << flags) - 1) for byte in self.stream(size)]
        opened = [max((number >> detail) - 1, 0) for number, _ in split]
        lower, bit = [0] * size, 0
        start = self.at
        for k in range(max(opened, default=0)):
            for i in (i for i in range(size) if opened[i] > k):
                lower[i] |= (self.code[start + bit // 8] >> 7 - bit % 8 & 1) << k
                bit += 1
        self.at += -(-bit // 8)
        heads = [number - (k << detail) for (number, _), k in zip(split, opened, strict=True)]
        return [(head << k | low, flag) for head, k, low, (_, flag) in zip(heads, opened, lower, split, strict=True)]

    def steps(self, size: int, symbols: int, first: int) -> list[int]:
        tokens = []
        if symbols > 1:
            per_byte = {2: 8, 3: 5, 4: 4, 6: 3, 16: 2}[symbols]
            for byte in self.stream(-(-size // per_byte)):
                tokens += [byte // symbols**k % symbols for k in reversed(range(per_byte))]
        tokens = tokens[:size] if symbols > 1 else [0] * size
        order = [0, *(sign * k for k in range(1, 9) for sign in (-1, 1))][first:]
        known = [order[token] if token < symbols - 1 else None for token in tokens]
        found = iter(self.classes(known.count(None), 1 if self.width == 32 else 2, 2) if None in known else [])
        return [self.large(*next(found)) if step is None else step for step in known]

    def large(self, number: int, flags: int) -> int:
        number = ~number if flags & 1 else number
        return number + ((flags >> 1) << self.width - 1)

    def decode(self) -> list[int]:
        assert self.take(1) == b"\1"
        bounds = [0, *self.take(self.varint())]
        exponents = [bits >> self.mantissa & (1 << self.width - 1 - self.mantissa) - 1 for bits in self.base]
        donor = list(self.base)
        for group, first in enumerate(bounds):
            end = bounds[group + 1] if group + 1 < len(bounds) else 1 << 16
            where = [i for i, exponent in enumerate(exponents) if first <= exponent < end]
            (form,) = self.take(1)
            if form == 0:
                continue
            (symbols,) = self.take(1)
            assert self.varint() == len(where)
            if form == 2:
                gaps = self.classes(self.varint(), 3, 0)
                where = [where[at + k] for k, at in enumerate(accumulate(gap for gap, _ in gaps))]
            for i, step in zip(where, self.steps(len(where), symbols, int(form == 2)), strict=True):
                donor[i] = (donor[i] + step) % (1 << self.width)
        assert self.at == len(self.code)
        return donor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [3e-6, 1e-4, 3e-2])
def test_a_reader_that_follows_the_format_page_reads_the_same(dtype: torch.dtype, scale: float) -> None:
    base, donor = pair(20_000, scale, dtype, share=0.9)
    base[:6] = torch.tensor([float("nan"), 0.0, -0.0, 1e-30, -1e-30, 5.0]).to(dtype)
    code = encode_steps(base, donor)
    if code[0] == 1:
        exponent, mantissa = EXPONENT_AND_MANTISSA[dtype]
        reader = SlowReader(code, bits_of(base).tolist(), 1 + exponent + mantissa, mantissa)
        assert reader.decode() == bits_of(donor).tolist()
    else:
        assert scale > 1e-3 or dtype == torch.float32


def test_the_example_is_read_by_the_format_page() -> None:
    assert SlowReader(EXAMPLE, bits_of(BASE).tolist(), 16, 7).decode() == [0x3C01, 0xBC01, 0x3C01, 0x012C]
