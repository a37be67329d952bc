"""Encode everything in which a donor differs from its base, bit for bit, from the files of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from ..checkpoints.block_reader import PairedReader
from ..checkpoints.pairing import Block, bits_differ
from ..patch.fingerprint import FingerprintBuilder
from ..patch.packing import pack_tensor
from ..patch.patch import TensorPatch
from ..patch.step_codec import EXPONENT_AND_MANTISSA, MAX_ENTRIES
from ..patch.step_tensor import StepTensor, encode_block, join_blocks

# Up to one in so many changed entries may be shorter as indices and values, which need only these entries of the base.
_FEW = 256


class ExactTensor(NamedTuple):
    """A tensor that differs.

    Attributes:
        name: Its name in the base.
        part: Its entries that differ: all of the tensor as steps from the base, or indices and values.
        base_values: The base's values at the indices; None where the patch needs the base's whole tensor.
    """

    name: str
    part: StepTensor | TensorPatch
    base_values: torch.Tensor | None


class _CodedBlock(NamedTuple):
    """A block of a tensor.

    Attributes:
        code: Its code as steps; None for dtypes that have none.
        num_changed: Number of its entries that differ.
        changed: Indices in the tensor, donor's and base's values of these; None if they are many and there is a code.
        base: The base's values.
    """

    code: bytes | None
    num_changed: int
    changed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    base: torch.Tensor


def encode_exact(pairs: PairedReader, fingerprint: FingerprintBuilder) -> Iterator[ExactTensor]:
    """Encode the tensors that differ, each in the shorter of two forms.

    Args:
        pairs: The base and the donor.
        fingerprint: Gets the base's values that each form needs: all of a tensor, or those at the indices.

    Yields:
        The tensors, in order of their names.

    Raises:
        DonorError: The donor holds NaN or Inf where the base has other values.
    """
    found = pairs.map(partial(_encode_block, pairs), block_entries=MAX_ENTRIES)
    for name, group in groupby(found, key=lambda each: each[0].name):
        dtype, size, blocks = pairs.dtype(name), pairs.sizes[name], []
        digest = fingerprint.begin(name, dtype, size)
        for _, block in group:
            digest.update(block.base.view(torch.uint8).numpy().data)
            blocks.append(block._replace(base=block.base[:0]))  # the rest of it is not needed again
        if not any(block.num_changed for block in blocks):
            continue
        part, base_values = _join(dtype, blocks)
        part.validate(name, size)
        if base_values is None:
            fingerprint.add_digest(name, dtype, size, digest)
        else:
            fingerprint.add(name, dtype, part.count, [base_values])
        yield ExactTensor(name, part, base_values)


def _encode_block(pairs: PairedReader, block: Block) -> _CodedBlock:
    base, donor = block.base, block.donor
    if not donor.isfinite().all():
        pairs.delta(block)  # refuses what the base does not have
    mask = bits_differ(base, donor)
    count, changed = int(mask.sum()), None
    has_code = base.dtype == donor.dtype and base.dtype in EXPONENT_AND_MANTISSA
    if not has_code or count <= base.numel() // _FEW:
        where = mask.nonzero().flatten()
        changed = where + block.start, donor[where], base[where]
    code = encode_block(base, donor) if has_code else None
    return _CodedBlock(code, count, changed, base.clone())


def _join(dtype: torch.dtype, blocks: Sequence[_CodedBlock]) -> tuple[StepTensor | TensorPatch, torch.Tensor | None]:
    """Return the shorter form of a tensor, and the base's values at its indices if it has any."""
    coded = [(block.code, block.num_changed) for block in blocks if block.code is not None]
    changed = [block.changed for block in blocks if block.changed is not None]
    steps = join_blocks(dtype, coded)
    if len(changed) == len(blocks):
        indices, donor, base = (torch.cat(columns) for columns in zip(*changed, strict=True))
        plain = TensorPatch(indices, donor)
        if not coded or pack_tensor(plain).data.numel() <= steps.data.numel():
            return plain, base
    return steps, None
