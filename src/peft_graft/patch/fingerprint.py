"""Fingerprints of a base: tell the model that a patch was made for from any other model."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ..checkpoints.donor import FLOAT_DTYPES
from .index_codec import PatchError, broken

NUM_SAMPLES = 64
_MAX_NAMED = 8  # tensors that an error names: if more differ, the base is another one
_MIN_COSINE = 0.9  # between values and their quantized form: 4 bits leave 0.99

_DTYPE_NAMES = frozenset(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)


@dataclass(frozen=True)
class Fingerprint:
    """A hash and a sample of the base's values at the patched positions.

    Attributes:
        dtype: The base's dtype, such as "float32"; where its tensors differ, runs over the sorted names, such as
            "bfloat16*12,float32*3".
        sha256: Hex digest over name, dtype, count and bytes of every patched tensor, in sorted order of the names.
        sample: Base64 of up to 64 entries as little-endian float64, evenly spaced over all.
        count: Number of patched entries.
    """

    dtype: str
    sha256: str
    sample: str
    count: int

    @classmethod
    def compute(cls, base_entries: Mapping[str, torch.Tensor]) -> Fingerprint:
        """Compute the fingerprint of a base.

        Args:
            base_entries: The base's values at the patched positions, floating-point of shape (n,), by tensor name.

        Returns:
            The fingerprint.
        """
        entries = dict(zip(sorted(base_entries), _in_order(base_entries), strict=True))
        builder = FingerprintBuilder()
        for name, values in entries.items():
            builder.add(name, values.dtype, values.numel(), [values])
        return builder.finish(lambda name, positions: entries[name][positions])

    def matches(self, base_entries: Mapping[str, torch.Tensor], rounded: Collection[str] = ()) -> bool:
        """Return whether a base is the one that this fingerprint was computed of, in the same or another float dtype.

        In the same dtype every bit must agree. In another one the sample must agree once both sides are cast to the
        coarser dtype; between float16 and bfloat16, of which neither holds the other, within one unit in the last
        place of bfloat16 or 2**-24. Quantized tensors need only point in the same direction (cosine at least 0.9),
        which rules out other models, but not other fine-tunings of this one.

        Args:
            base_entries: As in `compute`.
            rounded: Names of the tensors that are quantized.

        Returns:
            True if the base matches.
        """
        now = Fingerprint.compute(base_entries)
        if not rounded and (now.count, now.dtype) == (self.count, self.dtype):
            return now.sha256 == self.sha256
        return self.mismatches(base_entries, rounded) == 0

    def mismatches(self, base_entries: Mapping[str, torch.Tensor], rounded: Collection[str] = ()) -> int:
        """Count the sampled entries in which a base differs; all of them if the number of entries differs.

        Args:
            base_entries: As in `compute`.
            rounded: As in `matches`.

        Returns:
            The count, at most 64.
        """
        entries = _in_order(base_entries)
        count = sum(len(values) for values in entries)
        owners = self._differing(base_entries, rounded)
        return min(NUM_SAMPLES, max(count, self.count)) if owners is None else len(owners)

    def _differing(self, base_entries: Mapping[str, torch.Tensor], rounded: Collection[str]) -> list[str] | None:
        """Return the tensor of each sampled entry that differs; None if the number of entries differs."""
        entries = _in_order(base_entries)
        now, owners, count = _sampled(entries)
        names = _split_runs(self.dtype, len(entries))
        if count != self.count or names is None:
            return None
        then = torch.tensor(np.frombuffer(base64.b64decode(self.sample), "<f8"))
        same = torch.ones(len(now), dtype=torch.bool)
        tensors = sorted(base_entries)
        inexact = torch.tensor([tensors[owner] in rounded for owner in owners], dtype=torch.bool)
        if inexact.any():
            same[inexact] = torch.cosine_similarity(then[inexact], now[inexact], dim=0) >= _MIN_COSINE
        for i, owner in enumerate(owners):
            if not inexact[i]:
                same[i] = _agree(then[i], getattr(torch, names[owner]), now[i], entries[owner].dtype)
        return [tensors[owner] for owner, agrees in zip(owners, same.tolist(), strict=True) if not agrees]

    def require(
        self, base_entries: Mapping[str, torch.Tensor], base_name: str | None = None, rounded: Collection[str] = ()
    ) -> None:
        """Raise an error if a base does not match.

        Args:
            base_entries: As in `compute`.
            base_name: Name of the right base, for the message.
            rounded: As in `matches`.

        Raises:
            PatchError: If the base does not match.
        """
        if self.matches(base_entries, rounded):
            return
        differing = self.mismatches(base_entries, rounded)
        found = f"{differing} of {min(NUM_SAMPLES, self.count)} samples" if differing else "their hash"
        load = f"Load {base_name!r}" if base_name else "Load the base that it was made from"
        raise PatchError(
            "base must be the model that this patch was made for, got values that differ at the patched positions "
            f"({found}). {load}, at the same revision and before any fine-tuning or merging."
            f"{_explain(base_entries, self._differing(base_entries, rounded) or [])}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Fingerprint:
        """Build a fingerprint from the dictionary of `to_dict`.

        Args:
            fields: The fields; others are ignored.

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


class FingerprintBuilder:
    """A fingerprint of tensors that are read one after the other, in sorted order of their names."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._tensors: list[tuple[str, torch.dtype, int]] = []

    def add(self, name: str, dtype: torch.dtype, count: int, values: Iterable[torch.Tensor]) -> None:
        """Add a tensor.

        Args:
            name: Its name, which comes after those of all others so far.
            dtype: Dtype of its values.
            count: How many values of it are covered.
            values: The values, in parts of shape (n,).
        """
        digest = self.begin(name, dtype, count)
        for part in values:
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
        self.add_digest(name, dtype, count, digest)

    def begin(self, name: str, dtype: torch.dtype, count: int) -> Any:
        """Return a digest for the little-endian bytes of a tensor that may yet be left out (see `add_digest`)."""
        digest = self._digest.copy()
        digest.update(f"{name}\0{_dtype_name(dtype, name)}\0{count}\0".encode())
        return digest

    def add_digest(self, name: str, dtype: torch.dtype, count: int, digest: Any) -> None:
        """Add the tensor that `begin` returned a digest for, which now holds its values."""
        self._digest = digest
        self._tensors.append((name, dtype, count))

    def finish(self, read: Callable[[str, list[int]], torch.Tensor]) -> Fingerprint:
        """Return the fingerprint.

        Args:
            read: Function (name, increasing positions) -> the values at these positions among those covered.
        """
        ends = np.cumsum([count for _, _, count in self._tensors], dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        places: dict[str, list[int]] = {}
        for position, owner in _sample_positions(ends, total):
            name, _, count = self._tensors[owner]
            places.setdefault(name, []).append(position - (int(ends[owner]) - count))
        picked = [read(name, positions).to(torch.float64) for name, positions in places.items()]
        sample = torch.cat(picked) if picked else torch.zeros(0, dtype=torch.float64)
        dtypes = _join_runs([_dtype_name(dtype, name) for name, dtype, _ in self._tensors])
        encoded = base64.b64encode(sample.numpy().tobytes()).decode()
        return Fingerprint(dtypes, self._digest.hexdigest(), encoded, total)


def _explain(base_entries: Mapping[str, torch.Tensor], differing: Sequence[str]) -> str:
    """Say where the differences are, if only in some tensors: there, the base may have been new at its load."""
    where = sorted({*differing})
    if not where or len(where) == len(base_entries) or len(where) > _MAX_NAMED:
        return ""
    modules = sorted({name.rpartition(".")[0] for name in where})
    return (
        f" The samples that differ are all of them in {where}. If the base's files do not hold these tensors, or rows "
        "were added to them, they are new at every load: make the adapter again, with the base that was saved after "
        f"they were made, or with modules_to_save={modules}."
    )


def _in_order(base_entries: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [base_entries[name].detach().reshape(-1).cpu().contiguous() for name in sorted(base_entries)]


def _dtype_name(dtype: torch.dtype, where: str) -> str:
    if dtype not in FLOAT_DTYPES:
        raise broken("base", "float64, float32, float16 or bfloat16", str(dtype), where)
    return str(dtype).removeprefix("torch.")


def _join_runs(names: Sequence[str]) -> str:
    runs = [(name, len(list(group))) for name, group in groupby(names)]
    return runs[0][0] if len(runs) == 1 else ",".join(f"{name}*{length}" for name, length in runs)


def _split_runs(text: str, count: int) -> list[str] | None:
    """Return the `count` names that `_join_runs` joined; None if `text` is malformed or holds another number."""
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
    """Sample evenly over all entries; return the values (float64), the tensor that each is from, and the total."""
    ends = np.cumsum([len(values) for values in entries], dtype=np.int64)
    count = int(ends[-1]) if len(ends) else 0
    places = _sample_positions(ends, count)
    picked = [entries[o][p - int(ends[o])].to(torch.float64) for p, o in places]
    return torch.stack(picked) if picked else torch.zeros(0, dtype=torch.float64), [o for _, o in places], count


def _sample_positions(ends: np.typing.NDArray[np.int64], count: int) -> list[tuple[int, int]]:
    """Return the sampled positions among all entries, and the tensor that each is in."""
    size = min(NUM_SAMPLES, count)
    positions = [i * count // size for i in range(size)]
    return list(zip(positions, np.searchsorted(ends, positions, side="right").tolist(), strict=True))


def _agree(then: torch.Tensor, then_dtype: torch.dtype, now: torch.Tensor, now_dtype: torch.dtype) -> bool:
    """Return whether two float64 scalars can be roundings of one number to the two dtypes."""
    if {then_dtype, now_dtype} == {torch.float16, torch.bfloat16}:
        a, b = (side.to(torch.bfloat16).to(torch.float64) for side in (then, now))
        # bfloat16 has 8 significant bits; below 2**-14, float16 has steps of 2**-24.
        ulp = 2.0 ** (int(torch.frexp(torch.maximum(a.abs(), b.abs())).exponent) - 8)
        return bool(a == b) or bool((a - b).abs() <= max(ulp, 2.0**-24))
    coarse = min(then_dtype, now_dtype, key=lambda dtype: dtype.itemsize)
    return bool(then.to(coarse) == now.to(coarse))
