"""A patch in the coordinates of a base's own files, with the base's values beside the new ones: it can be taken out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoints.donor import FLOAT_DTYPES, MAX_LISTED, CheckpointDonor, Extent
from ..patch.patch import PatchError
from .adapter_on_base import AdapterOnBase

VLLM_FILE = "checkpoint_patch.safetensors"
# So many of the base's values are compared with an engine's files, as for the fingerprint of an adapter.
_SAMPLED = 64
_INT32_UP_TO = 2**31


@dataclass(frozen=True, eq=False)
class CheckpointEdit:
    """New values for entries of one tensor of a checkpoint.

    Attributes:
        shape: Shape of the tensor.
        values: New values, float [n].
        base_values: The checkpoint's own values of these entries, float [n]; None if it has no such tensor.
        indices: Flat indices of the entries, int64 [n], increasing; None if all entries are replaced.
    """

    shape: tuple[int, ...]
    values: torch.Tensor
    base_values: torch.Tensor | None
    indices: torch.Tensor | None = None

    def validate(self, name: str) -> None:
        """Check that indices and values fit the tensor.

        Args:
            name: Name of the tensor, for the error.

        Raises:
            PatchError: If they do not, or a value is NaN, which vLLM takes for "unchanged".
        """
        numel, each = math.prod(self.shape), [self.values, *([] if self.base_values is None else [self.base_values])]
        count = numel if self.indices is None else self.indices.numel()
        found = None
        if any(values.dtype not in FLOAT_DTYPES or values.shape != (count,) for values in each):
            found = f"{[(str(values.dtype), tuple(values.shape)) for values in each]} for {count} entries"
        elif any(bool(values.isnan().any()) for values in each):
            found = "NaN"
        elif self.indices is not None and count:
            first, last = int(self.indices[0]), int(self.indices[-1])
            if first < 0 or last >= numel or bool((self.indices.diff() <= 0).any()):
                found = f"indices from {first} to {last} of {numel} entries, or in another order"
        if found:
            raise PatchError(
                f"patch must hold one number for each of its increasing indices, got {found} in {name!r}. "
                "Export the adapter again."
            )


@dataclass(frozen=True, eq=False)
class CheckpointPatch:
    """All changes that an adapter makes to the files of its base.

    Attributes:
        edits: The changed tensors, by their names in the files.
        base: Directory or Hub id of the base, for error messages.
    """

    edits: Mapping[str, CheckpointEdit]
    base: str

    @property
    def without_base(self) -> list[str]:
        """Names of the tensors that the base's files do not have, sorted."""
        return sorted(name for name, edit in self.edits.items() if edit.base_values is None)

    @classmethod
    def from_adapter(cls, graft: AdapterOnBase) -> CheckpointPatch:
        """Compute the changes that a saved adapter makes to its base.

        Args:
            graft: The adapter on its base.

        Returns:
            The changes; modules stored whole are among them.

        Raises:
            PatchError: A module stored whole has another shape in the base, or a value is NaN.
        """
        edits = {
            part.name: CheckpointEdit(part.extent.shape, part.values, part.base_values, part.indices)
            for part in graft.edits()
        }
        for name, extent, values in graft.whole_edits():
            before = graft.view.checkpoint.get(name).flatten() if extent else None
            edits[name] = CheckpointEdit(tuple(values.shape), values.flatten(), before)
        for name, edit in edits.items():
            edit.validate(name)
        return cls(edits, graft.base)

    def save(self, path: Path) -> None:
        """Write a safetensors file: for each tensor `<name>.values`, `<name>.base` and `<name>.indices`.

        Indices are int32 where they fit. The metadata has a JSON object under `tensors`, with the shape and dtype of
        each tensor, and the base's name under `base`.
        """
        tensors: dict[str, torch.Tensor] = {}
        about: dict[str, dict[str, Any]] = {}
        for name, edit in self.edits.items():
            tensors[f"{name}.values"] = edit.values
            if edit.base_values is not None:
                tensors[f"{name}.base"] = edit.base_values
            if edit.indices is not None:
                narrow = math.prod(edit.shape) < _INT32_UP_TO
                tensors[f"{name}.indices"] = edit.indices.to(torch.int32 if narrow else torch.int64)
            about[name] = {"shape": list(edit.shape), "dtype": str(edit.values.dtype).removeprefix("torch.")}
        tensors = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
        metadata = {"format": "pt", "base": self.base, "tensors": json.dumps(about, sort_keys=True)}
        save_file(tensors, path, metadata)

    @classmethod
    def load(cls, path: Path) -> CheckpointPatch:
        """Read a file that `save` wrote.

        Args:
            path: The file; it is not trusted.

        Raises:
            PatchError: It is no such file, or its parts do not fit each other.
        """
        edits: dict[str, CheckpointEdit] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata, keys = file.metadata() or {}, {*file.keys()}
                for name, fields in json.loads(metadata["tensors"]).items():
                    values = file.get_tensor(f"{name}.values")
                    before, indices = (
                        file.get_tensor(f"{name}.{kind}") if f"{name}.{kind}" in keys else None
                        for kind in ("base", "indices")
                    )
                    shape = tuple(int(size) for size in fields["shape"])
                    edits[name] = CheckpointEdit(shape, values, before, None if indices is None else indices.long())
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PatchError(
                f"patch for an engine must be a file of `peft-graft export --to vllm`, got {error!r} in {str(path)!r}. "
                "Export the adapter again."
            ) from error
        for name, edit in edits.items():
            edit.validate(name)
        return cls(edits, metadata.get("base", ""))

    def require_base_values(self, use: str) -> None:
        """Refuse a patch with tensors that the base's files do not have.

        Args:
            use: What needs the base's values, for the error.

        Raises:
            PatchError: There are such tensors.
        """
        if lost := self.without_base:
            raise PatchError(
                f"every tensor of the patch must stand in the base's files for {use}, got {lost[:MAX_LISTED]} "
                f"({len(lost)} that {self.base!r} lacks). Serve a base that has this module, or export to a checkpoint."
            )

    def require_base(self, files: CheckpointDonor) -> None:
        """Refuse the files of another base, by a sample of the values that the patch replaces.

        Args:
            files: Files of the base that the patch is to be applied to.

        Raises:
            PatchError: The files differ from the base of the patch, or lack a tensor.
        """
        each = max(1, _SAMPLED // max(len(self.edits), 1))
        known = {*files.names()}
        for name, edit in sorted(self.edits.items()):
            if edit.base_values is None or not edit.base_values.numel():
                continue
            chosen = torch.linspace(0, edit.base_values.numel() - 1, each, dtype=torch.float64).long()
            places = chosen if edit.indices is None else edit.indices[chosen]
            same = name in known and files.shape(name) == edit.shape
            if same:
                found = read_entries(files.extent(name), places)
                same = found.dtype == edit.base_values.dtype and torch.equal(found, edit.base_values[chosen])
            if not same:
                raise PatchError(
                    f"base must be the model that this patch was made for ({self.base!r}), got other values or none of "
                    f"{name!r} in {files.name!r}. Start the engine with that base."
                )


def read_entries(extent: Extent, indices: torch.Tensor) -> torch.Tensor:
    """Read single entries of a tensor in a file.

    Args:
        extent: Location of the tensor.
        indices: Flat indices, int64 [n].

    Returns:
        The values, [n], in the file's dtype.
    """
    dtype: Any = extent.dtype
    width, count = dtype.itemsize, math.prod(extent.shape)
    mapped = np.memmap(extent.path, np.uint8, mode="r", offset=extent.offset, shape=count * width)
    return torch.from_numpy(mapped.reshape(count, width)[indices.numpy()]).view(dtype).flatten()
