"""Numbers as bytes: varints, Huffman-coded streams, and classes of numbers, written and read from untrusted bytes."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from .index_codec import Bytes, Integers, broken


def varint(number: int) -> bytes:
    """Return a number >= 0 as unsigned LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    coded = bytearray()
    while number > 127:
        coded.append(number & 127 | 128)
        number >>= 7
    return bytes([*coded, number])


def stream(numbers: Bytes) -> bytes:
    """Return bytes in the Huffman code of RFC 1951 behind its length, or as they are, behind 0, where that is shorter.

    Args:
        numbers: uint8 of shape (n,).

    Returns:
        The stream; a reader has to know n.
    """
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    raw = numbers.tobytes()
    coded = compressor.compress(raw) + compressor.flush()
    return varint(len(coded)) + coded if len(coded) < len(raw) else varint(0) + raw


def classify(numbers: Integers, detail: int) -> tuple[Integers, Integers, Integers]:
    """Split numbers into classes, 2**detail to an octave, and the lower bits that a class leaves open.

    Args:
        numbers: Integers >= 0 of shape (n,).
        detail: Logarithm of the number of classes in an octave.

    Returns:
        The class of each number, how many lower bits it leaves open, and these bits.
    """
    octave = (numbers.astype(np.float64).view(np.int64) >> 52) - 1023  # the exponent of float64
    count = np.maximum(octave - detail, 0).astype(numbers.dtype)
    return (count << detail) + (numbers >> count), count, numbers & ((1 << count) - 1)


def open_bits(classes: Integers, detail: int) -> Integers:
    """Return how many lower bits of a number each class leaves open."""
    return np.maximum((classes >> detail) - 1, 0)


def declassify(classes: Integers, extra: Integers, detail: int) -> Integers:
    """Return the numbers of these classes with these lower bits: the inverse of `classify`."""
    count = open_bits(classes, detail)
    return ((classes - (count << detail)) << count) + extra


def class_of(number: int, detail: int) -> int:
    """Return the class of a number."""
    return int(classify(np.array([number]), detail)[0][0])


def extra_bits(count: Integers, extra: Integers) -> bytes:
    """Return lower bits as planes: bit 0 of every number that has one, then bit 1, and so on, padded with zeros.

    Args:
        count: How many bits each number has, int of shape (n,).
        extra: The bits, int of shape (n,).

    Returns:
        The planes; a reader has to know `count`.
    """
    planes = [(extra.take(where) >> k & 1).astype(np.uint8) for k, where in enumerate(_planes(count))]
    return np.packbits(np.concatenate(planes)).tobytes() if planes else b""


def _planes(count: Integers) -> list[npt.NDArray[np.intp]]:
    """Return, for every bit, which numbers have it."""
    planes: list[npt.NDArray[np.intp]] = []
    for k in range(int(count.max(initial=0))):
        planes.append(planes[-1].take((count.take(planes[-1]) > k).nonzero()[0]) if planes else count.nonzero()[0])
    return planes


class ByteReader:
    """Read numbers and streams one after the other from untrusted bytes.

    Args:
        code: uint8 of shape (bytes,).
        where: Name of the tensor, for error messages.
    """

    def __init__(self, code: Bytes, where: str) -> None:
        self._code, self._at, self.where = np.ascontiguousarray(code).data, 0, where

    @property
    def left(self) -> int:
        """Number of bytes that are left."""
        return len(self._code) - self._at

    def take(self, count: int) -> memoryview:
        """Return the next bytes."""
        found = self._code[self._at : self._at + count]
        if len(found) < count:
            raise broken("coded block", f"{count} bytes from byte {self._at} on", f"{len(found)}", self.where)
        self._at += count
        return found

    def byte(self) -> int:
        """Return the next byte."""
        return self.take(1)[0]

    def varint(self, most: int, least: int = 0) -> int:
        """Return the next varint, which must be in [least, most]."""
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                break
        if not least <= number <= most or (shift > 7 and byte == 0):
            constraint = f"in [{least}, {most}] and in its shortest form"
            raise broken("number in a coded block", constraint, str(number), self.where)
        return number

    def stream(self, size: int) -> Bytes:
        """Return the next stream, which must hold `size` bytes."""
        length = self.varint(max(size - 1, 0))
        if not length:
            return np.frombuffer(self.take(size), np.uint8)
        inflater = zlib.decompressobj(-15)
        try:
            # One byte more than is valid, so that a longer stream is cut off and still detected.
            raw = inflater.decompress(self.take(length), size + 1)
        except zlib.error as error:
            raise broken("stream of a coded block", "as RFC 1951 says", str(error), self.where) from error
        if len(raw) != size or not inflater.eof or inflater.unused_data:
            raise broken("stream of a coded block", f"one of {size} bytes", "another number", self.where)
        return np.frombuffer(raw, np.uint8)

    def extra_bits(self, count: Integers) -> Integers:
        """Return the numbers that the next planes hold, of `count` bits each."""
        extra = np.zeros_like(count)
        planes = _planes(count)
        total, at = sum(where.size for where in planes), 0
        bits = np.unpackbits(np.frombuffer(self.take(-(-total // 8)), np.uint8))
        if bits[total:].any():
            raise broken("planes of a coded block", "padded with zeros", "ones", self.where)
        for k, where in enumerate(planes):
            extra[where] |= bits[at : at + where.size].astype(count.dtype) << k
            at += where.size
        return extra

    def require_end(self) -> None:
        """Refuse bytes that are left over."""
        if self.left:
            raise broken("coded block", f"{self._at} bytes", f"{len(self._code)}", self.where)
