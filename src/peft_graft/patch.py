"""Patches: the replaced entries of tensors and their new values, their file form, and the fingerprint of the base."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import secrets
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .deltas import FLOAT_DTYPES, count_nonfinite

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

KINDS = ("indices", "values", "logits")
MAX_NUMEL = 2**48
NUM_SAMPLES = 64

_CONTAINER = "graft_patch"
_PEFT_PREFIX = "base_model.model."
_RUN, _RICE, _VARINT = range(3)
_CHUNK = 1 << 16
_DTYPE_NAMES = frozenset(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


class PatchError(ValueError):
    """A patch is malformed, or was made for another base."""


@dataclass(frozen=True, eq=False)
class TensorPatch:
    """The replaced entries of one tensor.

    Attributes:
        indices: int64 of shape (n,): flat (row-major) indices, strictly increasing.
        values: Floating-point of shape (n,): what the entries become, in the donor's dtype.
    """

    indices: torch.Tensor
    values: torch.Tensor

    def validate(self, name: str, numel: int = MAX_NUMEL) -> None:
        """Check that this can be written into a tensor.

        Args:
            name: The tensor's name, for error messages.
            numel: How many entries the tensor has.

        Raises:
            PatchError: If indices are unsorted, repeated or out of range, or the values are not as many, finite and
                of a floating-point dtype.
        """
        _check_indices(self.indices, numel, name)
        if self.values.dtype not in FLOAT_DTYPES or self.values.shape != self.indices.shape:
            got = f"{self.values.dtype} of shape {tuple(self.values.shape)}"
            raise _broken("values", f"floating-point of shape {tuple(self.indices.shape)}", got, name)
        if bad := count_nonfinite(self.values):
            raise _broken("values", "finite", f"{bad} NaN or Inf", name)


@dataclass(frozen=True, eq=False)
class Patch:
    """Replacement values for chosen entries of a model's tensors.

    Attributes:
        tensors: The replaced entries by tensor name, `<module>.<param>`.
        shapes: Shape of each tensor that may be patched, by name, where the base is known.
    """

    tensors: Mapping[str, TensorPatch]
    shapes: Mapping[str, tuple[int, ...]] | None = None

    @property
    def num_params(self) -> int:
        """How many entries are replaced."""
        return sum(part.indices.numel() for part in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors take in a file, without its header. The indices are coded to find out."""
        return sum(tensor.nbytes for tensor in self.to_tensors().values())

    def validate(self) -> None:
        """Check every tensor, against `shapes` where they are known.

        Raises:
            PatchError: If a tensor's patch is malformed, or a patched tensor is not among `shapes`.
        """
        for name, part in self.tensors.items():
            part.validate(name, _numel(name, self.shapes))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return the patch as a state dict, as it stands in a file.

        Returns:
            Two tensors per patched one, on the CPU: `<module>.graft_patch.<param>_indices` (uint8, coded) and
            `<module>.graft_patch.<param>_values` (the donor's dtype; of shape (n, 0) where all are +0 and n is small
            enough for the coded indices to vouch for it).

        Raises:
            PatchError: If the patch is malformed.
        """
        self.validate()
        state = {}
        for name in sorted(self.tensors):
            module, _, param = name.rpartition(".")
            blob, values = encode_indices(self.tensors[name].indices), self.tensors[name].values.detach().cpu()
            if 0 < values.numel() <= _vouched(blob) and not torch.any(values.contiguous().view(torch.uint8)):
                values = values.new_empty(values.numel(), 0)
            state[file_key(module, param, "indices")] = blob
            state[file_key(module, param, "values")] = values.contiguous()
        return state

    @classmethod
    def from_tensors(
        cls, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]] | None = None
    ) -> Patch:
        """Read a patch from a state dict, trusting nothing in it.

        Args:
            state: What an adapter file holds. Keys may start with PEFT's `base_model.model.`. Tensors that are not
                part of a patch (`modules_to_save`) and mask logits of a training checkpoint are passed over.
            shapes: Shape of each tensor that may be patched, by name. Without it, indices are only checked against
                each other.

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
                raise _broken(kind, "given once", f"a second time as {key!r}", name)
            found[name][kind] = state[key]
        tensors = {}
        for name, kinds in found.items():
            if kinds.keys() == {"logits"}:
                continue
            if not {"indices", "values"} <= kinds.keys():
                raise _broken("patched tensor", "given by indices and values", f"{sorted(kinds)}", name)
            tensors[name] = _read_part(name, kinds["indices"], kinds["values"], _numel(name, shapes))
        return cls(tensors, shapes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; an older file at `path` is replaced at once or not at all.

        Args:
            path: Where to write.

        Raises:
            PatchError: If the patch is malformed.
        """
        path = Path(path)
        # Copies, because safetensors refuses tensors that are slices of one storage.
        state = {key: tensor.clone() for key, tensor in self.to_tensors().items()}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        try:
            save_file(state, temporary, metadata={"format": "pt"})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

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


def file_key(module: str, param: str, kind: str) -> str:
    """Return the key under which a part of a tensor's patch stands in a file.

    Args:
        module: Dotted name of the module, empty for a parameter of the model itself.
        param: Name of the parameter in it, without dots.
        kind: "indices", "values" or "logits" (the mask's logits, float32, in training checkpoints only).

    Returns:
        `<module>.graft_patch.<param>_<kind>`.

    Raises:
        PatchError: If `param` or `kind` is not as above.
    """
    if not param or "." in param or kind not in KINDS:
        raise PatchError(f"file key must be made of a name without dots and one of {KINDS}, got {param!r}, {kind!r}.")
    return f"{module}{'.' if module else ''}{_CONTAINER}.{param}_{kind}"


def parse_file_key(key: str) -> tuple[str, str, str] | None:
    """Take a key of a file apart.

    Args:
        key: The key, with or without PEFT's prefix `base_model.model.`.

    Returns:
        (module, param, kind) as in `file_key`, or None if the key is not part of a patch.

    Raises:
        PatchError: If the key names a patch's container and then something unknown.
    """
    module, container, leaf = ("." + key.removeprefix(_PEFT_PREFIX)).rpartition(f".{_CONTAINER}.")
    if not container:
        return None
    param, _, kind = leaf.rpartition("_")
    if not param or "." in param or kind not in KINDS:
        raise PatchError(f"file key must end in <param>_indices, <param>_values or <param>_logits, got {key!r}.")
    return module.removeprefix("."), param, kind


def _broken(what: str, constraint: str, got: str, where: str) -> PatchError:
    place = f" in {where!r}" if where else ""
    return PatchError(f"{what} must be {constraint}, got {got}{place}. Make the patch again, or download it again.")


def _check_indices(indices: torch.Tensor, numel: int, where: str) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        raise _broken("indices", "int64 of shape (n,)", f"{indices.dtype} of shape {tuple(indices.shape)}", where)
    if indices.numel() == 0:
        return
    if not bool((indices[1:] > indices[:-1]).all()):
        raise _broken("indices", "strictly increasing", "unsorted or repeated ones", where)
    if int(indices[0]) < 0 or int(indices[-1]) >= numel:
        raise _broken("indices", f"in [0, {numel})", f"{int(indices[0])} ... {int(indices[-1])}", where)


def _numel(name: str, shapes: Mapping[str, tuple[int, ...]] | None) -> int:
    if shapes is None:
        return MAX_NUMEL
    if name not in shapes:
        raise _broken("patched tensor", "one that the base has and the adapter targets", repr(name), "")
    return math.prod(shapes[name])


def _vouched(blob: torch.Tensor) -> int:
    """How many entries coded indices can stand for without values that show it: one a bit."""
    return 8 * blob.numel()


def _read_part(name: str, blob: torch.Tensor, values: torch.Tensor, numel: int) -> TensorPatch:
    if values.dtype in FLOAT_DTYPES and values.dim() == 2 and values.shape[1] == 0:
        # All +0, not written out. The count is then a bare claim, so it must not cost more memory than the file has.
        if values.shape[0] > _vouched(blob):
            raise _broken("number of zeros", f"at most {_vouched(blob)}", str(values.shape[0]), name)
        values = values.new_zeros(values.shape[0])
    if values.dim() != 1:
        raise _broken("values", "of shape (n,)", f"shape {tuple(values.shape)}", name)
    part = TensorPatch(decode_indices(blob, len(values), numel, name), values)
    part.validate(name, numel)
    return part


@dataclass(frozen=True)
class Fingerprint:
    """What the base's values at the patched positions were, to tell the right base from a wrong one.

    Attributes:
        dtype: The base's dtype, such as "float32"; where its tensors differ, runs over the sorted names, such as
            "bfloat16*12,float32*3".
        sha256: Hex digest over name, dtype, count and bytes of every patched tensor, in sorted order of the names.
        sample: Base64 of up to 64 entries as little-endian float64, evenly spaced over all.
        count: How many entries there are.
    """

    dtype: str
    sha256: str
    sample: str
    count: int

    @classmethod
    def compute(cls, base_entries: Mapping[str, torch.Tensor]) -> Fingerprint:
        """Take the fingerprint of a base.

        Args:
            base_entries: By tensor name, the base's values at the patched positions: floating-point of shape (n,).

        Returns:
            The fingerprint.
        """
        digest, entries, dtypes = hashlib.sha256(), [], []
        for name in sorted(base_entries):
            values = base_entries[name].detach().reshape(-1).cpu().contiguous()
            dtypes.append(_dtype_name(values.dtype, name))
            digest.update(f"{name}\0{dtypes[-1]}\0{values.numel()}\0".encode())
            digest.update(values.view(torch.uint8).numpy().data)
            entries.append(values)
        sample, _, count = _sampled(entries)
        return cls(_join_runs(dtypes), digest.hexdigest(), base64.b64encode(sample.numpy().tobytes()).decode(), count)

    def matches(self, base_entries: Mapping[str, torch.Tensor]) -> bool:
        """Say whether a base is the one that this fingerprint was taken of, in this or another float dtype.

        In the same dtype every bit must agree. In another one the sample must agree once both sides are cast to the
        coarser dtype; between float16 and bfloat16, of which neither holds the other, within one unit in the last
        place of bfloat16 or 2**-24.

        Args:
            base_entries: As in `compute`.

        Returns:
            True if it is.
        """
        now = Fingerprint.compute(base_entries)
        if (now.count, now.dtype) == (self.count, self.dtype):
            return now.sha256 == self.sha256
        return self.mismatches(base_entries) == 0

    def mismatches(self, base_entries: Mapping[str, torch.Tensor]) -> int:
        """Count the sampled entries in which a base differs (all of them where the number of entries does)."""
        entries = [base_entries[name].detach().reshape(-1).cpu() for name in sorted(base_entries)]
        now, owners, count = _sampled(entries)
        names = _split_runs(self.dtype, len(entries))
        if count != self.count or names is None:
            return min(NUM_SAMPLES, max(count, self.count))
        then = torch.tensor(np.frombuffer(base64.b64decode(self.sample), "<f8"))
        same = torch.ones(len(now), dtype=torch.bool)
        for i, owner in enumerate(owners):
            same[i] = _agree(then[i], getattr(torch, names[owner]), now[i], entries[owner].dtype)
        return int((~same).sum())

    def require(self, base_entries: Mapping[str, torch.Tensor], base_name: str | None = None) -> None:
        """Refuse a base that does not match.

        Args:
            base_entries: As in `compute`.
            base_name: What the right base is called.

        Raises:
            PatchError: If the base does not match.
        """
        if self.matches(base_entries):
            return
        differing = self.mismatches(base_entries)
        found = f"{differing} of {min(NUM_SAMPLES, self.count)} samples" if differing else "their hash"
        load = f"Load {base_name!r}" if base_name else "Load the base that it was made from"
        raise PatchError(
            "base must be the model that this patch was made for, got values that differ at the patched positions "
            f"({found}). {load}, at the same revision and before any fine-tuning or merging."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fingerprint:
        """Read what `to_dict` returned.

        Args:
            fields: The fields; others are passed over.

        Returns:
            The fingerprint.

        Raises:
            PatchError: If a field is missing or malformed.
        """
        try:
            made = cls(**{name: fields[name] for name in cls.__dataclass_fields__})
            sampled = len(base64.b64decode(made.sample, validate=True))
            if type(made.count) is not int or not 0 <= made.count or sampled != 8 * min(NUM_SAMPLES, made.count):
                raise ValueError(f"{sampled} bytes of samples for {made.count} entries")
            if len(bytes.fromhex(made.sha256)) != hashlib.sha256().digest_size or not isinstance(made.dtype, str):
                raise ValueError(f"sha256 {made.sha256!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise PatchError(
                f"fingerprint must be what Fingerprint.to_dict returned, got {error!r}. "
                "Download the adapter's configuration again."
            ) from error
        return made


def _dtype_name(dtype: torch.dtype, where: str) -> str:
    if dtype not in FLOAT_DTYPES:
        raise _broken("base", "float64, float32, float16 or bfloat16", str(dtype), where)
    return str(dtype).removeprefix("torch.")


def _join_runs(names: Sequence[str]) -> str:
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return runs[0][0] if len(runs) == 1 else ",".join(f"{name}*{length}" for name, length in runs)


def _split_runs(text: str, count: int) -> list[str] | None:
    """Undo `_join_runs` for `count` names; None if it is malformed or for another number."""
    if text in _DTYPE_NAMES:
        return [text] * count
    names: list[str] = []
    for run in text.split(",") if text else ():
        name, _, length = run.partition("*")
        if name not in _DTYPE_NAMES or not length.isdecimal() or len(length) > 9 or len(names) + int(length) > count:
            return None
        names += [name] * int(length)
    return names if len(names) == count else None


def _sampled(entries: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int], int]:
    """Sample evenly over all entries: their values in float64, the tensor that each is of, and how many there are."""
    ends = np.cumsum([len(values) for values in entries], dtype=np.int64)
    count = int(ends[-1]) if len(ends) else 0
    size = min(NUM_SAMPLES, count)
    positions = [i * count // size for i in range(size)]
    owners = [int(owner) for owner in np.searchsorted(ends, positions, side="right")]
    picked = [entries[o][p - int(ends[o])].to(torch.float64) for o, p in zip(owners, positions, strict=True)]
    return torch.stack(picked) if picked else torch.zeros(0, dtype=torch.float64), owners, count


def _agree(then: torch.Tensor, then_dtype: torch.dtype, now: torch.Tensor, now_dtype: torch.dtype) -> bool:
    """Say whether two float64 scalars, of values held in two dtypes, can be roundings of one number."""
    if {then_dtype, now_dtype} == {torch.float16, torch.bfloat16}:
        a, b = (side.to(torch.bfloat16).to(torch.float64) for side in (then, now))
        # bfloat16 has 8 significant bits; below 2**-14, float16 has steps of 2**-24.
        ulp = 2.0 ** (int(torch.frexp(torch.maximum(a.abs(), b.abs())).exponent) - 8)
        return bool(a == b) or bool((a - b).abs() <= max(ulp, 2.0**-24))
    coarse = min(then_dtype, now_dtype, key=lambda dtype: dtype.itemsize)
    return bool(then.to(coarse) == now.to(coarse))


def encode_indices(indices: torch.Tensor) -> torch.Tensor:
    """Code the flat indices of a tensor's replaced entries by the gaps between them.

    Three codecs are tried and the shortest result is kept: one run, Golomb-Rice, and deflated varints.
    The bytes are specified in `docs/patch_format.md`.

    Args:
        indices: int64 of shape (n,), strictly increasing, each in [0, 2**48).

    Returns:
        uint8 of shape (bytes,). The first one names the codec.

    Raises:
        PatchError: If `indices` is not as above.
    """
    _check_indices(indices, MAX_NUMEL, "")
    flat = indices.cpu().numpy()
    if flat.size == 0 or flat[-1] - flat[0] == flat.size - 1:
        start = flat[:1] if flat.size else np.zeros(1, np.int64)
        return _tagged(_RUN, _varints(start).tobytes())
    gaps = np.diff(flat, prepend=-1) - 1
    rice, deflated = _encode_rice(gaps), zlib.compress(_varints(gaps).tobytes())
    return _tagged(_VARINT, deflated) if len(deflated) < len(rice) else _tagged(_RICE, rice)


def decode_indices(blob: torch.Tensor, count: int, numel: int = MAX_NUMEL, where: str = "") -> torch.Tensor:
    """Decode what `encode_indices` wrote, trusting nothing in it.

    Memory stays within a small multiple of `count` plus the size of `blob`, whatever the bytes say.

    Args:
        blob: uint8 of shape (bytes,).
        count: How many indices there must be.
        numel: How many entries the tensor has: every index must be below it.
        where: The tensor's name, for error messages.

    Returns:
        int64 of shape (count,), strictly increasing, each in [0, numel).

    Raises:
        PatchError: If `blob` is anything but a valid code of `count` such indices.
    """
    if blob.dtype != torch.uint8 or blob.dim() != 1 or blob.numel() == 0:
        raise _broken(
            "coded indices", "a non-empty vector of uint8", f"{blob.dtype} of shape {tuple(blob.shape)}", where
        )
    if not 0 <= count <= numel <= MAX_NUMEL:
        raise _broken("number of entries", f"at most {min(numel, MAX_NUMEL)}", str(count), where)
    codec, payload = int(blob[0]), blob[1:].cpu().contiguous().numpy()
    decoders: dict[int, Callable[[Bytes, int, int, str], Integers]] = {
        _RUN: _decode_run,
        _RICE: _decode_rice,
        _VARINT: _decode_deflated,
    }
    if codec not in decoders:
        raise _broken("codec of the indices", "0 (run), 1 (Rice) or 2 (varint)", str(codec), where)
    return torch.from_numpy(decoders[codec](payload, count, numel, where))


def _tagged(codec: int, payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray([codec]) + payload, dtype=torch.uint8)


def _from_gaps(gaps: Integers, numel: int, where: str) -> Integers:
    # The float sum is inexact but cannot wrap around, unlike the exact one after it.
    if gaps.size and float(gaps.sum(dtype=np.float64)) <= 2.0 * MAX_NUMEL:
        indices = np.cumsum(gaps + 1) - 1
        if indices[-1] < numel:
            return indices
    elif not gaps.size:
        return gaps
    raise _broken("indices", f"below {numel}", "larger ones", where)


def _width(numel: int) -> int:
    """How many bytes a varint below `numel` takes at most."""
    return max(1, -(-max(numel - 1, 0).bit_length() // 7))


def _varints(numbers: Integers) -> Bytes:
    """Code numbers as unsigned LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    largest = int(numbers.max(initial=0))
    width = max(1, -(-largest.bit_length() // 7))
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
        raise _broken("coded indices", f"{count} whole varints", f"{ends.size} and {coded.size} bytes", where)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])[:count]
    lengths = ends - starts + 1
    if lengths.max(initial=0) > width or np.any((lengths > 1) & (coded[ends] == 0)):
        raise _broken("varints", f"the shortest, of at most {width} bytes", "a longer one", where)
    numbers = np.zeros(count, np.int64)
    for k in range(int(lengths.max(initial=0))):
        here = lengths > k
        numbers[here] |= (coded[starts[here] + k].astype(np.int64) & 127) << 7 * k
    return numbers


def _decode_run(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    start = int(_read_varints(payload, 1, _width(MAX_NUMEL), where)[0])
    if start + count > numel:
        raise _broken("indices", f"below {numel}", f"a run of {count} from {start}", where)
    return np.arange(start, start + count, dtype=np.int64)


def _decode_deflated(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    limit = count * _width(numel)
    stream = zlib.decompressobj()
    try:
        # One byte more than can be right, so that a bomb is cut off and still seen.
        coded = stream.decompress(payload.tobytes(), limit + 1)
    except zlib.error as error:
        raise _broken("coded indices", "whole deflated varints", str(error), where) from error
    if not stream.eof or stream.unused_data or len(coded) > limit:
        raise _broken("coded indices", f"one zlib stream of at most {limit} bytes", "a truncated or longer one", where)
    return _from_gaps(_read_varints(np.frombuffer(coded, np.uint8), count, _width(numel), where), numel, where)


def _encode_rice(gaps: Integers) -> bytes:
    """Code gaps as g = q * 2**r + remainder (Golomb 1966, Rice 1979): r bit planes of remainders, then unary q."""

    def cost(r: int) -> int:
        return r * gaps.size + int((gaps >> r).sum())

    # The cost is convex in r, and least at or below log2 of the mean gap, rounded up, plus one.
    r = int(gaps.mean()).bit_length() + 1
    while r and cost(r - 1) <= cost(r):
        r -= 1
    bits = np.zeros(cost(r) + gaps.size, np.uint8)
    for k in range(r):
        bits[k * gaps.size : (k + 1) * gaps.size] = gaps >> k & 1
    bits[r * gaps.size + np.cumsum((gaps >> r) + 1) - 1] = 1
    return bytes([r]) + np.packbits(bits).tobytes()


def _decode_rice(payload: Bytes, count: int, numel: int, where: str) -> Integers:
    r, packed = int(payload[0]) if payload.size else 255, payload[1:]
    if r > MAX_NUMEL.bit_length() or 8 * packed.size < count * (r + 1):
        raise _broken("coded indices", f"Rice codes of {count} entries", f"r = {r} and {packed.size} bytes", where)
    gaps = np.zeros(count, np.int64)
    for k in range(r):
        first, skip = divmod(k * count, 8)
        plane = np.unpackbits(packed[first : first + (skip + count + 7) // 8])[skip : skip + count]
        gaps |= plane.astype(np.int64) << k
    ones = _find_ones(packed, r * count, count)
    padding = 8 * packed.size - r * count - (int(ones[-1]) + 1 if ones.size else 0)
    if ones.size != count or padding >= 8:
        raise _broken(
            "coded indices", f"Rice codes of {count} entries", "another number of them, or bytes after them", where
        )
    quotients = np.diff(ones, prepend=-1) - 1
    if quotients.max(initial=0) > numel >> r:
        raise _broken("indices", f"below {numel}", "larger ones", where)
    return _from_gaps(gaps + (quotients << r), numel, where)


def _find_ones(packed: Bytes, start: int, limit: int) -> Integers:
    """Find the set bits from bit `start` on, counted from there; stop soon after `limit` of them."""
    first, skip = divmod(start, 8)
    found, total = [np.zeros(0, np.int64)], 0
    for offset in range(first, packed.size, _CHUNK):
        bits = np.unpackbits(packed[offset : offset + _CHUNK])
        if offset == first:
            bits[:skip] = 0
        found.append(np.flatnonzero(bits) + (8 * offset - start))
        total += found[-1].size
        if total > limit:
            break
    return np.concatenate(found)
