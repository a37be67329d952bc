"""Patches: the replaced entries of tensors and their new values, in memory and in a safetensors file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..checkpoints.donor import FLOAT_DTYPES, MAX_LISTED
from .atomic import atomic_file
from .fingerprint import Fingerprint
from .index_codec import MAX_NUMEL, PatchError, broken, decode_indices
from .packing import PACKED, TABLE, max_claimed, pack_tensor, unpack, unpack_tensor, write_table
from .value_codes import CodedTensor, TensorPatch

__all__ = ["CodedTensor", "Fingerprint", "Patch", "PatchError", "TensorPatch", "file_key", "parse_file_key"]

KINDS = ("indices", "values", "logits", "alpha")

_CONTAINER = "graft_patch"
_NO_BYTES = torch.empty(0, dtype=torch.uint8)
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, eq=False)
class Patch:
    """Replacement values for chosen entries of a model's tensors.

    Attributes:
        tensors: The replaced entries by tensor name, `<module>.<param>`: plain, or in a code that needs the base.
        shapes: Shape of each tensor that may be patched, by name, where the base is known.
    """

    tensors: Mapping[str, TensorPatch | CodedTensor]
    shapes: Mapping[str, tuple[int, ...]] | None = None

    @property
    def num_params(self) -> int:
        """Number of replaced entries."""
        return sum(part.count for part in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in a file, without its header. Every call codes the indices."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    @property
    def plain(self) -> Mapping[str, TensorPatch]:
        """The replaced entries by tensor name, none of which needs the base.

        Raises:
            PatchError: If some are in a code that does.
        """
        found = {name: part for name, part in self.tensors.items() if isinstance(part, TensorPatch)}
        if coded := sorted(self.tensors.keys() - found.keys()):
            codes = sorted({part.code for part in self.tensors.values() if isinstance(part, CodedTensor)})
            raise PatchError(
                f"values must be plain here, got the code {', '.join(map(repr, codes))} in {coded[:MAX_LISTED]} "
                f"({len(coded)} tensors). Decode them with the base's tensors: patch.decode(base.get_parameter)."
            )
        return found

    @property
    def indices(self) -> Mapping[str, torch.Tensor]:
        """Flat indices of the replaced entries by tensor name, int64 (n,).

        Raises:
            PatchError: If some are in a code for which the base is needed.
        """
        found = {name: part.indices for name, part in self.tensors.items()}
        if hidden := [name for name, indices in found.items() if indices is None]:
            raise PatchError(
                f"indices must be known without the base here, got a code in {hidden[:MAX_LISTED]} ({len(hidden)} "
                "tensors). Decode the patch with the base's tensors: patch.decode(base.get_parameter)."
            )
        return {name: indices for name, indices in found.items() if indices is not None}

    def decode(self, read_base: Callable[[str], torch.Tensor]) -> Patch:
        """Compute all values that the base is needed for.

        Args:
            read_base: Function from a tensor's name to the base's whole tensor; called for coded tensors only.

        Returns:
            A patch whose tensors are all plain; this one if they are already.

        Raises:
            PatchError: If a code does not fit this base.
        """
        decoded = {
            name: part.decode(read_base(name), name)
            for name, part in self.tensors.items()
            if isinstance(part, CodedTensor)
        }
        return Patch({**self.tensors, **decoded}, self.shapes) if decoded else self

    def validate(self) -> None:
        """Check the patch of every tensor, against `shapes` if they are known.

        Raises:
            PatchError: If a tensor's patch is malformed, or a patched tensor is not among `shapes`.
        """
        for name, part in self.tensors.items():
            part.validate(name, _numel(name, self.shapes))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return the patch as the state dict that a file holds.

        Returns:
            Two tensors, uint8 on the CPU: the table of the patched tensors, `graft_patch.table`, and their bytes,
            `graft_patch.packed`. Values that are all +0 are left out, if they are at most 8 times as many as the coded
            indices have bytes.

        Raises:
            PatchError: If the patch is malformed.
        """
        self.validate()
        packed = {name: pack_tensor(part) for name, part in sorted(self.tensors.items())}
        rows = {name: (each.code, each.row) for name, each in packed.items()}
        return pack_rows(rows, torch.cat([each.data for each in packed.values()] or [_NO_BYTES]))

    @classmethod
    def from_tensors(
        cls, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Patch:
        """Read a patch from an untrusted state dict.

        Args:
            state: Tensors of an adapter file. Keys may start with PEFT's `base_model.model.`. Tensors that are not part
                of a patch (`modules_to_save`), and mask logits and alphas of a training checkpoint, are ignored.
            shapes: Shape of each tensor that may be patched, by name. If None, indices are not checked against sizes.

        Returns:
            The patch, validated.

        Raises:
            PatchError: If the patch is malformed; the message names the tensor.
        """
        found: dict[str, dict[str, torch.Tensor]] = {}
        for key in sorted(state):
            parsed = parse_file_key(key)
            if parsed is None:
                continue
            module, param, kind = parsed
            name = f"{module}.{param}" if module else param
            if kind in found.setdefault(name, {}):
                raise broken(kind, "given once", f"a second time as {key!r}", name)
            found[name][kind] = state[key]
        packed = found.pop("", {})
        tensors = _read_packed(packed, shapes) if packed else {}
        for name, kinds in found.items():
            if kinds.keys() <= {"logits", "alpha"}:
                continue
            if not {"indices", "values"} <= kinds.keys():
                raise broken("patched tensor", "given by indices and values", f"{sorted(kinds)}", name)
            if name in tensors:
                raise broken("patched tensor", "given once", "also a row of the table", name)
            tensors[name] = _read_part(name, kinds["indices"], kinds["values"], _numel(name, shapes))
        return cls(tensors, shapes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an older file at `path` is replaced at once or not at all.

        Args:
            path: Path of the file.

        Raises:
            PatchError: If the patch is malformed.
        """
        state = self.to_tensors()
        with atomic_file(Path(path)) as temporary:
            save_file(state, temporary, metadata={"format": "pt"})

    @classmethod
    def load(cls, path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]] | None = None) -> Patch:
        """Read a patch from a safetensors file, of this class or an adapter's.

        Args:
            path: The file.
            shapes: As in `from_tensors`.

        Returns:
            The patch, validated.

        Raises:
            PatchError: If the file is not whole safetensors, or the patch in it is malformed.
            FileNotFoundError: If there is no such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                state = {key: file.get_tensor(key) for key in file.keys() if parse_file_key(key)}  # noqa: SIM118
        except SafetensorError as error:
            raise PatchError(
                f"patch file must be whole safetensors, got {os.fspath(path)!r} ({error}). Copy or download it again."
            ) from error
        return cls.from_tensors(state, shapes)


def pack_rows(rows: Mapping[str, tuple[str, Sequence[int]]], packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state dict of a packed patch.

    Args:
        rows: Code and row of the table by tensor name.
        packed: The bytes of all tensors in order of their names, uint8.

    Returns:
        The table and the bytes under the keys of a file.
    """
    return {f"{_CONTAINER}.{TABLE}": write_table(rows), f"{_CONTAINER}.{PACKED}": packed}


def require_rows(stored: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a base whose number of rows, of the vocabulary or of a head, is not that of tensors stored whole.

    Args:
        stored: Shape of each tensor that an adapter stores whole, by name.
        base: Shape of the base's tensor, by name.

    Raises:
        PatchError: Numbers of rows differ; the message says how to resize the base.
    """
    wrong = {
        name: (base[name][0], shape[0])
        for name, shape in sorted(stored.items())
        if shape and len(base.get(name, ())) == len(shape) and base[name][1:] == shape[1:] and base[name] != shape
    }
    if wrong:
        ours, theirs = next(iter(wrong.values()))
        raise PatchError(
            f"base must have as many rows as when the adapter was made, got {ours} where the adapter stores {theirs} "
            f"in {', '.join(map(repr, wrong))}. If the vocabulary was resized, call "
            f"base.resize_token_embeddings({theirs}) before PeftModel.from_pretrained(base, adapter), or save the "
            "tokenizer into the adapter's directory, so that AutoPeft resizes; for a command, save the resized base "
            f"and give it with --base. If it is a head, load the base with num_labels={theirs}."
        )


def file_key(module: str, param: str, kind: str) -> str:
    """Return the key of a part of a tensor's patch in a file.

    Args:
        module: Dotted name of the module, empty for a parameter of the model itself.
        param: Name of the parameter in it, without dots.
        kind: "indices" or "values"; in training checkpoints also "logits" (float32) and "alpha" (float64, shape (1,)).

    Returns:
        `<module>.graft_patch.<param>_<kind>`.

    Raises:
        PatchError: If `param` or `kind` is not as above.
    """
    if not param or "." in param or kind not in KINDS:
        raise PatchError(f"file key must be made of a name without dots and one of {KINDS}, got {param!r}, {kind!r}.")
    return f"{module}{'.' if module else ''}{_CONTAINER}.{param}_{kind}"


def parse_file_key(key: str) -> tuple[str, str, str] | None:
    """Parse a key of a file.

    Args:
        key: The key, with or without PEFT's prefix `base_model.model.`.

    Returns:
        (module, param, kind) as in `file_key`; ("", "", "table") or ("", "", "packed") for a packed patch; None if the
        key is not part of a patch.

    Raises:
        PatchError: If the key names the container of a patch, followed by an unknown name.
    """
    module, container, leaf = ("." + key.removeprefix(PEFT_PREFIX)).rpartition(f".{_CONTAINER}.")
    if not container:
        return None
    if not module and leaf in (TABLE, PACKED):
        return "", "", leaf
    param, _, kind = leaf.rpartition("_")
    if not param or "." in param or kind not in KINDS:
        raise PatchError(f"file key must end in <param> and one of {KINDS}, got {key!r}.")
    return module.removeprefix("."), param, kind


def _numel(name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> int:
    if shapes is None:
        return MAX_NUMEL
    if name not in shapes:
        raise broken("patched tensor", "one that the base has and the adapter targets", repr(name), "")
    return math.prod(shapes[name])


def _read_packed(
    kinds: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]] | None
) -> dict[str, TensorPatch | CodedTensor]:
    if kinds.keys() != {TABLE, PACKED}:
        raise broken("packed patch", f"given as {TABLE} and {PACKED}", f"only {sorted(kinds)}", "")
    found = unpack(kinds[TABLE], kinds[PACKED])
    return {name: unpack_tensor(each, _numel(name, shapes), name) for name, each in found.items()}


def _read_part(name: str, blob: torch.Tensor, values: torch.Tensor, numel: int) -> TensorPatch:
    if values.dtype in FLOAT_DTYPES and values.dim() == 2 and values.shape[1] == 0:
        # All +0 and not stored: the count is a claim of the file, and must not take much more memory than the file has.
        if values.shape[0] > max_claimed(blob):
            raise broken("number of zeros", f"at most {max_claimed(blob)}", str(values.shape[0]), name)
        values = values.new_zeros(values.shape[0])
    if values.dim() != 1:
        raise broken("values", "of shape (n,)", f"shape {tuple(values.shape)}", name)
    part = TensorPatch(decode_indices(blob, len(values), numel, name), values)
    part.validate(name, numel)
    return part
