"""Index codecs: code sorted positions by the gaps between them, and decode untrusted bytes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

MAX_NUMEL = 2**48

_RUN, _RICE, _VARINT = range(3)
CODECS = {_RUN: "run", _RICE: "Rice", _VARINT: "varint"}
_CHUNK = 1 << 16


class PatchError(ValueError):
    """Raised for a patch that is malformed or was made for another base."""


def encode_indices(indices: torch.Tensor) -> torch.Tensor:
    """Encode the flat indices of a tensor's replaced entries by the gaps between them.

    Three codecs are tried and the shortest result is kept: one run, Golomb-Rice, and deflated varints.
    The bytes are specified in `docs/patch_format.md`.

    Args:
        indices: int64 of shape (n,), strictly increasing, each in [0, 2**48).

    Returns:
        uint8 of shape (bytes,). The first byte names the codec.

    Raises:
        PatchError: If `indices` is not as above.
    """
    check_indices(indices, MAX_NUMEL, "")
    flat = indices.cpu().numpy()
    if flat.size == 0 or flat[-1] - flat[0] == flat.size - 1:
        start = flat[:1] if flat.size else np.zeros(1, np.int64)
        return _tagged(_RUN, _varints(start).tobytes())
    gaps = np.empty_like(flat)
    gaps[0] = flat[0]
    np.subtract(flat[1:], flat[:-1], out=gaps[1:])
    gaps[1:] -= 1
    rice, deflated = _encode_rice(gaps), _deflate(gaps)
    return _tagged(_VARINT, deflated) if len(deflated) < len(rice) else _tagged(_RICE, rice)


def decode_indices(blob: torch.Tensor, count: int, numel: int = MAX_NUMEL, where: str = "") -> torch.Tensor:
    """Decode untrusted bytes in the format of `encode_indices`.

    Memory stays within a small multiple of `count` plus the size of `blob`, whatever the bytes are.

    Args:
        blob: uint8 of shape (bytes,).
        count: Expected number of indices.
        numel: Number of entries of the tensor; every index must be below it.
        where: The tensor's name, for error messages.

    Returns:
        int64 of shape (count,), strictly increasing, each in [0, numel).

    Raises:
        PatchError: If `blob` is not a valid code of `count` such indices.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() == 0:
        raise broken(
            "coded indices", "a non-empty vector of uint8", f"{blob.dtype} of shape {tuple(blob.shape)}", where
        )
    if not 0 <= count <= numel <= MAX_NUMEL:
        raise broken("number of entries", f"at most {min(numel, MAX_NUMEL)}", str(count), where)
    codec, payload = int(blob[0]), blob[1:].cpu().contiguous().numpy()
    decoders: dict[int, Callable[[Bytes, int, int, str], Integers]] = {
        _RUN: _decode_run,
        _RICE: _decode_rice,
        _VARINT: _decode_deflated,
    }
    if codec not in decoders:
        raise broken("codec of the indices", "0 (run), 1 (Rice) or 2 (varint)", str(codec), where)
    return torch.from_numpy(decoders[codec](payload, count, numel, where))


def broken(what: str, constraint: str, got: str, where: str) -> PatchError:
    """Build the error for a malformed part of a patch.

    Args:
        what: Name of the part.
        constraint: Constraint that it breaks, after "must be".
        got: Its value.
        where: The tensor's name, empty if there is none.

    Returns:
        The error, for the caller to raise.
    """
    place = f" in {where!r}" if where else ""
    return PatchError(
        f"{what} must be {constraint}, got {got}{place}. Load it onto the base it was made for, or download it again."
    )


def check_indices(indices: torch.Tensor, numel: int, where: str) -> None:
    """Check that indices are distinct entries of a tensor in increasing order.

    Args:
        indices: int64 of shape (n,), strictly increasing, each in [0, numel).
        numel: Number of entries of the tensor.
        where: The tensor's name, for the error message.

    Raises:
        PatchError: If `indices` is not as above.
    """
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise broken("indices", "int64 of shape (n,)", f"{indices.dtype} of shape {tuple(indices.shape)}", where)
    if indices.numel() == 0:
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        raise broken("indices", "strictly increasing", "unsorted or repeated ones", where)
    if int(indices[0]) < 0 or int(indices[-1]) >= numel:
        raise broken("indices", f"in [0, {numel})", f"{int(indices[0])} ... {int(indices[-1])}", where)


def _tagged(codec: int, payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray([codec]) + payload, dtype=torch.uint8)


def _from_gaps(gaps: Integers, numel: int, where: str) -> Integers:
    """Turn gaps into indices, in place."""
    # The float sum is inexact but cannot wrap around, unlike the exact one after it.
    if gaps.size and float(gaps.sum(dtype=np.float64)) <= 2.0 * MAX_NUMEL:
        gaps += 1
        np.cumsum(gaps, out=gaps)
        gaps -= 1
        if gaps[-1] < numel:
            return gaps
    elif not gaps.size:
        return gaps
    raise broken("indices", f"below {numel}", "larger ones", where)


def _width(numel: int) -> int:
    """Return the largest number of bytes of a varint below `numel`."""
    return max(1, -(-max(numel - 1, 0).bit_length() // 7))


def _varints(numbers: Integers) -> Bytes:
    """Encode numbers as unsigned LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    width = _width(int(numbers.max(initial=0)) + 1)
    lengths = np.ones(numbers.size, np.int64)
    for k in range(1, width):
        lengths += numbers >= 1 << 7 * k
    starts = np.cumsum(lengths) - lengths
    coded = np.empty(int(lengths.sum()), np.uint8)
    for k in range(width):
        here = lengths > k
        coded[starts[here] + k] = (numbers[here] >> 7 * k & 127) | (lengths[here] > k + 1) * 128
    return coded


def _read_varints(coded: Bytes, count: int, width: int, where: str) -> Integers:
    ends = np.flatnonzero(coded < 128)
    if ends.size != count or (ends[-1] + 1 if count else 0) != coded.size:
        raise broken("coded indices", f"{count} whole varints", f"{ends.size} and {coded.size} bytes", where)
    start = 0
    for first in range(0, count, _CHUNK):  # the numbers overwrite the ends, block by block
        block = ends[first : first + _CHUNK]
        starts = np.concatenate([[start], block[:-1] + 1])
        start = int(block[-1]) + 1
        lengths = block - starts + 1
        if lengths.max() > width or np.any((lengths > 1) & (coded[block] == 0)):
            raise broken("varints", f"the shortest, of at most {width} bytes", "a longer one", where)
        block[:] = 0
        for k in range(int(lengths.max())):
            here = lengths > k
            block[here] |= (coded[starts[here] + k].astype(np.int64) & 127) << 7 * k
    return ends


def _decode_run(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    start = int(_read_varints(payload, 1, _width(MAX_NUMEL), where)[0])
    if start + count > numel:
        raise broken("indices", f"below {numel}", f"a run of {count} from {start}", where)
    return np.arange(start, start + count, dtype=np.int64)


def _decode_deflated(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    limit = count * _width(numel)
    stream = zlib.decompressobj()
    try:
        # One byte more than is valid, so that a decompression bomb is cut off and still detected.
        coded = stream.decompress(payload.tobytes(), limit + 1)
    except zlib.error as error:
        raise broken("coded indices", "whole deflated varints", str(error), where) from error
    if not stream.eof or stream.unused_data or len(coded) > limit:
        raise broken("coded indices", f"one zlib stream of at most {limit} bytes", "a truncated or longer one", where)
    return _from_gaps(_read_varints(np.frombuffer(coded, np.uint8), count, _width(numel), where), numel, where)


def _deflate(gaps: Integers) -> bytes:
    """Encode gaps as deflated varints."""
    compressor = zlib.compressobj()
    parts = [compressor.compress(_varints(block).tobytes()) for _, block in _blocks(gaps)]
    return b"".join([*parts, compressor.flush()])


def _blocks(numbers: Integers) -> Iterator[tuple[int, Integers]]:
    """Iterate over blocks of numbers with their starts, so that temporary arrays stay small."""
    return ((start, numbers[start : start + _CHUNK]) for start in range(0, numbers.size, _CHUNK))


def _encode_rice(gaps: Integers) -> bytes:
    """Encode gaps as g = q * 2**r + remainder (Golomb 1966, Rice 1979): r bit planes of remainders, then unary q."""

    def cost(r: int) -> int:
        return r * gaps.size + sum(int((block >> r).sum()) for _, block in _blocks(gaps))

    # The cost is convex in r, and least at or below log2 of the mean gap, rounded up, plus one.
    r = int(gaps.mean()).bit_length() + 1
    while r and cost(r - 1) <= cost(r):
        r -= 1
    bits = np.zeros(cost(r) + gaps.size, np.uint8)
    end = r * gaps.size - 1
    for start, block in _blocks(gaps):
        for k in range(r):
            first = k * gaps.size + start
            bits[first : first + block.size] = block >> k & 1
        ends = np.cumsum((block >> r) + 1) + end
        bits[ends] = 1
        end = int(ends[-1])
    return bytes([r]) + np.packbits(bits).tobytes()


def _decode_rice(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    r, packed = int(payload[0]) if payload.size else 255, payload[1:]
    if r > MAX_NUMEL.bit_length() or 8 * packed.size < count * (r + 1):
        raise broken("coded indices", f"Rice codes of {count} entries", f"r = {r} and {packed.size} bytes", where)
    gaps = _read_quotients(packed, r * count, count, where)
    if gaps.max(initial=0) > numel >> r:
        raise broken("indices", f"below {numel}", "larger ones", where)
    gaps <<= r
    for k in range(r):
        for start in range(0, count, _CHUNK):
            block = gaps[start : start + _CHUNK]
            first, skip = divmod(k * count + start, 8)
            plane = np.unpackbits(packed[first : first + (skip + block.size + 7) // 8])[skip : skip + block.size]
            block |= plane.astype(np.int64) << k
    return _from_gaps(gaps, numel, where)


def _read_quotients(packed: Bytes, start: int, count: int, where: str) -> Integers:
    """Read `count` unary numbers from bit `start` on, each the zeros before a one; only padding may follow."""
    first, skip = divmod(start, 8)
    quotients, total, last = np.empty(count, np.int64), 0, -1
    for offset in range(first, packed.size, _CHUNK // 8):
        bits = np.unpackbits(packed[offset : offset + _CHUNK // 8])
        if offset == first:
            bits[:skip] = 0
        ones = np.flatnonzero(bits) + (8 * offset - start)
        if total + ones.size > count:
            total = count + 1
            break
        if ones.size:
            quotients[total : total + ones.size] = np.diff(ones, prepend=last) - 1
            total, last = total + ones.size, int(ones[-1])
    if total != count or 8 * packed.size - start - (last + 1) >= 8:
        raise broken(
            "coded indices", f"Rice codes of {count} entries", "another number of them, or bytes after them", where
        )
    return quotients
