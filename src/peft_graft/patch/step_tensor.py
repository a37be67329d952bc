"""A tensor of the donor, whole and bit for bit, as steps from the base's bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .byte_streams import ByteReader, varint
from .index_codec import MAX_NUMEL, Bytes, PatchError, broken
from .step_codec import EXPONENT_AND_MANTISSA, MAX_ENTRIES, bits_of, decode_steps, encode_steps
from .value_codes import CodedTensor, TensorPatch

_CHECKSUM_BYTES = 8


@dataclass(frozen=True, eq=False)
class StepTensor(CodedTensor):
    """One tensor of the donor, coded by `encode_steps` in blocks of 2**21 entries.

    Attributes:
        dtype: Dtype of the base and of the donor.
        num_changed: Number of entries in which they differ.
        data: uint8 of shape (bytes,): the blocks one after the other, as `encode_block` returns them.
    """

    dtype: torch.dtype
    num_changed: int
    data: torch.Tensor

    @property
    def code(self) -> str:
        """Name of the code."""
        return "steps"

    @property
    def count(self) -> int:
        """Number of replaced entries."""
        return self.num_changed

    @property
    def indices(self) -> None:
        """None: every bit of the base's tensor is needed."""
        return None

    @classmethod
    def encode(cls, base: torch.Tensor, donor: torch.Tensor) -> StepTensor:
        """Encode a donor's tensor.

        Args:
            base: The base's tensor, of a dtype of `EXPONENT_AND_MANTISSA` and any shape.
            donor: The donor's, of the same dtype and shape.
        """
        pairs = zip(_blocks(base), _blocks(donor), strict=True)
        coded = [(encode_block(ours, theirs), count_changed(ours, theirs)) for ours, theirs in pairs]
        return join_blocks(base.dtype, coded)

    def validate(self, name: str, numel: int = MAX_NUMEL) -> None:
        """Check the dtype, the number of changes and the lengths of the blocks (see `CodedTensor.validate`)."""
        if self.dtype not in EXPONENT_AND_MANTISSA or self.data.dtype != torch.uint8 or self.data.dim() != 1:
            got = f"{self.dtype} in {self.data.dtype} of shape {tuple(self.data.shape)}"
            raise broken("steps", "of a dtype of at most 32 bits, in a vector of uint8", got, name)
        if not 0 < self.num_changed <= numel:
            raise broken("number of changed entries", f"in [1, {numel}]", str(self.num_changed), name)
        found, wanted = sum(1 for _ in self._coded_blocks(name)), -(-numel // MAX_ENTRIES)
        if numel < MAX_NUMEL and found != wanted:
            raise broken("number of coded blocks", str(wanted), str(found), name)

    def decode_whole(self, base: torch.Tensor, name: str = "") -> torch.Tensor:
        """Compute the donor's tensor.

        Args:
            base: The base's tensor, of any shape.
            name: The tensor's name, for error messages.

        Returns:
            The donor's tensor, of the shape and dtype of `base`, on the CPU.

        Raises:
            PatchError: The base has another dtype or other bits, or the code is malformed.
        """
        if base.dtype != self.dtype:
            wanted = str(self.dtype).removeprefix("torch.")
            raise PatchError(
                f"base must be loaded in the dtype that a lossless patch was made for, {wanted}, got "
                f"{str(base.dtype).removeprefix('torch.')} in {name!r}. The donor is coded as steps from the base's "
                f"bits: load the base with dtype=torch.{wanted}, and convert the model once the patch is merged."
            )
        blocks = zip(self._coded_blocks(name), _blocks(base), strict=True)
        whole = torch.cat([_decode_block(*coded, ours, name) for coded, ours in blocks])
        if count_changed(base.detach().reshape(-1).cpu(), whole) != self.num_changed:
            raise broken("number of changed entries", str(self.num_changed), "another", name)
        return whole.view(base.shape)

    def decode(self, base: torch.Tensor, name: str = "") -> TensorPatch:
        """Compute the replacement values (see `CodedTensor.decode`)."""
        donor, ours = self.decode_whole(base, name).view(-1), base.detach().reshape(-1).cpu()
        indices = torch.from_numpy((bits_of(donor) != bits_of(ours)).nonzero()[0])
        found = TensorPatch(indices, donor[indices])
        found.validate(name, base.numel())
        return found

    def _coded_blocks(self, name: str) -> Iterator[tuple[bytes, Bytes]]:
        """Yield the checksum and the code of every block."""
        reader = ByteReader(self.data.cpu().numpy(), name)
        while reader.left:
            code = reader.take(reader.varint(most=reader.left, least=_CHECKSUM_BYTES + 1))
            yield bytes(code[:_CHECKSUM_BYTES]), torch.frombuffer(code[_CHECKSUM_BYTES:], dtype=torch.uint8).numpy()


def encode_block(base: torch.Tensor, donor: torch.Tensor) -> bytes:
    """Encode up to 2**21 entries: the length of what follows, the start of the donor's SHA-256, and the code.

    Args:
        base: The base's entries, of shape (n,) and a dtype of `EXPONENT_AND_MANTISSA`.
        donor: The donor's, of the same dtype and shape.
    """
    code = encode_steps(base, donor)
    return varint(_CHECKSUM_BYTES + len(code)) + _checksum(donor) + code


def count_changed(base: torch.Tensor, donor: torch.Tensor) -> int:
    """Count the entries whose bits differ, of two tensors on the CPU of the same dtype and shape (n,)."""
    return int((bits_of(base) != bits_of(donor)).sum())


def join_blocks(dtype: torch.dtype, coded: Sequence[tuple[bytes, int]]) -> StepTensor:
    """Return the tensor of these coded blocks and their numbers of changed entries."""
    data = np.frombuffer(bytearray(b"".join(code for code, _ in coded)), np.uint8)
    return StepTensor(dtype, sum(count for _, count in coded), torch.from_numpy(data))


def _blocks(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.detach().reshape(-1).cpu().split(MAX_ENTRIES)


def _decode_block(checksum: bytes, code: Bytes, base: torch.Tensor, name: str) -> torch.Tensor:
    donor = decode_steps(code, base, name)
    if _checksum(donor) != checksum:
        raise PatchError(
            f"lossless patch must give the donor's bits, got others in {name!r}. Either the base is not the one that "
            "the patch was made for, at the same revision and untouched, or the adapter's file is damaged."
        )
    return donor


def _checksum(donor: torch.Tensor) -> bytes:
    return hashlib.sha256(bits_of(donor).data).digest()[:_CHECKSUM_BYTES]
