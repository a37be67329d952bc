"""How close two checkpoints are, layer by layer, read piece by piece."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..checkpoints.block_reader import PairedReader
from ..checkpoints.donor import FLOAT_DTYPES, MAX_LISTED
from ..checkpoints.pairing import CheckpointDonor, DonorError, bits_differ, resolve_names
from ..selection.budget import unit_of
from .format import table


@dataclass
class Closeness:
    """Sums over the entries of some tensors in a base b and a donor d, from which distances follow.

    The distances of fine-tuned models to their base, by layer, are what Radiya-Dixit & Wang 2020 (arXiv 2004.14129,
    section 3) look at: small in L1 and in angle, in some layers far more than in others.

    Attributes:
        name: What was summed over: a tensor, a layer, or everything.
        entries: How many entries there are.
        differing: How many of them differ in any bit.
        l1: sum |d - b|.
        l2_squared: sum (d - b)^2.
        base_squared: sum b^2.
        donor_squared: sum d^2.
        dot: sum b * d.
        largest: max |d - b|.
    """

    name: str
    entries: int = 0
    differing: int = 0
    l1: float = 0.0
    l2_squared: float = 0.0
    base_squared: float = 0.0
    donor_squared: float = 0.0
    dot: float = 0.0
    largest: float = 0.0

    @property
    def l1_mean(self) -> float:
        """Mean |d - b|."""
        return self.l1 / max(self.entries, 1)

    @property
    def l2(self) -> float:
        """|d - b|."""
        return math.sqrt(self.l2_squared)

    @property
    def l2_relative(self) -> float:
        """|d - b| / |b|; NaN where b is zero."""
        return self.l2 / math.sqrt(self.base_squared) if self.base_squared else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of the angle between b and d, in [-1, 1]; NaN where one is zero."""
        norms = math.sqrt(self.base_squared) * math.sqrt(self.donor_squared)
        return max(-1.0, min(1.0, self.dot / norms)) if norms else math.nan

    @property
    def angle(self) -> float:
        """Angle between b and d as a share of a half turn, in [0, 1]; NaN where one is zero."""
        return math.acos(self.cosine) / math.pi

    def add(self, other: Closeness) -> None:
        """Sum over the other's entries too."""
        for each in fields(self)[1:]:
            if each.name != "largest":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.largest = max(self.largest, other.largest)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and distances, for JSON; what is not a number is None."""
        numbers = {
            key: getattr(self, key)
            for key in ("entries", "differing", "l1", "l1_mean", "l2", "l2_relative", "cosine", "angle", "largest")
        }
        return {"name": self.name, **{key: None if value != value else value for key, value in numbers.items()}}


@dataclass
class Comparison:
    """Two checkpoints side by side.

    Attributes:
        tensors: How close each tensor is that both have in the same shape, in order of the base's names.
        only_in_base: Names of the base's other tensors.
        only_in_donor: Names of the donor's other tensors.
        not_compared: Names of tensors whose shapes differ, or that hold no floating-point values.
    """

    tensors: list[Closeness] = field(default_factory=list)
    only_in_base: list[str] = field(default_factory=list)
    only_in_donor: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def total(self) -> Closeness:
        """How close everything is that was compared."""
        return _summed("all", self.tensors)

    def by_layer(self) -> list[Closeness]:
        """Return how close each layer is: all tensors whose names agree up to the first number."""
        layers: dict[str, list[Closeness]] = {}
        for each in self.tensors:
            layers.setdefault(unit_of(each.name, "layer"), []).append(each)
        return [
            _summed(layer, tensors) for layer, tensors in sorted(layers.items(), key=lambda item: _natural(item[0]))
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "total": self.total.to_dict(),
            "layers": [layer.to_dict() for layer in self.by_layer()],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "only_in_base": self.only_in_base,
            "only_in_donor": self.only_in_donor,
            "not_compared": self.not_compared,
        }

    def to_text(self, by_tensor: bool = False) -> str:
        """Return a table with one row for each layer, or each tensor."""
        rows = [_row(each) for each in [*(self.tensors if by_tensor else self.by_layer()), self.total]]
        header = (
            "tensor" if by_tensor else "layer",
            "entries",
            "differ",
            "mean |d|",
            "|d|",
            "|d|/|base|",
            "cosine",
            "max |d|",
        )
        notes = [
            f"{what}: {len(names)} ({', '.join(names[:MAX_LISTED])}{', ...' if len(names) > MAX_LISTED else ''})"
            for what, names in (
                ("only in the base", self.only_in_base),
                ("only in the donor", self.only_in_donor),
                ("not compared", self.not_compared),
            )
            if names
        ]
        return "\n".join([table(header, rows), *notes])


def compare(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str],
    *,
    base_revision: str | None = None,
    donor_revision: str | None = None,
    on_start: Callable[[int], Callable[[int], object]] | None = None,
) -> Comparison:
    """Compare two checkpoints tensor by tensor, as they stand in their files.

    Args:
        base: Directory, file or Hub id of a safetensors checkpoint.
        donor: The other one. Names that differ by a prefix only (`bert.`) are found.
        base_revision: Branch, tag or commit of a base on the Hub.
        donor_revision: The same of a donor.
        on_start: Called with the number of bytes to read; what it returns is called with the bytes of every read.

    Returns:
        The comparison.

    Raises:
        DonorError: A checkpoint cannot be read, or they have no tensor in common.
    """
    ours = CheckpointDonor(base, base_revision, role="base")
    theirs = CheckpointDonor(donor, donor_revision)
    names = _matched(ours, theirs)
    result = Comparison(
        only_in_base=sorted({*ours.names()} - names.keys()), only_in_donor=sorted({*theirs.names()} - {*names.values()})
    )
    for name in list(names):
        one, other = ours.extent(name), theirs.extent(names[name])
        if one.shape != other.shape or not {one.dtype, other.dtype} <= {*FLOAT_DTYPES}:
            result.not_compared.append(name)
            del names[name]
    if not names:
        raise DonorError(
            f"donor must have tensors in common with the base, got none in {theirs.name!r} and {ours.name!r}. "
            "Compare two checkpoints of one architecture."
        )
    pairs = PairedReader(
        {name: [ours.extent(name)] for name in names}, {name: [theirs.extent(names[name])] for name in names}
    )
    if on_start is not None:
        pairs.on_read = on_start(sum(pairs.nbytes))
    found = {name: Closeness(name) for name in sorted(names, key=_natural)}
    for span, measured in pairs.map(lambda block: _measured(block.base, block.donor)):
        found[span.name].add(measured)
    result.tensors = list(found.values())
    return result


def _matched(ours: CheckpointDonor, theirs: CheckpointDonor) -> dict[str, str]:
    """The donor's name by the base's, for all tensors that both have, whatever their shapes."""
    held = {*theirs.names()}
    names = {name: name for name in ours.names() if name in held}
    free = held - names.keys()
    prefixes = sorted({name.partition(".")[0] for name in (*ours.names(), *held) if "." in name})
    for name in ours.names():
        if name in names or not free:
            continue
        try:
            other = resolve_names({name: ours.shape(name)}, theirs, prefixes)[name]
        except DonorError:
            continue
        if other in free:
            names[name] = other
            free.discard(other)
    return dict(sorted(names.items()))


def _measured(base: torch.Tensor, donor: torch.Tensor) -> Closeness:
    before, after = base.double(), donor.double()
    delta = after - before
    size = delta.abs()
    return Closeness(
        "",
        base.numel(),
        int(bits_differ(base, donor).count_nonzero()),
        float(size.sum()),
        float(delta.dot(delta)),
        float(before.dot(before)),
        float(after.dot(after)),
        float(before.dot(after)),
        float(size.max()),
    )


def _summed(name: str, parts: Iterable[Closeness]) -> Closeness:
    total = Closeness(name)
    for part in parts:
        total.add(part)
    return total


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]


def _row(each: Closeness) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.entries:,}",
        f"{each.differing / max(each.entries, 1):.2%}",
        f"{each.l1_mean:.2e}",
        f"{each.l2:.4g}",
        f"{each.l2_relative:.2e}",
        f"{each.cosine:.6f}",
        f"{each.largest:.2e}",
    )
