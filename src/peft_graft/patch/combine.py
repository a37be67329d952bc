"""Patches to patches: union, intersection, difference, scaling, and stitching many into one. No model is needed.

Nothing depends on the order of the patches: values are added up in the order of their size. Differences are taken in
float32, as in a graft whose alpha is not 1, and sums in float64; the result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch

from ..checkpoints.donor import FLOAT_DTYPES, MAX_LISTED
from .patch import Patch, PatchError, TensorPatch

# What is asked for the base's values: its tensors by name, or a function (name, flat indices int64 [n]) -> values [n].
Base = Mapping[str, torch.Tensor] | Callable[[str, torch.Tensor], torch.Tensor]
# How far to go from the base towards a patch: one number, or one per tensor name (1 where none is given).
Weight = float | Mapping[str, float]


@dataclass(frozen=True)
class Combination:
    """One row of the table of combinations: which patches have a say in an entry, and what becomes of their deltas.

    With d_i = w_i * (v_i - base), the entry becomes base + the sum or the mean of the d_i that have a say. An entry in
    which none has a say is left out of the stitched patch.

    Args:
        name: What the user types.
        say: (deltas float64 [K, n], taken bool [K, n]) -> bool [K, n]: who has a say; only takers of the entry.
        reduce: Whether the deltas are added up or averaged.
        summary: One line for `--help` and the docs.
    """

    name: str
    say: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    reduce: Literal["sum", "mean"]
    summary: str


def everyone(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let every patch that takes an entry have a say in it."""
    return taken


def alone(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let a patch have a say where no other one takes the entry."""
    return taken & (taken.sum(0) == 1)


def majority(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let the patches have a say whose delta has the sign of the sum of all deltas.

    These are "elect" and "disjoint merge" of TIES-merging (arXiv 2306.01708, Algorithm 1), with lambda = 1; its first
    step, "trim", is what made the masks. Where the sum is exactly 0, no delta is chosen over its opposite.
    """
    return taken & (deltas.sign() == total(deltas, taken).sign())


COMBINATIONS: dict[str, Combination] = {
    row.name: row
    for row in (
        Combination("linear", everyone, "sum", "base + the sum of the weighted deltas"),
        Combination("mean", everyone, "mean", "base + the mean of the weighted deltas, as of several active grafts"),
        Combination("disjoint", alone, "sum", "only entries that a single patch takes; conflicts stay the base's"),
        Combination("ties", majority, "mean", "base + the mean of the weighted deltas that have the majority's sign"),
    )
}


def stitch(
    patches: Sequence[Patch], weights: Sequence[Weight] | None = None, combination: str = "linear", *, base: Base
) -> Patch:
    """Make one patch of many: base + combination of w_i * (v_i - base).

    A single patch with weight 1 comes back bit for bit, whatever the combination.

    Args:
        patches: Patches of one base.
        weights: How far to go towards each patch: a finite number each, or numbers by tensor name; all 1 by default.
        combination: A name in `COMBINATIONS`.
        base: The base's tensors by name, or a function (name, flat indices) -> the base's values there.

    Returns:
        The patch. Its values are in the dtype that the patches share where that loses nothing, else in one that holds
        the base's values too.

    Raises:
        PatchError: The patches are malformed or of different bases, the base lacks tensors, or values overflow.
        ValueError: The combination is unknown, or the weights are too few, too many or not finite.
    """
    weights = [1.0] * len(patches) if weights is None else weights
    if problems := list(stitch_problems(len(patches), weights, combination)):
        raise ValueError(" ".join(problems))
    row, shapes = COMBINATIONS[combination], common_shapes(patches)
    together = _together(patches)
    read = _reader(base, {name: max(int(part.indices[-1]) for _, part in parts) for name, parts in together.items()})
    stitched, broken = {}, []
    for name, parts in together.items():
        indices, where = align([part.indices for _, part in parts])
        own = read(name, indices)
        moved = [
            _moved(own[at], part.values, _weight_of(weights[i], name))
            for (i, part), at in zip(parts, where, strict=True)
        ]
        values, taken = spread(moved, where, indices.numel())
        start = own.double()
        say = row.say(values - start, taken)
        count, result = say.sum(0), total(values, say)
        if row.reduce == "mean":
            result = result / count
        else:  # the base is in every one of the values, and counts once
            result = torch.where(count > 1, result - (count - 1) * start, result)
        kept = TensorPatch(indices[count > 0], _rounded(result[count > 0], [part for _, part in parts], own.dtype))
        if not kept.values.isfinite().all():
            broken.append(name)
        stitched[name] = kept
    if broken:
        raise PatchError(
            f"stitched values must be finite, got an overflow in {broken[:MAX_LISTED]}. Lower the weights, or use a "
            "base in a wider float dtype."
        )
    return Patch(_without_empty(stitched), shapes)


def stitch_problems(count: int, weights: Sequence[Weight], combination: str) -> Iterator[str]:
    """Say what is wrong with the arguments of a stitch, one sentence each.

    Args:
        count: Number of patches.
        weights: One per patch.
        combination: A name in `COMBINATIONS`.
    """
    if combination not in COMBINATIONS:
        yield f"combination type must be one of {sorted(COMBINATIONS)}, got {combination!r}. Choose a row of the table."
    if len(weights) != count:
        yield f"weights must be one for each of the {count} patches, got {len(weights)}. Give 1.0 to take one as it is."
    numbers = [n for weight in weights for n in (weight.values() if isinstance(weight, Mapping) else [weight])]
    odd = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n)]
    if odd:
        yield f"weights must be finite numbers, got {odd[:MAX_LISTED]!r}. 1 goes all the way to a patch."


def scale(patch: Patch, weight: Weight, base: Base) -> Patch:
    """Go part of the way, or beyond: base + weight * (v - base).

    Args:
        patch: The patch.
        weight: 1 gives the patch itself, 0 the base's values; one number, or one per tensor name.
        base: As in `stitch`.

    Returns:
        A patch with the same mask.

    Raises:
        PatchError: As in `stitch`.
        ValueError: The weight is not finite.
    """
    return stitch([patch], [weight], base=base)


def union(patches: Sequence[Patch]) -> Patch:
    """Take the entries that any of the patches takes; where several do, the mean of their values.

    Args:
        patches: Patches of one base.

    Returns:
        The patch: a patch itself, bit for bit, where it is united with itself.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    shapes = common_shapes(patches)
    met = {name: _meet([part for _, part in parts], 1) for name, parts in _together(patches).items()}
    return Patch(_without_empty(met), shapes)


def intersection(patches: Sequence[Patch]) -> Patch:
    """Take the entries that all of the patches take, and the mean of their values.

    Args:
        patches: Patches of one base, at least one.

    Returns:
        The patch.

    Raises:
        PatchError: There are no patches, or they are malformed or of different bases.
    """
    if not patches:
        raise PatchError("patches must be at least one, got none. Only a union can be empty.")
    shapes = common_shapes(patches)
    met = {name: _meet([part for _, part in parts], len(patches)) for name, parts in _together(patches).items()}
    return Patch(_without_empty(met), shapes)


def subtract(patch: Patch, other: Patch) -> Patch:
    """Take the entries of a patch that another one leaves alone: the difference of their masks.

    Args:
        patch: What to take from.
        other: What to leave out; its values do not matter.

    Returns:
        The patch, with its own values.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    shapes = common_shapes([patch, other])
    left = dict(patch.tensors)
    for name in left.keys() & other.tensors.keys():
        keep = torch.isin(left[name].indices, other.tensors[name].indices, assume_unique=True, invert=True)
        left[name] = TensorPatch(left[name].indices[keep], left[name].values[keep])
    return Patch(_without_empty(left), shapes)


def conflicts(patches: Sequence[Patch]) -> dict[str, int]:
    """Count the entries that more than one patch takes, whether or not their values agree.

    Args:
        patches: Patches of one base.

    Returns:
        How many by tensor name, without the tensors that have none. Their sum is the total.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    common_shapes(patches)
    found = {}
    for name, parts in _together(patches).items():
        _, counts = torch.cat([part.indices for _, part in parts]).unique(return_counts=True)
        found[name] = int((counts > 1).sum())
    return {name: count for name, count in found.items() if count}


def common_shapes(patches: Sequence[Patch]) -> dict[str, tuple[int, ...]] | None:
    """Check every patch, and that they can be of one base.

    Args:
        patches: Patches.

    Returns:
        The shapes of all tensors that may be patched, or None where a patch does not know them.

    Raises:
        PatchError: A patch is malformed, or two have other shapes for a tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    apart = []
    for patch in patches:
        patch.validate()
        for name, shape in (patch.shapes or {}).items():
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                apart.append(f"{name!r} of shape {shapes[name]} and {tuple(shape)}")
    if apart:
        raise PatchError(f"patches must be of one base, got {apart[:MAX_LISTED]}. Leave the patch of another base out.")
    return shapes if patches and all(patch.shapes is not None for patch in patches) else None


# One tensor at a time


def scaled(base: torch.Tensor, values: torch.Tensor, weight: float | torch.Tensor) -> torch.Tensor:
    """base + weight * (values - base), computed in float32 and not rounded any further."""
    return base.float() + weight * (values.float() - base.float())


def align(indices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Put several masks of a tensor side by side.

    Args:
        indices: Flat indices of each, int64 [n_i], increasing.

    Returns:
        Flat indices that any of them takes, int64 [n], increasing; and where in it each one's are, int64 [n_i].
    """
    everything = torch.cat(list(indices)).unique()
    return everything, [torch.searchsorted(everything, one) for one in indices]


def spread(
    values: Sequence[torch.Tensor], where: Sequence[torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay values out over the entries that any patch takes.

    Args:
        values: Each patch's, [n_i].
        where: Where they go, int64 [n_i], each in [0, size).
        size: Number of entries.

    Returns:
        Values float64 [K, size], and which of them there are, bool [K, size].
    """
    empty = values[0].new_zeros(size, dtype=torch.float64)
    rows = [empty.index_put((at,), one.double()) for one, at in zip(values, where, strict=True)]
    taken = [torch.zeros_like(empty, dtype=torch.bool).index_fill(0, at, True) for at in where]
    return torch.stack(rows), torch.stack(taken)


def total(rows: torch.Tensor, say: torch.Tensor) -> torch.Tensor:
    """Add up the rows that have a say in a column, whatever order they come in: float64 [K, n], bool [K, n] -> [n]."""
    # -0.0 and not 0.0, because adding it changes nothing, not even the sign of a zero.
    return reduce(torch.add, torch.where(say, rows, -0.0).sort(0).values)


def _together(patches: Sequence[Patch]) -> dict[str, list[tuple[int, TensorPatch]]]:
    """The parts of every tensor that has any, each with the number of its patch."""
    found: dict[str, list[tuple[int, TensorPatch]]] = {}
    for i, patch in enumerate(patches):
        for name, part in patch.tensors.items():
            if part.indices.numel():
                found.setdefault(name, []).append((i, part))
    return dict(sorted(found.items()))


def _meet(parts: Sequence[TensorPatch], at_least: int) -> TensorPatch:
    """The entries that at least so many take, with the mean of their values."""
    indices, where = align([part.indices for part in parts])
    values, taken = spread([part.values for part in parts], where, indices.numel())
    count = taken.sum(0)
    keep = count >= at_least
    return TensorPatch(indices[keep], _rounded((total(values, taken) / count)[keep], parts))


def _moved(base: torch.Tensor, values: torch.Tensor, weight: float) -> torch.Tensor:
    # base + 1 * (values - base) would not be the values.
    return values if weight == 1 else scaled(base, values, weight)


def _weight_of(weight: Weight, name: str) -> float:
    return weight.get(name, 1.0) if isinstance(weight, Mapping) else weight


def _rounded(values: torch.Tensor, parts: Sequence[TensorPatch], base: torch.dtype | None = None) -> torch.Tensor:
    narrow = reduce(torch.promote_types, [part.values.dtype for part in parts])
    wide = narrow if base is None else torch.promote_types(narrow, base)
    small, large = values.to(narrow), values.to(wide)
    return small if torch.equal(small.to(wide), large) else large


def _reader(base: Base, last: Mapping[str, int]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function for the base's entries, once it is known that it has all tensors up to these indices."""
    if not isinstance(base, Mapping):
        return base
    missing = [name for name in last if name not in base]
    other = [n for n in last if n in base and (base[n].dtype not in FLOAT_DTYPES or base[n].numel() <= last[n])]
    if missing or other:
        raise PatchError(
            f"base must hold every patched tensor as floating-point numbers, got none for {missing[:MAX_LISTED]} and "
            f"too few or others for {other[:MAX_LISTED]}. Give the tensors of the base that the patches were made for."
        )
    return lambda name, indices: base[name].detach().reshape(-1)[indices.to(base[name].device)].to(indices.device)


def _without_empty(tensors: Mapping[str, TensorPatch]) -> dict[str, TensorPatch]:
    return {name: part for name, part in sorted(tensors.items()) if part.indices.numel()}
