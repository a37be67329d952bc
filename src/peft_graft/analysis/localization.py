"""Localization of a mask by layer and kind of module, and overlap of several masks."""

from __future__ import annotations

import math
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..checkpoints.donor import MAX_LISTED
from ..patch.patch import Patch

# A patch, or flat indices int64 [n], distinct, by tensor name.
Mask = Patch | Mapping[str, torch.Tensor]
Matrix = npt.NDArray[np.float64]

_OUTSIDE = ("outside", -1)  # the row of tensors in no numbered layer: embeddings, pooler, head

_LAYER = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")  # the text before the first number, the number, and the text after it


@dataclass(frozen=True, eq=False)
class Place:
    """Number of entries of a mask by layer (rows) and kind of module (columns); `plots.skill_map` draws it.

    Attributes:
        layers: Names of the rows: the layers in order, then "outside" for tensors in no layer.
        modules: Names of the columns.
        counts: Entries of the mask, float64 [layers, modules]; NaN where the base has no such tensor.
        sizes: Entries of the base, float64 [layers, modules]; NaN where it has no such tensor, or its shape is unknown.
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    counts: Matrix
    sizes: Matrix

    @property
    def share(self) -> Matrix:
        """Share of the mask's entries in each cell, in [0, 1]; the cells add up to 1."""
        return self.counts / max(np.nansum(self.counts), 1.0)

    @property
    def density(self) -> Matrix:
        """Share of each cell's entries that the mask takes, in [0, 1]."""
        with np.errstate(invalid="ignore"):
            return self.counts / self.sizes


def locate(mask: Mask, shapes: Mapping[str, Sequence[int]] | None = None) -> Place:
    """Count the entries of a mask by layer and kind of module.

    The layer of a tensor is its name up to the first number; the kind of module is the rest without a final `weight` or
    `bias`: `bert.encoder.layer.3.output.dense.weight` counts for layer 3 and "output.dense".

    Args:
        mask: A patch, or flat indices by tensor name.
        shapes: Shape of every tensor that may be masked, so that tensors without entries are counted too. By default
            the shapes that a patch knows; without any, only tensors in the mask are counted.

    Returns:
        The counts.

    Raises:
        ValueError: A tensor of the mask is not among `shapes`.
    """
    known = (mask.shapes if isinstance(mask, Patch) else None) if shapes is None else shapes
    indices = indices_of(mask)
    names = list(indices if known is None else known)
    if unknown := sorted(indices.keys() - set(names)):
        raise ValueError(
            f"mask must lie in tensors of known shape, got {unknown[:MAX_LISTED]} without. Give all shapes, as "
            "{name: tuple(p.shape) for name, p in model.named_parameters()}."
        )
    cells = {name: _cell(name) for name in names}
    stems = list(dict.fromkeys(layer[0] for layer, _ in cells.values()))
    layers = sorted({layer for layer, _ in cells.values()}, key=lambda at: (at == _OUTSIDE, stems.index(at[0]), at[1]))
    modules = list(dict.fromkeys(module for _, module in sorted(cells.values(), key=lambda cell: cell[0] == _OUTSIDE)))
    counts, sizes = (np.full((len(layers), len(modules)), np.nan) for _ in range(2))
    for name, (layer, module) in cells.items():
        at = layers.index(layer), modules.index(module)
        counts[at] = np.nansum([counts[at], indices[name].numel() if name in indices else 0])
        if known is not None:
            sizes[at] = np.nansum([sizes[at], math.prod(known[name])])
    common = os.path.commonprefix([stem.split(".") for stem, number in layers if number >= 0])
    rows = (f"{stem}{number}".split(".", len(common))[-1] if number >= 0 else stem for stem, number in layers)
    return Place(tuple(rows), tuple(modules), counts, sizes)


@dataclass(frozen=True, eq=False)
class Overlap:
    """Number of entries that masks have in common.

    Attributes:
        names: Names of the masks, in the order of the rows and columns.
        common: Entries that both masks take, int64 [masks, masks]; the diagonal has the size of each mask.
    """

    names: tuple[str, ...]
    common: npt.NDArray[np.int64]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Entries of each mask, int64 [masks]."""
        return np.diagonal(self.common)

    @property
    def jaccard(self) -> Matrix:
        """|A and B| / |A or B|, in [0, 1]; NaN for two empty masks."""
        either = self.sizes[:, None] + self.sizes[None, :] - self.common
        return _ratio(self.common, either)

    @property
    def of_smaller(self) -> Matrix:
        """|A and B| / min(|A|, |B|), in [0, 1]; NaN where a mask is empty.

        It is 1 if one mask contains the other. Masks of similar tasks overlap more (Panigrahi et al. 2023, arXiv
        2302.06600, for models trained on many tasks); the division by the smaller size lets masks of different sizes be
        compared.
        """
        return _ratio(self.common, np.minimum(self.sizes[:, None], self.sizes[None, :]))

    @property
    def of_column(self) -> Matrix:
        """|A and B| / |B|: share of mask B (column) that mask A (row) takes too, in [0, 1]; NaN where B is empty."""
        return _ratio(self.common, np.broadcast_to(self.sizes, self.common.shape))


def overlap(masks: Mapping[str, Mask]) -> Overlap:
    """Count the entries that every pair of masks has in common.

    The baseline for an overlap: two random masks of densities p and q are expected to share p * q of all entries.

    Args:
        masks: Masks of one base by name.

    Returns:
        The counts.
    """
    indices = {name: indices_of(mask) for name, mask in masks.items()}
    common = np.zeros((len(masks), len(masks)), dtype=np.int64)
    for row, one in enumerate(indices.values()):
        for column, other in enumerate(indices.values()):
            if row <= column:
                shared = one.keys() & other.keys()
                count = sum(int(torch.isin(one[n], other[n], assume_unique=True).sum()) for n in shared)
                common[row, column] = common[column, row] = count
    return Overlap(tuple(masks), common)


def indices_of(mask: Mask) -> dict[str, torch.Tensor]:
    """Return the flat indices of a mask by tensor name."""
    return dict(mask.indices) if isinstance(mask, Patch) else dict(mask)


def _cell(name: str) -> tuple[tuple[str, int], str]:
    """Return the layer of a tensor, as (name before its number, number), and its kind of module."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    match = _LAYER.fullmatch(module)
    return ((match[1], int(match[2])), match[3]) if match else (_OUTSIDE, module)


def _ratio(numerator: npt.NDArray[np.int64], denominator: npt.NDArray[np.int64]) -> Matrix:
    with np.errstate(invalid="ignore"):
        return numerator / denominator
