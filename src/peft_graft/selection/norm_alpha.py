"""Estimate the scale of a magnitude patch from norms alone, where there is no data to fit it on."""

from __future__ import annotations

import torch

# Chosen on AdamW and SGD donors of classifiers and of a causal LM; see docs/how_to/alpha.md.
EXPONENT = 0.8


def norm_alpha(energy: float, taken: float) -> float:
    """Estimate alpha = (||delta||^2 / ||mask * delta||^2)^0.8.

    The patch keeps a share of the delta's energy, and a larger scale makes up for the rest. With an exponent of 1 the
    patch would move as far along the delta as the whole delta does, which is too far: to overshoot costs more than to
    fall short.

    Args:
        energy: ||delta||^2 over all eligible entries, > 0.
        taken: ||mask * delta||^2, over the entries of the patch, > 0.

    Returns:
        The scale, >= 1.
    """
    return max(1.0, energy / taken) ** EXPONENT


def energy_of(donor: torch.Tensor, base: torch.Tensor) -> float:
    """Return the sum of the squares of the deltas of some entries.

    Args:
        donor: The donor's values, float [n].
        base: The base's, float [n].
    """
    return float(torch.linalg.vector_norm(donor.float() - base.float(), dtype=torch.float64)) ** 2


def estimated_note(alpha: float) -> str:
    """Return the line that says which scale was estimated."""
    return f"alpha={alpha:.3g}, estimated from the norms of the delta; with data, alpha='auto' and fit_alpha fit it."
