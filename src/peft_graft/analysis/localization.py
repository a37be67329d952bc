"""Where a mask lives, layer by layer and module by module, and how much masks overlap."""

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

# What a mask is here: a patch, or flat indices int64 [n], distinct, by tensor name.
Mask = Patch | Mapping[str, torch.Tensor]
Matrix = npt.NDArray[np.float64]

_OUTSIDE = ("outside", -1)  # the row of what is in no numbered layer: embeddings, pooler, head

_LAYER = re.compile(r"((?:.*?\.)?)(\d+)\.(.+)")  # what stands before the first number, the number, and what follows


@dataclass(frozen=True, eq=False)
class Place:
    """Where the entries of a mask are: one row per layer, one column per kind of module; `plots.skill_map` draws it.

    Attributes:
        layers: Names of the rows, from the first layer to the last, after them "outside".
        modules: Names of the columns.
        counts: Entries of the mask, float64 [layers, modules]; NaN where there is no such tensor.
        sizes: Entries of the base there; NaN where there is no such tensor, or its shape is not known.
    """

    layers: tuple[str, ...]
    modules: tuple[str, ...]
    counts: Matrix
    sizes: Matrix

    @property
    def share(self) -> Matrix:
        """Share of the mask's entries that each cell has, in [0, 1]; they add up to 1."""
        return self.counts / max(np.nansum(self.counts), 1.0)

    @property
    def density(self) -> Matrix:
        """Share of each cell's entries that the mask takes, in [0, 1]."""
        with np.errstate(invalid="ignore"):
            return self.counts / self.sizes


def locate(mask: Mask, shapes: Mapping[str, Sequence[int]] | None = None) -> Place:
    """Count the entries of a mask by layer and kind of module.

    A layer is what stands before the first number in a tensor's name, and that number; the kind of module is what
    follows, without a final `weight` or `bias`: `bert.encoder.layer.3.output.dense.weight` counts for layer 3 and
    "output.dense".

    Args:
        mask: A patch, or flat indices by tensor name.
        shapes: Shape of every tensor that might be in the mask, so that it shows what the mask leaves alone. By
            default, those that the patch knows; otherwise only the mask's own tensors are shown.

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
            f"mask must lie in tensors of known shape, got {unknown[:MAX_LISTED]} beside them. Give all shapes."
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
    """How many entries masks have in common.

    Attributes:
        names: Names of the masks, in the order of the rows and columns.
        common: Entries that both masks take, int64 [masks, masks]; on the diagonal, how many each has.
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

        1 where one region lies in the other. The regions of similar tasks overlap more (Panigrahi et al. 2023,
        arXiv 2302.06600, in models trained on many tasks); divided by the smaller one, regions of different sizes
        can be compared.
        """
        return _ratio(self.common, np.minimum(self.sizes[:, None], self.sizes[None, :]))

    @property
    def of_column(self) -> Matrix:
        """|A and B| / |B|, the share of B (the column) that A (the row) takes too, in [0, 1]; NaN where B is empty."""
        return _ratio(self.common, np.broadcast_to(self.sizes, self.common.shape))


def overlap(masks: Mapping[str, Mask]) -> Overlap:
    """Count the entries that each two masks have in common.

    Two masks drawn at random of densities p and q have p * q of all entries in common: compare with that before calling
    an overlap large.

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
                both = one.keys() & other.keys()
                count = sum(int(torch.isin(one[n], other[n], assume_unique=True).sum()) for n in both)
                common[row, column] = common[column, row] = count
    return Overlap(tuple(masks), common)


def indices_of(mask: Mask) -> dict[str, torch.Tensor]:
    """Flat indices of a mask by tensor name."""
    return {name: part.indices for name, part in mask.tensors.items()} if isinstance(mask, Patch) else dict(mask)


def _cell(name: str) -> tuple[tuple[str, int], str]:
    """The layer that a tensor is in, as (what stands before its number, the number), and its kind of module."""
    module = re.sub(r"\.(weight|bias)$", "", name)
    match = _LAYER.fullmatch(module)
    return ((match[1], int(match[2])), match[3]) if match else (_OUTSIDE, module)


def _ratio(over: npt.NDArray[np.int64], under: npt.NDArray[np.int64]) -> Matrix:
    with np.errstate(invalid="ignore"):
        return over / under
