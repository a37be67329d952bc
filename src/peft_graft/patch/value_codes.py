"""Values of a patch: plain ones, and codes that the base is needed to decode, such as signs times one scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional

from ..checkpoints.donor import MAX_LISTED
from ..checkpoints.pairing import FLOAT_DTYPES, count_nonfinite
from .index_codec import MAX_NUMEL, broken, check_indices

# A code that loses more than this share of a tensor's deltas, ||coded - delta|| / ||delta||, is named in a warning.
MAX_ERROR = 0.25


@dataclass(frozen=True, eq=False)
class TensorPatch:
    """The replaced entries of one tensor.

    Attributes:
        indices: int64 of shape (n,): flat (row-major) indices, strictly increasing.
        values: Floating-point of shape (n,): the new values of these entries, in the donor's dtype.
    """

    indices: torch.Tensor
    values: torch.Tensor

    @property
    def count(self) -> int:
        """Number of replaced entries."""
        return self.indices.numel()

    def to(self, device: torch.device | str) -> TensorPatch:
        """Return the same on another device."""
        return TensorPatch(self.indices.to(device), self.values.to(device))

    def validate(self, name: str, numel: int = MAX_NUMEL) -> None:
        """Check that the indices and values can be written into a tensor.

        Args:
            name: The tensor's name, for error messages.
            numel: How many entries the tensor has.

        Raises:
            PatchError: If indices are unsorted, repeated or out of range, or the values are of another number, not
                finite, or not floating-point.
        """
        check_indices(self.indices, numel, name)
        if self.values.dtype not in FLOAT_DTYPES or self.values.shape != self.indices.shape:
            got = f"{self.values.dtype} of shape {tuple(self.values.shape)}"
            raise broken("values", f"floating-point of shape {tuple(self.indices.shape)}", got, name)
        if bad := count_nonfinite(self.values):
            raise broken("values", "finite", f"{bad} NaN or Inf", name)


class CodedTensor(ABC):
    """The replaced entries of one tensor, in a code that the base is needed to decode."""

    @property
    @abstractmethod
    def code(self) -> str:
        """Name of the code, as in the file."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of replaced entries."""

    @property
    @abstractmethod
    def indices(self) -> torch.Tensor | None:
        """Flat indices of the base's entries that `decode` needs, int64 (n,): those of the patch; None for all of them.

        These are the entries that the fingerprint covers.
        """

    @abstractmethod
    def validate(self, name: str, numel: int = MAX_NUMEL) -> None:
        """Check all that can be checked without the base.

        Args:
            name: The tensor's name, for error messages.
            numel: How many entries the tensor has.

        Raises:
            PatchError: If the code is malformed.
        """

    @abstractmethod
    def decode(self, base: torch.Tensor, name: str = "") -> TensorPatch:
        """Compute the replacement values.

        Args:
            base: The base's whole tensor, floating-point of any shape.
            name: The tensor's name, for error messages.

        Returns:
            The entries, on the CPU.

        Raises:
            PatchError: If the code does not fit this base, or the values are not finite.
        """


@dataclass(frozen=True)
class ValueCode:
    """A code of values: each is base + scale * level, with a whole level of few bits.

    Attributes:
        name: Name of the code.
        bits: Bits of a level.
        max_level: Largest |level|.
        block: Number of successive entries that share a scale; None for one scale in the whole tensor.
    """

    name: str
    bits: int
    max_level: int
    block: int | None

    def num_scales(self, count: int) -> int:
        """Return the number of scales of `count` entries."""
        return -(-count // self.block) if self.block else min(count, 1)

    def num_bytes(self, count: int) -> int:
        """Return the bytes of the levels of `count` entries."""
        return -(-count * self.bits // 8)


VALUE_CODES = {
    code.name: code
    for code in (ValueCode("sign", 1, 1, None), ValueCode("int4", 4, 7, 128), ValueCode("int8", 8, 127, 128))
}


@dataclass(frozen=True, eq=False)
class ScaledTensor(CodedTensor):
    """Entries coded as whole levels: the value of an entry is float32(base + float32(scale * level)).

    Attributes:
        entry_indices: int64 of shape (n,): flat (row-major) indices, strictly increasing.
        levels: int8 of shape (n,): -1 or 1 for `"sign"`, in [-7, 7] for `"int4"`, in [-127, 127] for `"int8"`.
        scales: float32 of shape (1,) for `"sign"`, else (ceil(n / 128),), one for 128 successive entries; not negative.
        value_code: The code.
    """

    entry_indices: torch.Tensor
    levels: torch.Tensor
    scales: torch.Tensor
    value_code: ValueCode

    @property
    def indices(self) -> torch.Tensor:
        """Flat indices of the entries, int64 (n,)."""
        return self.entry_indices

    @property
    def code(self) -> str:
        """Name of the code, as in the file."""
        return self.value_code.name

    @property
    def count(self) -> int:
        """Number of replaced entries."""
        return self.indices.numel()

    def validate(self, name: str, numel: int = MAX_NUMEL) -> None:
        """Check indices, levels and scales (see `CodedTensor.validate`)."""
        check_indices(self.indices, numel, name)
        code, levels, scales = self.value_code, self.levels, self.scales
        if levels.dtype != torch.int8 or levels.shape != self.indices.shape:
            got = f"{levels.dtype} of shape {tuple(levels.shape)}"
            raise broken("levels", f"int8 of shape {tuple(self.indices.shape)}", got, name)
        wanted = (code.num_scales(self.count),)
        if scales.dtype != torch.float32 or tuple(scales.shape) != wanted:
            got = f"{scales.dtype} of shape {tuple(scales.shape)}"
            raise broken("scales", f"float32 of shape {wanted}", got, name)
        if not bool(((scales >= 0) & scales.isfinite()).all()):
            raise broken("scales", "finite and not negative", f"{scales.min().item()}", name)
        wrong = levels.abs() != 1 if code.max_level == 1 else (levels > code.max_level) | (levels < -code.max_level)
        if wrong.any():
            raise broken("levels", f"those of {code.name!r}", f"{levels[wrong][0].item()}", name)

    def decode(self, base: torch.Tensor, name: str = "") -> TensorPatch:
        """Compute the replacement values (see `CodedTensor.decode`)."""
        entries = base.detach().reshape(-1)[self.indices.to(base.device)].cpu()
        values = self.to("cpu").decode_entries(entries)
        if bad := count_nonfinite(values):
            raise broken("decoded values", "finite", f"{bad} NaN or Inf", name)
        return TensorPatch(self.indices.cpu(), values)

    def decode_entries(self, base: torch.Tensor) -> torch.Tensor:
        """Compute float32(base + float32(scale * level)).

        Args:
            base: The base's values at the entries, floating-point [n], on the device of the levels.

        Returns:
            The replacement values, float32 [n].
        """
        block = self.value_code.block
        scales = self.scales.repeat_interleave(block)[: self.count] if block else self.scales
        return base.detach().float() + scales * self.levels.float()

    def to(self, device: torch.device | str) -> ScaledTensor:
        """Return the same on another device."""
        return ScaledTensor(
            self.entry_indices.to(device), self.levels.to(device), self.scales.to(device), self.value_code
        )


class CodeLoss(NamedTuple):
    """What a code loses of a tensor's deltas.

    Attributes:
        lost: ||coded - delta||.
        norm: ||delta||.
    """

    lost: float
    norm: float

    @property
    def share(self) -> float:
        """Lost share of the norm."""
        return self.lost / self.norm if self.norm else 0.0


def encode_values(
    indices: torch.Tensor, donor: torch.Tensor, base: torch.Tensor, code: ValueCode
) -> tuple[ScaledTensor, CodeLoss]:
    """Encode the values of one tensor's entries.

    A sign's scale is the mean |delta|, which loses the least: cv / sqrt(1 + cv^2) of the norm, with cv the coefficient
    of variation of |delta|. The other scales are max |delta| / max level, block by block.

    Args:
        indices: Flat indices, int64 [n], strictly increasing.
        donor: The donor's values there, floating-point [n].
        base: The base's values there, floating-point [n].
        code: The code.

    Returns:
        The coded entries, and what the code loses.
    """
    delta = donor.detach().double() - base.detach().to(donor.device).float().double()
    sizes = delta.abs()
    if code.block is None:
        scales = sizes.mean(0, keepdim=True).float() if delta.numel() else sizes.float()
        of_entry, levels = scales.double(), torch.where(delta < 0, -1.0, 1.0).double()
    else:
        blocks = functional.pad(sizes, (0, -sizes.numel() % code.block)).view(-1, code.block)
        scales = (blocks.amax(1) / code.max_level).float()
        of_entry = scales.double().repeat_interleave(code.block)[: delta.numel()]
        levels = torch.where(of_entry > 0, delta / of_entry, 0.0).round().clamp(-code.max_level, code.max_level)
    loss = CodeLoss(float((levels * of_entry - delta).norm()), float(delta.norm()))
    return ScaledTensor(indices, levels.to(torch.int8), scales, code), loss


def encode_candidates(donor: torch.Tensor, base: torch.Tensor, mask: torch.Tensor, code: ValueCode) -> torch.Tensor:
    """Compute the values that a mask's candidates have in a code, while the mask trains.

    Those that the mask takes are exactly what `encode_values` makes of them alone, so that what is trained is what is
    saved. The others only tell the gradient where they would go: by a sign with the same scale, else to the donor.

    Args:
        donor: The donor's values, floating-point [n].
        base: The base's values, floating-point [n].
        mask: The exact mask, bool [n].
        code: The code.

    Returns:
        float32 [n].
    """
    values, start, taken = donor.detach().float().clone(), base.detach().float(), mask.nonzero().flatten()
    if code.block is None:
        scale = _mean_size(donor[taken], base[taken]) if taken.numel() else _mean_size(donor, base)
        values = start + scale * torch.where(donor.detach().double() < start.double(), -1.0, 1.0)
    elif taken.numel():
        coded, _ = encode_values(taken, donor[taken], base[taken], code)
        values[taken] = coded.decode_entries(base[taken])
    return values


def describe_loss(losses: Mapping[str, CodeLoss], code: ValueCode) -> str | None:
    """Return a line that names the tensors in which a code loses more than `MAX_ERROR`, None if there are none.

    Args:
        losses: What the code loses, by tensor name.
        code: The code.
    """
    worst = sorted((name for name in losses if losses[name].share > MAX_ERROR), key=lambda name: -losses[name].share)
    if not worst:
        return None
    named = ", ".join(f"{name} {losses[name].share:.0%}" for name in worst[:MAX_LISTED])
    finer = {"sign": "values='int4' (--values int4), which takes 4 bits an entry, or "}.get(code.name, "")
    return (
        f"values of the code {code.name!r} should lose at most {MAX_ERROR:.0%} of the deltas' norm in every tensor, "
        f"got more in {len(worst)} of {len(losses)} ({named}), {total_loss(losses):.1%} in all. |delta| varies too "
        f"much there for it: compare the graft with that of {finer}values='donor'."
    )


def total_loss(losses: Mapping[str, CodeLoss]) -> float:
    """Return the lost share of the norm of all deltas together."""
    lost, norm = (math.hypot(*(getattr(loss, side) for loss in losses.values())) for side in ("lost", "norm"))
    return lost / norm if norm else 0.0


def _mean_size(donor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    return (donor.detach().double() - base.detach().float().double()).abs().mean().float()


def pack_levels(levels: torch.Tensor, code: ValueCode) -> torch.Tensor:
    """Pack levels into bytes: for one bit 1 where the level is negative, else two's complement; first entry highest.

    Args:
        levels: int8 [n].
        code: The code.

    Returns:
        uint8 of shape (ceil(n * bits / 8),); the bits left over are 0.
    """
    plain = levels.cpu().contiguous().numpy()
    if code.bits == 1:
        return torch.from_numpy(np.packbits(plain < 0))
    if code.bits == 4:
        nibbles = np.pad(plain.view(np.uint8) & 15, (0, plain.size % 2))
        return torch.from_numpy(nibbles[::2] << 4 | nibbles[1::2])
    return torch.from_numpy(plain.view(np.uint8).copy())


def unpack_levels(packed: torch.Tensor, count: int, code: ValueCode, name: str) -> torch.Tensor:
    """Read untrusted bytes in the format of `pack_levels`.

    Args:
        packed: uint8 of shape (ceil(count * bits / 8),).
        count: Number of levels.
        code: The code.
        name: The tensor's name, for error messages.

    Returns:
        int8 [count].

    Raises:
        PatchError: If bits that are left over are not 0.
    """
    raw = packed.cpu().contiguous().numpy()
    if code.bits == 8:
        return torch.from_numpy(raw.view(np.int8).copy())
    parts = np.unpackbits(raw) if code.bits == 1 else np.stack([raw >> 4, raw & 15], 1).reshape(-1)
    if parts[count:].any():
        raise broken("bits after the levels", "0", "others", name)
    plain = torch.from_numpy(parts[:count].astype(np.int8))
    return 1 - 2 * plain if code.bits == 1 else (plain ^ 8) - 8
