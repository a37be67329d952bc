"""Step codec: code a donor bit for bit as its distance from a base of which the reader has every bit.

Training moves an entry by a number of steps in the last place of its dtype, and how many is mostly told by the base
entry's exponent: a small entry has small steps, and takes many; a large one takes none. So the entries are grouped by
the base's exponent, and the steps of each group are coded by themselves. The bytes are specified in
`docs/patch_format.md`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .byte_streams import ByteReader, class_of, classify, declassify, extra_bits, open_bits, stream, varint
from .index_codec import Bytes, Integers, broken

Bits = npt.NDArray[Any]  # unsigned integers: the bits of floating-point numbers
Counts = npt.NDArray[np.float64]

# Entries that are coded together at most: this bounds the memory of both sides.
MAX_ENTRIES = 1 << 21
# The bits of the exponent and of the mantissa of every dtype that can be coded.
EXPONENT_AND_MANTISSA = {
    torch.float32: (8, 23),
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
    torch.float8_e4m3fn: (4, 3),
    torch.float8_e5m2: (5, 2),
}

_PLANES, _STEPS = range(2)
_UNCHANGED, _DENSE, _SPARSE = range(3)
# Steps in a byte, by the number of symbols of a step; with one symbol every step is coded as a class.
_PER_BYTE = {1: 0, 2: 8, 3: 5, 4: 4, 6: 3, 16: 2}
_FEW = _SPARSE, 3
_GAP_DETAIL = 3
_CHUNK = 1 << 17  # entries whose temporary arrays stay in the cache
_SAMPLE = 1 << 15
# A group of its own must save this share of all bits, and these bits: about those of its tables.
_MIN_SHARE, _MIN_BITS = 2e-4, 400
# Bits of a symbol in a Huffman code beyond the ideal.
_REDUNDANCY = 0.03
# Bits of the length of a symbol's code, of which every stream has a table.
_TABLE = 3.5


class _Layout(NamedTuple):
    """The fields of a floating-point dtype, as unsigned integers.

    Attributes:
        bits: Dtype of the unsigned integers.
        signed: Dtype of the signed ones.
        width: Number of bits.
        mantissa: Number of bits below the exponent.
        exponents: Number of exponents.
        detail: Classes of a step have 2**detail to an octave.
    """

    bits: Any
    signed: Any
    width: int
    mantissa: int
    exponents: int
    detail: int


def encode_steps(base: torch.Tensor, donor: torch.Tensor) -> bytes:
    """Encode a donor's entries, given the base's.

    Args:
        base: Floating-point of shape (n,), n at most 2**21, of one of the dtypes of `EXPONENT_AND_MANTISSA`.
        donor: The same for the donor: any bits, NaN and Inf included.

    Returns:
        The code. It is never longer than the donor by more than a few bytes.
    """
    layout = _layout(base.dtype)
    ours, theirs = bits_of(base), bits_of(donor)
    steps = _encode_groups(ours, theirs, layout)
    # A donor that shares no more than its exponents with the base is told as well without it.
    return steps if len(steps) < theirs.nbytes // 2 else min(steps, _encode_planes(theirs), key=len)


def decode_steps(code: Bytes, base: torch.Tensor, where: str = "") -> torch.Tensor:
    """Decode untrusted bytes in the format of `encode_steps`.

    Memory stays within a small multiple of n plus the size of `code`, whatever the bytes are. Another base than the
    encoder's gives an error or other values, which only a checksum can tell.

    Args:
        code: uint8 of shape (bytes,).
        base: The base's entries, floating-point of shape (n,).
        where: Name of the tensor, for error messages.

    Returns:
        The donor's entries, of shape (n,) and the base's dtype.

    Raises:
        PatchError: The bytes are not a code of n entries on this base.
    """
    reader, ours, layout = ByteReader(code, where), bits_of(base), _layout(base.dtype)
    if ours.size > MAX_ENTRIES:
        raise broken("entries of a coded block", f"at most {MAX_ENTRIES}", str(ours.size), where)
    kind = reader.byte()
    if kind not in (_PLANES, _STEPS):
        raise broken("kind of a coded block", "0 (planes) or 1 (steps)", str(kind), where)
    theirs = (_decode_planes if kind == _PLANES else _decode_groups)(reader, ours, layout)
    reader.require_end()
    return torch.from_numpy(theirs.view(np.uint8)).view(base.dtype)


def _layout(dtype: torch.dtype) -> _Layout:
    exponent, mantissa = EXPONENT_AND_MANTISSA[dtype]
    width = 1 + exponent + mantissa
    bits, signed = np.dtype(f"<u{width // 8}"), np.dtype(f"<i{width // 8}")
    return _Layout(bits, signed, width, mantissa, 1 << exponent, 1 if width == 32 else 2)


def _exponents(base: Bits, layout: _Layout) -> Bytes:
    return (base >> layout.bits.type(layout.mantissa)).astype(np.uint8) & np.uint8(layout.exponents - 1)


def bits_of(values: torch.Tensor) -> Bits:
    """Return the bits of floating-point numbers as unsigned integers, flat.

    Args:
        values: Of any shape, and of a dtype of `EXPONENT_AND_MANTISSA`.
    """
    flat = values.detach().cpu().contiguous().view(-1)
    found: Bits = flat.view(torch.uint8).numpy().view(_layout(values.dtype).bits)
    return found


# Groups of entries by the base's exponent -----------------------------------------------------------------------------


class _Groups:
    """The entries of a base, grouped by exponent.

    Args:
        base: Bits of the base, of shape (n,).
        bounds: First exponent of every group but the first, strictly increasing.
        layout: Fields of the dtype.
    """

    def __init__(self, base: Bits, bounds: Sequence[int], layout: _Layout) -> None:
        self.count = len(bounds) + 1
        self._exponents = _exponents(base, layout)
        self._firsts = [0, *bounds, layout.exponents]
        # The smallest exponents together: one scan of all entries finds them, and scans of these tell them apart.
        below = np.cumsum(np.bincount(self._exponents[:: max(1, base.size // _SAMPLE)], minlength=layout.exponents))
        self._low = sum(int(below[bound - 1]) < below[-1] // 6 for bound in bounds)

    def members(self, wanted: Sequence[int]) -> Iterator[tuple[slice, dict[int, Integers]]]:
        """Yield, chunk by chunk, where the chunk is and the positions in it of the entries of each wanted group."""
        low = [group for group in wanted if group < self._low]
        for where, chunk in self._chunks():
            found = {}
            if len(low) > 1:
                (together,) = (chunk < self._firsts[self._low]).nonzero()
                among = chunk.take(together)
                found = {group: together.take(self._mask(among, group).nonzero()[0]) for group in low}
            for group in wanted:
                if group not in found:
                    (found[group],) = self._mask(chunk, group).nonzero()
            yield where, found

    def changed(self, steps: Bits, group: int) -> bool:
        """Return whether any entry of a group has a step."""
        return any(bool(np.any(self._mask(chunk, group) & (steps[where] != 0))) for where, chunk in self._chunks())

    def _chunks(self) -> Iterator[tuple[slice, Bytes]]:
        for start in range(0, self._exponents.size, _CHUNK):
            where = slice(start, start + _CHUNK)
            yield where, self._exponents[where]

    def _mask(self, exponents: Bytes, group: int) -> npt.NDArray[np.bool_]:
        first, end = self._firsts[group : group + 2]
        if end == first + 1:
            return exponents == first
        mask: npt.NDArray[np.bool_] = (exponents - np.uint8(first)) <= np.uint8(end - first - 1)
        return mask


def _encode_groups(base: Bits, donor: Bits, layout: _Layout) -> bytes:
    sample = _Sample(base, donor, layout)
    bounds = sample.choose_bounds()
    groups, steps = _Groups(base, bounds, layout), donor - base
    forms = sample.choose_forms(bounds)
    wanted = [k for k, form in enumerate(forms) if form[0] != _UNCHANGED or groups.changed(steps, k)]
    parts: dict[int, list[Bits]] = {group: [] for group in wanted}
    for where, found in groups.members(wanted):
        here = steps[where]
        for group in wanted:
            parts[group].append(here.take(found[group]))
    out = bytearray([_STEPS]) + varint(len(bounds)) + bytes(bounds)
    for group, form in enumerate(forms):
        if group in parts:
            # A group of which the sample has no change has few.
            form = _FEW if form[0] == _UNCHANGED else form
            _encode_group(out, np.concatenate(parts.pop(group)), form, layout)
        else:
            out.append(_UNCHANGED)
    return bytes(out)


def _decode_groups(reader: ByteReader, base: Bits, layout: _Layout) -> Bits:
    bounds = [reader.byte() for _ in range(reader.varint(layout.exponents - 1))]
    if any(b >= layout.exponents or a >= b for a, b in zip([0, *bounds], bounds, strict=False)):
        raise broken("exponents of groups", f"increasing and below {layout.exponents}", str(bounds), reader.where)
    groups = _Groups(base, bounds, layout)
    coded = {}
    for group in range(groups.count):
        form = reader.byte()
        if form not in (_UNCHANGED, _DENSE, _SPARSE):
            raise broken("form of a group", "0 (unchanged), 1 (dense) or 2 (sparse)", str(form), reader.where)
        if form != _UNCHANGED:
            coded[group] = _decode_group(reader, form, base.size, layout)
    donor, done = base.copy(), dict.fromkeys(coded, 0)
    moves = np.empty(min(_CHUNK, base.size), layout.bits)
    for where, found in groups.members([*coded]):
        here = moves[: donor[where].size]
        here[:] = 0
        for group, members in found.items():
            steps, positions, size = coded[group]
            start = done[group]
            done[group] += members.size
            if done[group] > size:
                break
            if positions is None:
                here[members] = steps[start : done[group]]
            else:
                first, last = np.searchsorted(positions, (start, done[group]))
                here[members.take(positions[first:last] - start)] = steps[first:last]
        donor[where] += here
    for group, each in coded.items():
        if done[group] != each.size:
            raise broken(f"base's entries in group {group}", str(each.size), str(done[group]), reader.where)
    return donor


def _encode_group(out: bytearray, steps: Bits, form: tuple[int, int], layout: _Layout) -> None:
    """Write the steps of a group's entries: of all (dense), or of the positions that change (sparse)."""
    kind, symbols = form
    out += bytes(form) + varint(steps.size)
    if kind == _SPARSE:
        positions = np.flatnonzero(steps)
        steps = steps.take(positions)
        out += varint(positions.size)
        classes, count, extra = classify(np.diff(positions, prepend=-1) - 1, _GAP_DETAIL)
        out += stream(classes.astype(np.uint8)) + extra_bits(count, extra)
    if symbols > 1:
        ranks = _ranks(steps) - layout.bits.type(kind == _SPARSE)
        tokens = np.minimum(ranks, layout.bits.type(symbols - 1)).astype(np.uint8)
        out += stream(_join_tokens(tokens, symbols))
        steps = steps[tokens == symbols - 1]
    if steps.size:
        classes, count, extra = _classes(steps, layout)
        out += stream(classes.astype(np.uint8)) + extra_bits(count, extra)


class _GroupSteps(NamedTuple):
    """The steps of a group's entries.

    Attributes:
        steps: The steps, modulo 2**width.
        positions: Which entries of the group take them, increasing; None for all.
        size: Number of entries of the group.
    """

    steps: Bits
    positions: Integers | None
    size: int


def _decode_group(reader: ByteReader, form: int, most: int, layout: _Layout) -> _GroupSteps:
    symbols = reader.byte()
    if symbols not in _PER_BYTE:
        raise broken("symbols of a step", f"one of {[*_PER_BYTE]}", str(symbols), reader.where)
    size = count = reader.varint(most)
    positions = None
    if form == _SPARSE:
        count = reader.varint(size)
        positions = _read_positions(reader, count, size)
    if symbols == 1:
        return _GroupSteps(_read_classes(reader, count, layout), positions, size)
    # The step of every token; the last one stands for a step that is coded as a class, and gets one that no token has.
    table = _steps_of(np.arange(symbols) + int(form == _SPARSE), layout)
    table[-1] = 1 << layout.width - 1
    steps = _split_tokens(reader.stream(-(-count // _PER_BYTE[symbols])), table, count, reader.where)
    (large,) = (steps == table[-1]).nonzero()
    steps[large] = _read_classes(reader, large.size, layout)
    return _GroupSteps(steps, positions, size)


# The choice of groups and forms, from a sample ------------------------------------------------------------------------


class _Sample:
    """Counts of steps by exponent among evenly spaced entries, to choose groups of exponents and the form of each.

    Args:
        base: Bits of the base.
        donor: Bits of the donor.
        layout: Fields of the dtype.
    """

    def __init__(self, base: Bits, donor: Bits, layout: _Layout) -> None:
        stride = max(1, base.size // _SAMPLE)
        ours = base[::stride]
        steps = donor[::stride] - ours
        exponents = _exponents(ours, layout).astype(np.int64)
        classes, count, _ = _classes(steps, layout)
        ranks = np.minimum(_ranks(steps), 16).astype(np.int64)

        def count_by_exponent(numbers: Integers, size: int, weights: Integers | None = None) -> Counts:
            found = np.bincount(exponents * size + numbers, weights, layout.exponents * size)
            return found.reshape(layout.exponents, size).astype(np.float64) * stride

        self._classes = count_by_exponent(classes.astype(np.int64), 256)
        self._ranks = count_by_exponent(ranks, 17)[:, :16]
        self._open = count_by_exponent(np.zeros_like(exponents), 1, count)[:, 0]

    def choose_bounds(self) -> list[int]:
        """Return the first exponent of every group but the first: neighbours are joined where that costs little."""
        held = np.flatnonzero(self._classes.any(axis=1)).tolist()
        least = max(_MIN_BITS, _MIN_SHARE * (_bits_of(self._classes[held]).sum() + self._open.sum()))
        firsts, counts = held[:1], [self._classes[exponent] for exponent in held[:1]]
        for exponent in held[1:]:
            pair = np.stack([counts[-1], self._classes[exponent], counts[-1] + self._classes[exponent]])
            one, other, both = _bits_of(pair)
            if both - one - other < least:
                counts[-1] = pair[2]
            else:
                firsts.append(exponent)
                counts.append(self._classes[exponent])
        return firsts[1:]

    def choose_forms(self, bounds: Sequence[int]) -> list[tuple[int, int]]:
        """Return the shortest form of each group and its number of symbols, by an estimate."""
        starts = [0, *bounds]
        classes, ranks = (np.add.reduceat(counts, starts, axis=0) for counts in (self._classes, self._ranks))
        return [self._choose_form(*group) for group in zip(classes, ranks, strict=True)]

    @staticmethod
    def _choose_form(classes: Counts, ranks: Counts) -> tuple[int, int]:
        size = float(classes.sum())
        if ranks[0] == size:
            return _UNCHANGED, _FEW[1]
        # Sums over the smallest steps, which are tokens in one form and classes in another.
        counts, terms = (np.cumsum(np.append(0, each)).tolist() for each in (ranks, _n_log_n(ranks)))
        terms_of_all, different = float(_n_log_n(classes).sum()), int(np.count_nonzero(classes))
        best, choice = math.inf, (_DENSE, 1)
        for form in _forms_of(1 - float(ranks[0]) / size):
            first = int(form == _SPARSE)
            total, places = size - counts[first], 0.0
            if form == _SPARSE:
                places = _log_n(size) - _log_n(total) - _log_n(counts[1]) + _REDUNDANCY * total
                places += _TABLE * min(total, 8 * math.log2(size / total) + 24)
            for symbols, per_byte in _PER_BYTE.items():
                last = first + symbols - 1
                rest = size - counts[last]
                cost = places + max(rest, _log_n(rest) - (terms_of_all - terms[last]) + _REDUNDANCY * rest)
                cost += _TABLE * (different if symbols == 1 else min(total / per_byte, symbols**per_byte))
                if symbols > 1:
                    ideal = _log_n(total) - (terms[last] - terms[first]) - _log_n(rest)
                    cost += ideal + _redundancy(max(ranks[first], rest) / total, per_byte) * total / per_byte
                if cost < best:
                    best, choice = cost, (form, symbols)
        return choice


def _forms_of(changed: float) -> tuple[int, ...]:
    """Return the forms that can be the shortest where this share of a group's entries changes."""
    return (_SPARSE,) if changed < 0.02 else (_DENSE,) if changed > 0.4 else (_DENSE, _SPARSE)


def _log_n(count: float) -> float:
    return count * math.log2(count) if count > 0 else 0.0


def _n_log_n(counts: Counts) -> Counts:
    return counts * np.log2(counts, out=np.zeros_like(counts), where=counts > 0)


def _bits_of(counts: Counts) -> Counts:
    """Return the bits of symbols that occur so often, for every row, in an ideal code."""
    return _n_log_n(counts.sum(axis=1)) - _n_log_n(counts).sum(axis=1)


def _redundancy(top: float, per_byte: int) -> float:
    """Estimate what a byte takes in a Huffman code beyond the ideal; every byte takes a bit, also the most frequent."""
    share = top**per_byte
    return _REDUNDANCY if share < 0.5 else max(1 + _log_n(share) + _log_n(1 - share), _REDUNDANCY)


# Steps as tokens and as classes ---------------------------------------------------------------------------------------


def _ranks(steps: Bits) -> Bits:
    """Rank steps by size: 0, -1, 1, -2, 2, ... become 0, 1, 2, 3, 4, ..."""
    signed = steps.view(np.dtype(f"i{steps.itemsize}"))
    ranks: Bits = ((signed << 1) ^ (signed >> (8 * steps.itemsize - 1))).view(steps.dtype)
    return ranks


def _steps_of(ranks: Integers, layout: _Layout) -> Bits:
    return ((ranks >> 1) ^ -(ranks & 1)).astype(layout.bits)


def _join_tokens(tokens: Bytes, symbols: int) -> Bytes:
    """Write tokens as digits, several to a byte, the first one highest; the last byte is filled with zeros."""
    per_byte = _PER_BYTE[symbols]
    padded = np.zeros(-(-tokens.size // per_byte) * per_byte, np.uint8)
    padded[: tokens.size] = tokens
    digits = padded.reshape(-1, per_byte)
    joined = digits[:, 0].copy()
    for k in range(1, per_byte):
        joined *= np.uint8(symbols)
        joined += digits[:, k]
    return joined


def _split_tokens(joined: Bytes, table: Bits, size: int, where: str) -> Bits:
    """Return the step that `table` has for each of the tokens."""
    symbols = table.size
    per_byte = _PER_BYTE[symbols]
    if joined.max(initial=0) >= symbols**per_byte:
        raise broken("coded steps", f"below {symbols**per_byte} in a byte", str(int(joined.max())), where)
    powers = symbols ** np.arange(per_byte - 1, -1, -1)
    steps = table[np.arange(symbols**per_byte)[:, None] // powers % symbols].take(joined, axis=0).reshape(-1)
    if (steps[size:] != table[0]).any():
        raise broken("coded steps", f"{size} and then zeros", "more of them", where)
    return steps[:size]


def _classes(steps: Bits, layout: _Layout) -> tuple[Integers, Integers, Integers]:
    """Split steps into classes of their size, with the change of sign of entry and step, and lower bits."""
    half = layout.width - 1
    signed = steps.view(layout.signed).astype(np.int32)
    flips = ((signed >> half) ^ (signed >> half - 1)) & 1
    signed ^= -flips << half
    negative = signed >> 31 & 1
    classes, count, extra = classify(signed ^ -negative, layout.detail)
    return classes << 2 | flips << 1 | negative, count, extra


def _read_classes(reader: ByteReader, size: int, layout: _Layout) -> Bits:
    """Read steps that are coded as classes."""
    if not size:
        return np.zeros(0, layout.bits)
    coded = reader.stream(size)
    most = 4 * class_of((1 << layout.width - 2) - 1, layout.detail) + 3
    if coded.max() > most:
        raise broken("classes of steps", f"at most {most}", str(int(coded.max())), reader.where)
    table = np.arange(most + 1, dtype=np.int32)
    extra = reader.extra_bits(open_bits(table >> 2, layout.detail).take(coded))
    numbers = declassify(table >> 2, np.zeros_like(table), layout.detail).take(coded) + extra
    numbers ^= (-(table & 1) ^ -(table >> 1 & 1) << layout.width - 1).take(coded)
    return numbers.astype(layout.bits)


def _read_positions(reader: ByteReader, count: int, size: int) -> Integers:
    """Read increasing positions below `size`."""
    coded = reader.stream(count)
    most = class_of(MAX_ENTRIES - 1, _GAP_DETAIL)
    if coded.max(initial=0) > most:
        raise broken("classes of gaps", f"at most {most}", str(int(coded.max())), reader.where)
    table = np.arange(most + 1)
    extra = reader.extra_bits(open_bits(table, _GAP_DETAIL).take(coded))
    gaps = declassify(table, np.zeros_like(table), _GAP_DETAIL).take(coded) + extra
    positions = np.cumsum(gaps + 1) - 1
    if count and positions[-1] >= size:
        raise broken("positions in a group", f"below {size}", str(int(positions[-1])), reader.where)
    return positions


# Bytes of the donor by significance -----------------------------------------------------------------------------------


def _encode_planes(donor: Bits) -> bytes:
    planes = donor.view(np.uint8).reshape(-1, donor.itemsize)
    return bytes([_PLANES]) + b"".join(stream(np.ascontiguousarray(plane)) for plane in planes.T)


def _decode_planes(reader: ByteReader, base: Bits, layout: _Layout) -> Bits:
    planes = np.empty((base.size, base.itemsize), np.uint8)
    for k in range(base.itemsize):
        planes[:, k] = reader.stream(base.size)
    return planes.reshape(-1).view(layout.bits)
