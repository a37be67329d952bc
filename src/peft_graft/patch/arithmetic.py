"""Arithmetic on one tensor's patched entries: the graft equation, and sums over several patches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch


def grafted_values(
    base: torch.Tensor | Callable[[], torch.Tensor], donor: torch.Tensor, alpha: float | torch.Tensor
) -> torch.Tensor:
    """Compute the values that a graft gives to its entries: base + alpha * (donor - base).

    A number alpha of 1 gives the donor's own bits: in floating point, base + (donor - base) need not be the donor.
    Any other alpha is computed in float32, which the caller rounds to the base's dtype, once. This is the only place
    that decides between the two.

    Args:
        base: The base's values, floating-point [n], or a function that reads them, which alpha = 1 does not call.
        donor: The donor's values, floating-point [n].
        alpha: Scale of the patch. A tensor is always computed with, so that gradients reach it.

    Returns:
        Values [n]: `donor` itself at alpha = 1, else float32.
    """
    if not isinstance(alpha, torch.Tensor) and alpha == 1:
        return donor
    start = (base if isinstance(base, torch.Tensor) else base()).float()
    return start + alpha * (donor.float() - start)


def align_indices(indices: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Merge the indices of several patches of one tensor.

    Args:
        indices: Flat indices of each patch, int64 [n_i], strictly increasing.

    Returns:
        The union of the indices, int64 [n], strictly increasing; and each patch's positions in it, int64 [n_i].
    """
    union = torch.cat(list(indices)).unique()
    return union, [torch.searchsorted(union, one) for one in indices]


def scatter_rows(
    values: Sequence[torch.Tensor], positions: Sequence[torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the values of several patches into the rows of a dense matrix over the union of their indices.

    Args:
        values: Values of each patch, [n_i].
        positions: Where they go, int64 [n_i], each in [0, size), as `align_indices` returns them.
        size: Number of indices in the union.

    Returns:
        Values, float64 [K, size], 0 where a patch has none; and the mask of those that are there, bool [K, size].
    """
    empty = values[0].new_zeros(size, dtype=torch.float64)
    rows = [empty.index_put((at,), one.double()) for one, at in zip(values, positions, strict=True)]
    taken = [torch.zeros_like(empty, dtype=torch.bool).index_fill(0, at, True) for at in positions]
    return torch.stack(rows), torch.stack(taken)


def masked_sum(rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Add up the masked values of every column, in the order of their size, so that the order of the rows is moot.

    Args:
        rows: Values, float64 [K, n].
        mask: Which of them to add up, bool [K, n].

    Returns:
        Sums, float64 [n].
    """
    # -0.0 and not 0.0, because adding it changes nothing, not even the sign of a zero.
    return reduce(torch.add, torch.where(mask, rows, -0.0).sort(0).values)
