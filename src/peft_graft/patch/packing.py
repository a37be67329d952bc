"""Pack the patches of many tensors into two tensors of a file: a table that a person can read, and all bytes in a row.

A header of safetensors takes about 250 bytes for each patched tensor, which would be most of a small patch.
The format is specified in `docs/patch_format.md`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .index_codec import broken, decode_indices, encode_indices
from .step_tensor import StepTensor
from .value_codes import (
    VALUE_CODES,
    CodedTensor,
    ScaledTensor,
    TensorPatch,
    ValueCode,
    pack_levels,
    unpack_levels,
)

TABLE, PACKED = "table", "packed"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STEP_DTYPES = {name: dtype for name, dtype in _DTYPES.items() if dtype != torch.float64}
_STEP_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_STEPS = "steps-"  # before the dtype of base and donor
_ZEROS = "zeros-"  # before the dtype: all values are +0 and not stored
_MAX_SIZE = 2**48


@dataclass(frozen=True, eq=False)
class PackedTensor:
    """The patch of one tensor as a file holds it.

    Attributes:
        code: Name of the code in `CODES`.
        row: Whole numbers of the table: the number of entries, the bytes of the coded indices, and what else the code
            needs.
        data: The bytes, uint8, all sections one after another.
    """

    code: str
    row: list[int]
    data: torch.Tensor


@dataclass(frozen=True)
class PartCode:
    """Row of the table of codes.

    Attributes:
        name: Name for people: the dtype of plain values, or the code.
        fields: How many numbers a row has.
        sections: Function from a row to the bytes of each section by its purpose, in their order in the file.
        read: Function (sections by purpose, row, number of entries of the tensor, its name) -> the patch.
    """

    name: str
    fields: int
    sections: Callable[[Sequence[int]], dict[str, int]]
    read: Callable[[Mapping[str, torch.Tensor], Sequence[int], int, str], TensorPatch | CodedTensor]


def pack_tensor(part: TensorPatch | CodedTensor) -> PackedTensor:
    """Pack one tensor's patch, which must be valid.

    Args:
        part: The patch.

    Returns:
        Its code, its row of the table, and its bytes.
    """
    if isinstance(part, ScaledTensor):
        blob = encode_indices(part.indices)
        sections = [blob, as_bytes(part.scales), pack_levels(part.levels, part.value_code)]
        return PackedTensor(part.code, [part.count, blob.numel()], torch.cat(sections))
    if isinstance(part, StepTensor):
        name = next(name for name, dtype in _STEP_DTYPES.items() if dtype == part.dtype)
        return PackedTensor(_STEPS + name, [part.count, part.data.numel()], part.data)
    if not isinstance(part, TensorPatch):
        raise TypeError(f"patch of a tensor must be plain or of a known code, got {type(part).__name__}.")
    blob, values = encode_indices(part.indices), part.values.detach()
    name = next(name for name, dtype in _DTYPES.items() if dtype == values.dtype)
    coded = as_bytes(values)
    if 0 < part.count <= max_claimed(blob) and not coded.any():
        return PackedTensor(_ZEROS + name, [part.count, blob.numel()], blob)
    return PackedTensor(name, [part.count, blob.numel()], torch.cat([blob, coded]))


def unpack_tensor(packed: PackedTensor, numel: int, name: str) -> TensorPatch | CodedTensor:
    """Read one tensor's patch from untrusted bytes.

    Args:
        packed: A known code, a row of the right length, and as many bytes as it says.
        numel: Number of entries of the tensor.
        name: The tensor's name, for error messages.

    Returns:
        The patch, validated.

    Raises:
        PatchError: If the bytes are malformed.
    """
    code = CODES[packed.code]
    sizes = code.sections(packed.row)
    sections = dict(zip(sizes, packed.data.split(list(sizes.values())), strict=True))
    part = code.read(sections, packed.row, numel, name)
    part.validate(name, numel)
    return part


def unpack(table: torch.Tensor, packed: torch.Tensor) -> dict[str, PackedTensor]:
    """Take packed tensors apart.

    Args:
        table: As `write_table` returns it, untrusted.
        packed: The bytes of all tensors in order of their names, untrusted.

    Returns:
        The packed tensors by name, in order of the names.

    Raises:
        PatchError: If the table is malformed, or the bytes are not as many as it says.
    """
    rows = read_table(table)
    sizes = {name: sum(CODES[code].sections(row).values()) for name, (code, row) in rows.items()}
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != sum(sizes.values()):
        got = f"{packed.dtype} of shape {tuple(packed.shape)}"
        raise broken("packed bytes", f"uint8 of shape ({sum(sizes.values())},), as the table says", got, "")
    data = packed.split(list(sizes.values())) if sizes else ()
    return {name: PackedTensor(*rows[name], each) for name, each in zip(sizes, data, strict=True)}


def write_table(rows: Mapping[str, tuple[str, Sequence[int]]]) -> torch.Tensor:
    """Write the table: JSON, by code and by name, with the rows of numbered layers under one name with a star.

    Args:
        rows: Code and row by tensor name.

    Returns:
        uint8 of shape (bytes,): UTF-8.
    """
    table: dict[str, dict[str, Any]] = {}
    for name in sorted(rows):
        code, row = rows[name]
        starred, number = _starred(name)
        group = table.setdefault(code, {})
        if number is None:
            group[name] = list(row)
        else:
            group.setdefault(starred, {})[number] = list(row)
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def read_table(table: torch.Tensor) -> dict[str, tuple[str, list[int]]]:
    """Read an untrusted table.

    Args:
        table: As `write_table` returns it.

    Returns:
        Code and row by tensor name, in order of the names.

    Raises:
        PatchError: If it is no such table, has a name twice, or names an unknown code.
    """
    if table.dtype != torch.uint8 or table.dim() != 1:
        raise broken("table of tensors", "a vector of uint8", f"{table.dtype} of shape {tuple(table.shape)}", "")
    try:
        parsed = json.loads(bytes(table.cpu().contiguous().numpy()), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise broken("table of tensors", "JSON that names everything once", f"{error}"[:200], "") from error
    found: dict[str, tuple[str, list[int]]] = {}
    for code, group in _items(parsed, "table of tensors"):
        if code not in CODES:
            raise broken("code of values", f"one of {sorted(CODES)}", repr(code)[:80], "")
        for pattern, rows in _items(group, "rows of a code"):
            named = {pattern: rows} if isinstance(rows, list) else _numbered(pattern, rows)
            for name, row in named.items():
                if name in found:
                    raise broken("patched tensor", "given once", "a second row of the table", name)
                found[name] = code, _row(row, CODES[code], name)
    return dict(sorted(found.items()))


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor on the CPU, little-endian, uint8."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).reshape(-1)


def _starred(name: str) -> tuple[str, str | None]:
    """Return a name with a star in the place of its first number, and the number; the name and None without one."""
    parts = name.split(".")
    if "*" in parts:
        return name, None
    for place, part in enumerate(parts):
        if part.isascii() and part.isdecimal():
            return ".".join([*parts[:place], "*", *parts[place + 1 :]]), part
    return name, None


def _numbered(pattern: str, rows: Any) -> dict[str, Any]:
    parts = pattern.split(".")
    if "*" not in parts:
        raise broken("name with numbers", "one with a star", repr(pattern)[:80], "")
    place = parts.index("*")
    return {".".join([*parts[:place], number, *parts[place + 1 :]]): row for number, row in _items(rows, "rows")}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        raise broken(what, "an object of JSON", f"{type(value).__name__}", "")
    return list(value.items())


def _row(row: Any, code: PartCode, name: str) -> list[int]:
    if not isinstance(row, list) or len(row) != code.fields or not all(type(n) is int for n in row):
        raise broken("row of the table", f"{code.fields} whole numbers", repr(row)[:80], name)
    if not all(0 <= number <= _MAX_SIZE for number in row):
        raise broken("row of the table", f"numbers in [0, {_MAX_SIZE}]", repr(row)[:80], name)
    return row


def max_claimed(blob: torch.Tensor) -> int:
    """Return how many entries coded indices can claim without stored values: one per bit."""
    return 8 * blob.numel()


def _plain(dtype: torch.dtype) -> PartCode:
    def sections(row: Sequence[int]) -> dict[str, int]:
        return {"indices": row[1], "values": row[0] * dtype.itemsize}

    def read(found: Mapping[str, torch.Tensor], row: Sequence[int], numel: int, name: str) -> TensorPatch:
        indices = decode_indices(found["indices"], row[0], numel, name)
        return TensorPatch(indices, _aligned(found["values"]).view(dtype))

    return PartCode(_dtype_name(dtype), 2, sections, read)


def _zeros(dtype: torch.dtype) -> PartCode:
    def read(found: Mapping[str, torch.Tensor], row: Sequence[int], numel: int, name: str) -> TensorPatch:
        # Not stored: the count is a claim of the file, and must not take much more memory than the file has.
        if row[0] > (most := max_claimed(found["indices"])):
            raise broken("number of zeros", f"at most {most}", str(row[0]), name)
        return TensorPatch(decode_indices(found["indices"], row[0], numel, name), torch.zeros(row[0], dtype=dtype))

    return PartCode(f"zeros of {_dtype_name(dtype)}", 2, lambda row: {"indices": row[1]}, read)


def _scaled(code: ValueCode) -> PartCode:
    def sections(row: Sequence[int]) -> dict[str, int]:
        return {"indices": row[1], "scales": 4 * code.num_scales(row[0]), "values": code.num_bytes(row[0])}

    def read(found: Mapping[str, torch.Tensor], row: Sequence[int], numel: int, name: str) -> ScaledTensor:
        indices = decode_indices(found["indices"], row[0], numel, name)
        scales = _aligned(found["scales"]).view(torch.float32)
        return ScaledTensor(indices, unpack_levels(found["values"], row[0], code, name), scales, code)

    return PartCode(code.name, 2, sections, read)


def _steps(dtype: torch.dtype) -> PartCode:
    def read(found: Mapping[str, torch.Tensor], row: Sequence[int], numel: int, name: str) -> StepTensor:
        return StepTensor(dtype, row[0], found["steps"])

    return PartCode(f"steps of {_dtype_name(dtype)}", 2, lambda row: {"steps": row[1]}, read)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(data: torch.Tensor) -> torch.Tensor:
    """Return a copy of bytes that starts where any dtype may."""
    return data.cpu().clone(memory_format=torch.contiguous_format)


CODES: dict[str, PartCode] = {
    **{name: _plain(dtype) for name, dtype in _DTYPES.items()},
    **{_ZEROS + name: _zeros(dtype) for name, dtype in _DTYPES.items()},
    **{_STEPS + name: _steps(dtype) for name, dtype in _STEP_DTYPES.items()},
    **{name: _scaled(code) for name, code in VALUE_CODES.items()},
}
