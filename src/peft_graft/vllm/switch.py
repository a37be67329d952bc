"""Which entries to write so that one skill takes another's place, and the base's bits return where neither stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..workflows.checkpoint_patch import CheckpointEdit, CheckpointPatch


def plan(dirty: Sequence[CheckpointPatch], to: CheckpointPatch | None = None) -> dict[str, CheckpointEdit]:
    """Compute the writes that leave a model with one patch, or with none.

    Args:
        dirty: Patches whose entries may differ from the base's in the model, all of one base.
        to: The patch to leave applied; None for the base.

    Returns:
        For each tensor, by its name in the base's files, the entries to write: `to`'s values where it has some, else
        the base's. The work grows with the entries of the patches, not with the model.
    """
    wanted = dict(to.edits) if to else {}
    for patch in dirty:
        for name, edit in patch.edits.items():
            before = _reverting(edit)
            wanted[name] = _overlay(before, wanted[name]) if name in wanted else before
    return wanted


class Switch:
    """The skills of one model: at most one is applied at a time.

    A write that fails half-way is remembered: the next one also writes the base's values wherever it may have been.

    Args:
        write: Function that writes entries into the model, such as vLLM's loader of checkpoint patches.

    Attributes:
        applied: The patch in the model, None for the base or after a failed write.
    """

    def __init__(self, write: Callable[[Mapping[str, CheckpointEdit]], object]) -> None:
        self._write = write
        self._dirty: list[CheckpointPatch] = []
        self.applied: CheckpointPatch | None = None

    def to(self, patch: CheckpointPatch | None) -> None:
        """Leave the model with this patch and no other, or with the base's bits.

        Args:
            patch: The patch; None for the base.

        Raises:
            PatchError: The base lacks a tensor of the patch, so that the patch could not be taken out again.
        """
        if patch is not None:
            patch.require_base_values("a patch that can be taken out again")
        self.applied = None
        if patch is not None and patch not in self._dirty:
            self._dirty.append(patch)
        # One after the other takes less time than sorting out which entries both have.
        for old in self._dirty:
            if old is not patch:
                self._write(_reverts(old, patch))
        if patch is not None:
            self._write(patch.edits)
        self._dirty = [] if patch is None else [patch]
        self.applied = patch


def _reverting(edit: CheckpointEdit) -> CheckpointEdit:
    """Return the edit that writes the base's values back."""
    return edit if edit.base_values is None else replace(edit, values=edit.base_values)


def _reverts(old: CheckpointPatch, new: CheckpointPatch | None) -> dict[str, CheckpointEdit]:
    """Return the edits that take one patch out, but for tensors of which another replaces all."""
    whole = {name for name, edit in (new.edits if new else {}).items() if edit.indices is None}
    return {name: _reverting(edit) for name, edit in old.edits.items() if name not in whole}


def _overlay(under: CheckpointEdit, over: CheckpointEdit) -> CheckpointEdit:
    """Return the entries of two edits of one tensor, with the values of the second where both have some."""
    if over.indices is None:
        return over
    if not over.indices.numel():
        return under
    # The dtype of a head that is stored whole may be wider than the base's.
    dtype = torch.promote_types(under.values.dtype, over.values.dtype)
    under_values, over_values = under.values.to(dtype), over.values.to(dtype)
    if under.indices is None:
        return replace(under, values=under_values.index_copy(0, over.indices, over_values))
    places = torch.searchsorted(over.indices, under.indices).clamp(max=over.indices.numel() - 1)
    left = over.indices[places] != under.indices
    indices, order = torch.cat([under.indices[left], over.indices]).sort()
    values = torch.cat([under_values[left], over_values])[order]
    return CheckpointEdit(over.shape, values, None, indices)


def positions(edit: CheckpointEdit) -> torch.Tensor:
    """Return the flat indices of an edit, int64 [n], also of one that replaces all entries."""
    return torch.arange(math.prod(edit.shape)) if edit.indices is None else edit.indices
