"""Combine patches without a model: stitch many into one, scale one, and take unions, intersections, differences.

No result depends on the order of the patches. Differences are taken in float32, as in a graft whose alpha is not 1, and
sums in float64; the result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce

import torch

from ..checkpoints.donor import FLOAT_DTYPES, MAX_LISTED
from .arithmetic import align_indices, grafted_values, masked_sum, scatter_rows
from .combinations import COMBINATIONS, Combination
from .patch import Patch, PatchError, TensorPatch

# The base's values: its tensors by name, or a function (name, flat indices int64 [n]) -> values [n].
Base = Mapping[str, torch.Tensor] | Callable[[str, torch.Tensor], torch.Tensor]
# How far to go from the base towards a patch: one number, or one per tensor name (1 where none is given).
Weight = float | Mapping[str, float]


def stitch(
    patches: Sequence[Patch], weights: Sequence[Weight] | None = None, combination_type: str = "linear", *, base: Base
) -> Patch:
    """Stitch several patches into one: base + combination of w_i * (v_i - base).

    A single patch with weight 1 comes back bit for bit, whatever the combination.

    Args:
        patches: Patches of one base.
        weights: How far to go towards each patch: a finite number each, or numbers by tensor name; all 1 by default.
        combination_type: A name in `COMBINATIONS`.
        base: The base's tensors by name, or a function (name, flat indices) -> the base's values there.

    Returns:
        The patch. Its values are in the dtype that the patches share where that loses nothing, else in one that holds
        the base's values too.

    Raises:
        PatchError: The patches are malformed or of different bases, the base lacks tensors, or values overflow.
        ValueError: The combination type is unknown, or the weights are too few, too many or not finite.
    """
    weights = [1.0] * len(patches) if weights is None else weights
    if problems := list(stitch_problems(len(patches), weights, combination_type)):
        raise ValueError(" ".join(problems))
    combination, shapes = COMBINATIONS[combination_type], common_shapes(patches)
    parts_of = _parts_by_tensor(patches)
    read = _entry_reader(base, {n: max(int(part.indices[-1]) for _, part in parts) for n, parts in parts_of.items()})
    stitched = {
        name: _stitch_tensor(
            [part for _, part in parts], [_weight_in(weights[i], name) for i, _ in parts], combination, name, read
        )
        for name, parts in parts_of.items()
    }
    if overflowing := [name for name, part in stitched.items() if not part.values.isfinite().all()]:
        raise PatchError(
            f"stitched values must be finite, got an overflow in {overflowing[:MAX_LISTED]}. Lower the weights, or use "
            "a base in a wider float dtype."
        )
    return Patch(_without_empty(stitched), shapes)


def stitch_problems(count: int, weights: Sequence[Weight], combination_type: str) -> Iterator[str]:
    """Yield one sentence for each invalid argument of `stitch`.

    Args:
        count: Number of patches.
        weights: One per patch.
        combination_type: A name in `COMBINATIONS`.

    Yields:
        The sentences.
    """
    if combination_type not in COMBINATIONS:
        yield (
            f"combination_type must be one of {sorted(COMBINATIONS)}, got {combination_type!r}. "
            "peft_graft.register_combination adds others."
        )
    if len(weights) != count:
        yield f"weights must be one for each of the {count} patches, got {len(weights)}. 1.0 takes a patch as it is."
    numbers = [n for weight in weights for n in (weight.values() if isinstance(weight, Mapping) else [weight])]
    odd = [n for n in numbers if isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n)]
    if odd:
        yield f"weights must be finite numbers, got {odd[:MAX_LISTED]!r}. 1 goes all the way to a patch, 0 nowhere."


def apply_alpha(patch: Patch, alpha: Weight, base: Base) -> Patch:
    """Replace the values v of a patch by base + alpha * (v - base).

    Args:
        patch: The patch.
        alpha: 1 gives the patch itself, 0 the base's values; one number, or one per tensor name.
        base: As in `stitch`.

    Returns:
        A patch with the same mask.

    Raises:
        PatchError: As in `stitch`.
        ValueError: Alpha is not finite.
    """
    return stitch([patch], [alpha], base=base)


def union(patches: Sequence[Patch]) -> Patch:
    """Unite patches: take the entries that any of them takes, with the mean of the values where several do.

    Args:
        patches: Patches of one base.

    Returns:
        The patch. The union of a patch with itself is that patch, bit for bit.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    shapes = common_shapes(patches)
    met = {name: _mean_where([part for _, part in parts], 1) for name, parts in _parts_by_tensor(patches).items()}
    return Patch(_without_empty(met), shapes)


def intersection(patches: Sequence[Patch]) -> Patch:
    """Intersect patches: take the entries that all of them take, with the mean of their values.

    Args:
        patches: Patches of one base, at least one.

    Returns:
        The patch.

    Raises:
        PatchError: There are no patches, or they are malformed or of different bases.
    """
    if not patches:
        raise PatchError("patches must be at least one, got none. A union may be empty.")
    shapes = common_shapes(patches)
    met = {
        name: _mean_where([part for _, part in parts], len(patches))
        for name, parts in _parts_by_tensor(patches).items()
    }
    return Patch(_without_empty(met), shapes)


def subtract(patch: Patch, other: Patch) -> Patch:
    """Subtract a mask: keep the entries of a patch that another patch does not take.

    Args:
        patch: The patch whose entries are kept.
        other: The patch whose entries are left out; its values do not matter.

    Returns:
        The patch, with its own values.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    shapes = common_shapes([patch, other])
    left, others = dict(patch.plain), other.plain
    for name in left.keys() & others.keys():
        keep = torch.isin(left[name].indices, others[name].indices, assume_unique=True, invert=True)
        left[name] = TensorPatch(left[name].indices[keep], left[name].values[keep])
    return Patch(_without_empty(left), shapes)


def conflicts(patches: Sequence[Patch]) -> dict[str, int]:
    """Count the entries that more than one patch takes, whether or not their values agree.

    Args:
        patches: Patches of one base.

    Returns:
        Number of such entries by tensor name, without tensors that have none.

    Raises:
        PatchError: The patches are malformed or of different bases.
    """
    common_shapes(patches)
    found = {}
    for name, parts in _parts_by_tensor(patches).items():
        _, counts = torch.cat([part.indices for _, part in parts]).unique(return_counts=True)
        found[name] = int((counts > 1).sum())
    return {name: count for name, count in found.items() if count}


def common_shapes(patches: Sequence[Patch]) -> dict[str, tuple[int, ...]] | None:
    """Check that patches are well formed and can be of one base, and return the shapes that they agree on.

    Args:
        patches: Patches.

    Returns:
        The shapes of all tensors that may be patched, or None where a patch does not know them.

    Raises:
        PatchError: A patch is malformed, or two have other shapes for a tensor.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    conflicting = []
    for patch in patches:
        patch.validate()
        for name, shape in (patch.shapes or {}).items():
            if shapes.setdefault(name, tuple(shape)) != tuple(shape):
                conflicting.append(f"{name!r} of shape {shapes[name]} and {tuple(shape)}")
    if conflicting:
        raise PatchError(
            f"patches must be of one base, got {conflicting[:MAX_LISTED]}. One of them was made for another model."
        )
    return shapes if patches and all(patch.shapes is not None for patch in patches) else None


def _stitch_tensor(
    parts: Sequence[TensorPatch],
    weights: Sequence[float],
    combination: Combination,
    name: str,
    read: Callable[[str, torch.Tensor], torch.Tensor],
) -> TensorPatch:
    indices, positions = align_indices([part.indices for part in parts])
    base = read(name, indices)
    grafted = [
        grafted_values(base[at], part.values, weight)
        for part, at, weight in zip(parts, positions, weights, strict=True)
    ]
    values, taken = scatter_rows(grafted, positions, indices.numel())
    start = base.double()
    votes = combination.cast_votes(torch.where(taken, values - start, 0.0), taken)
    count, result = votes.sum(0), masked_sum(values, votes)
    if combination.reduce == "mean":
        result = result / count
    else:  # the base is in every one of the values, and counts once
        result = torch.where(count > 1, result - (count - 1) * start, result)
    return TensorPatch(indices[count > 0], _round_once(result[count > 0], parts, base.dtype))


def _mean_where(parts: Sequence[TensorPatch], min_count: int) -> TensorPatch:
    """Take the entries that at least `min_count` patches take, with the mean of their values."""
    indices, positions = align_indices([part.indices for part in parts])
    values, taken = scatter_rows([part.values for part in parts], positions, indices.numel())
    count = taken.sum(0)
    keep = count >= min_count
    return TensorPatch(indices[keep], _round_once((masked_sum(values, taken) / count)[keep], parts))


def _parts_by_tensor(patches: Sequence[Patch]) -> dict[str, list[tuple[int, TensorPatch]]]:
    """Group the patches' parts by tensor name, each with the number of its patch; empty parts are left out."""
    found: dict[str, list[tuple[int, TensorPatch]]] = {}
    for i, patch in enumerate(patches):
        for name, part in patch.plain.items():
            if part.indices.numel():
                found.setdefault(name, []).append((i, part))
    return dict(sorted(found.items()))


def _weight_in(weight: Weight, name: str) -> float:
    return weight.get(name, 1.0) if isinstance(weight, Mapping) else weight


def _round_once(values: torch.Tensor, parts: Sequence[TensorPatch], base: torch.dtype | None = None) -> torch.Tensor:
    """Round to the dtype that the patches share, or to one that holds the base's values too where that is coarser."""
    narrow = reduce(torch.promote_types, [part.values.dtype for part in parts])
    wide = narrow if base is None else torch.promote_types(narrow, base)
    small, large = values.to(narrow), values.to(wide)
    return small if torch.equal(small.to(wide), large) else large


def _entry_reader(base: Base, last: Mapping[str, int]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a function (name, flat indices) -> the base's values, after checking that it has tensors of these sizes.

    Args:
        base: As in `stitch`.
        last: The highest index that will be read, by tensor name.
    """
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
