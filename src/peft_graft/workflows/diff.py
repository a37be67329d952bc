"""Compare two checkpoints layer by layer, without loading either model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from huggingface_hub.utils import tqdm

from ..checkpoints.block_reader import PairedReader
from ..checkpoints.donor import FLOAT_DTYPES
from ..checkpoints.pairing import CheckpointDonor, DonorError, bits_differ, resolve_names
from ..checkpoints.wrappers import plain_names
from ..selection.budget import unit_of


@dataclass
class Distance:
    """Distance between the values b of a base and the values d of a donor: in one tensor, one layer, or all of them.

    The fields are sums over entries, so distances of tensors add up to those of a layer. Fine-tuned models stay close
    to their base in L1 and in angle, in some layers far closer than in others: Radiya-Dixit & Wang 2020
    (arXiv 2004.14129, section 3).

    Attributes:
        name: Name of the tensor or layer; `"all"` for everything.
        entries: Number of entries.
        differing: Number of entries of which any bit differs.
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
        """||d - b||, the L2 norm."""
        return math.sqrt(self.l2_squared)

    @property
    def l2_relative(self) -> float:
        """||d - b|| / ||b||; NaN if b is zero."""
        return self.l2 / math.sqrt(self.base_squared) if self.base_squared else math.nan

    @property
    def cosine(self) -> float:
        """Cosine of the angle between b and d, in [-1, 1]; NaN if b or d is zero."""
        norms = math.sqrt(self.base_squared) * math.sqrt(self.donor_squared)
        return max(-1.0, min(1.0, self.dot / norms)) if norms else math.nan

    @property
    def angle(self) -> float:
        """Angle between b and d as a share of 180 degrees, in [0, 1]; NaN if b or d is zero."""
        return math.acos(self.cosine) / math.pi if self.l2 else 0.0 * self.cosine  # rounding would leave some

    def add(self, other: Distance) -> None:
        """Add the entries of another distance to this one."""
        for each in fields(self)[1:]:
            if each.name != "largest":
                setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
        self.largest = max(self.largest, other.largest)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and distances for JSON, with None for NaN."""
        numbers = {
            key: getattr(self, key)
            for key in ("entries", "differing", "l1", "l1_mean", "l2", "l2_relative", "cosine", "angle", "largest")
        }
        return {"name": self.name, **{key: None if value != value else value for key, value in numbers.items()}}


@dataclass
class DiffResult:
    """Distances between two checkpoints.

    Attributes:
        tensors: Distance of every tensor that both checkpoints have in the same shape, in the order of their names.
        only_in_base: Names of tensors that the donor lacks.
        only_in_donor: Names of tensors that the base lacks.
        not_compared: Names of tensors that have different shapes or no floating-point values.
    """

    tensors: list[Distance] = field(default_factory=list)
    only_in_base: list[str] = field(default_factory=list)
    only_in_donor: list[str] = field(default_factory=list)
    not_compared: list[str] = field(default_factory=list)

    @property
    def total(self) -> Distance:
        """Distance over all compared tensors."""
        return _sum("all", self.tensors)

    def by_layer(self) -> list[Distance]:
        """Return the distance of every layer: of all tensors whose names agree up to the first number."""
        layers: dict[str, list[Distance]] = {}
        for each in self.tensors:
            layers.setdefault(unit_of(each.name, "layer"), []).append(each)
        return [_sum(layer, tensors) for layer, tensors in sorted(layers.items(), key=lambda item: _natural(item[0]))]

    def to_dict(self) -> dict[str, Any]:
        """Return all distances and names for JSON."""
        return {
            "total": self.total.to_dict(),
            "layers": [layer.to_dict() for layer in self.by_layer()],
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "only_in_base": self.only_in_base,
            "only_in_donor": self.only_in_donor,
            "not_compared": self.not_compared,
        }


def diff(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str],
    *,
    base_revision: str | None = None,
    donor_revision: str | None = None,
    base_subfolder: str | None = None,
    donor_subfolder: str | None = None,
    token: str | bool | None = None,
    show_progress_bar: bool = False,
) -> DiffResult:
    """Compute the distances between two checkpoints, tensor by tensor, as their files hold them.

    Args:
        base: Directory, file or Hub id of a safetensors checkpoint.
        donor: The same of the other checkpoint. Names that differ by a prefix only (`bert.`) are matched.
        base_revision: Branch, tag or commit of a base on the Hub.
        donor_revision: Branch, tag or commit of a donor on the Hub.
        base_subfolder: Folder of the base's directory or repository that holds its checkpoint, such as `"unet"`.
        donor_subfolder: The same of the donor.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        show_progress_bar: Show a progress bar of the bytes read.

    Returns:
        The distances, and the names of the tensors that cannot be compared.

    Raises:
        DonorError: A checkpoint cannot be read, or the checkpoints have no tensor in common.
    """
    ours = CheckpointDonor(base, base_revision, role="base", token=token, subfolder=base_subfolder)
    theirs = CheckpointDonor(donor, donor_revision, token=token, subfolder=donor_subfolder)
    names = _match_names(ours, theirs)
    result = DiffResult(
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
    result.tensors = _measure_all(pairs, sorted(names, key=_natural), show_progress_bar)
    return result


def _measure_all(pairs: PairedReader, names: list[str], show_progress_bar: bool) -> list[Distance]:
    found = {name: Distance(name) for name in names}
    disable = not show_progress_bar
    with tqdm(total=sum(pairs.nbytes), unit="B", unit_scale=True, desc="reading", disable=disable) as bar:
        pairs.on_read = bar.update
        for span, distance in pairs.map(lambda block: _measure(block.base, block.donor)):
            found[span.name].add(distance)
    return list(found.values())


def _match_names(ours: CheckpointDonor, theirs: CheckpointDonor) -> dict[str, str]:
    """Return the donor's name by the base's name, for all tensors that both have in any shape."""
    held = {*theirs.names()}
    names = {name: name for name in ours.names() if name in held}
    if not names:
        plain = plain_names(theirs.names())
        names = {name: plain[key] for key, name in plain_names(ours.names()).items() if key in plain}
    free = held - {*names.values()}
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


def _measure(base: torch.Tensor, donor: torch.Tensor) -> Distance:
    before, after = base.double(), donor.double()
    delta = after - before
    if not delta.isfinite().all():  # the same NaN or Inf in both, as in padding rows, is no distance
        same = ~before.isfinite() & (~bits_differ(base, donor) | (before.isnan() & after.isnan()))
        before, after, delta = (values.masked_fill(same, 0) for values in (before, after, delta))
    size = delta.abs()
    return Distance(
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


def _sum(name: str, parts: Iterable[Distance]) -> Distance:
    total = Distance(name)
    for part in parts:
        total.add(part)
    return total


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in name.split(".")]
