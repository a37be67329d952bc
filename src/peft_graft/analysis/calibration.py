"""Calibration of a model's confidences, and agreement of two models' predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray | torch.Tensor | Sequence

__all__ = ["ReliabilityBins", "agreement", "expected_calibration_error", "reliability_bins"]

# Rows of a half-precision softmax add up to 1 with an error of a few thousandths.
_SUM_TOLERANCE = 1e-2


@dataclass(frozen=True)
class ReliabilityBins:
    """Mean confidence and accuracy by confidence bin, the data of a reliability diagram (Guo et al. 2017, section 2).

    Attributes:
        edges: Bin edges, shape [bins + 1], from 0 to 1; bin i is (edges[i], edges[i + 1]], the first holds 0 too.
        counts: Number of predictions in each bin, shape [bins], int64.
        confidence: Mean probability of the predicted class per bin, shape [bins], float64; NaN where the bin is empty.
        accuracy: Share of correct predictions per bin, shape [bins], float64; NaN where the bin is empty.
    """

    edges: np.ndarray
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def expected_calibration_error(self) -> float:
        """ECE = sum_i counts_i / N * |accuracy_i - confidence_i|, in [0, 1]."""
        filled = self.counts > 0
        gaps = np.abs(self.accuracy[filled] - self.confidence[filled])
        return float(np.sum(self.counts[filled] * gaps) / self.counts.sum())


def reliability_bins(probabilities: Array, labels: Array, bins: int = 15) -> ReliabilityBins:
    """Bin predictions by their confidence, the probability of the predicted class, into equal-width bins.

    Args:
        probabilities: Class probabilities, shape [N, C], any float dtype, each row in [0, 1] and adding up to 1.
        labels: True classes, shape [N], integers in [0, C).
        bins: Number of equal-width bins over [0, 1], at least 1.

    Returns:
        The bins, which together hold all N predictions.

    Raises:
        ValueError: If a shape or a value is not as described; the message names every offending row (first five).
    """
    p = _to_numpy(probabilities, "probabilities").astype(np.float64)
    y = _to_numpy(labels, "labels")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins!r}. The usual number is 15.")
    if p.ndim != 2 or p.shape[0] == 0 or p.shape[1] < 2:
        raise ValueError(
            f"probabilities must be of shape [N, C] with N >= 1 and C >= 2, got {p.shape!r}. "
            "For a binary model with one output p, pass the two columns 1 - p and p."
        )
    if y.shape != (p.shape[0],):
        raise ValueError(f"labels must be of shape {(p.shape[0],)!r}, one per row of probabilities, got {y.shape!r}.")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"labels must be integers, got dtype {y.dtype!s}. Convert class names to indices first.")
    outside = ~np.all((p >= 0) & (p <= 1), axis=1)  # NaN compares false, and so counts as outside
    _require_none("probabilities must be in [0, 1]", p, outside, "Pass softmax(logits), not logits.")
    _require_none(
        "probabilities must add up to 1", p, np.abs(p.sum(axis=1) - 1) > _SUM_TOLERANCE, "Pass softmax(logits)."
    )
    _require_none(f"labels must be in [0, {p.shape[1]})", y, (y < 0) | (y >= p.shape[1]), "Drop unlabelled rows first.")

    top = p.argmax(axis=1)
    confidence, correct = p[np.arange(len(p)), top], (top == y).astype(np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(index, minlength=bins)
    with np.errstate(invalid="ignore"):
        return ReliabilityBins(
            edges=edges,
            counts=counts,
            confidence=np.bincount(index, weights=confidence, minlength=bins) / counts,
            accuracy=np.bincount(index, weights=correct, minlength=bins) / counts,
        )


def expected_calibration_error(probabilities: Array, labels: Array, bins: int = 15) -> float:
    """Compute the expected calibration error: the mean gap between confidence and accuracy over equal-width bins.

    ECE = sum_b |B_b| / N * |acc(B_b) - conf(B_b)| (Guo et al. 2017, arXiv 1706.04599, equation 3).

    Args:
        probabilities: Class probabilities, shape [N, C], any float dtype, each row in [0, 1] and adding up to 1.
        labels: True classes, shape [N], integers in [0, C).
        bins: Number of equal-width bins over [0, 1], at least 1.

    Returns:
        The error in [0, 1]; a perfectly calibrated model has 0.

    Raises:
        ValueError: If a shape or a value is not as described.
    """
    return reliability_bins(probabilities, labels, bins).expected_calibration_error


def agreement(predictions_a: Array, predictions_b: Array) -> float:
    """Compute the share of examples for which two models predict the same class, correct or not.

    Args:
        predictions_a: Predicted classes of one model, shape [N], integers.
        predictions_b: Predicted classes of the other model for the same examples, shape [N], integers.

    Returns:
        The share in [0, 1].

    Raises:
        ValueError: If the predictions are not two non-empty integer vectors of one length.
    """
    a, b = _to_numpy(predictions_a, "predictions_a"), _to_numpy(predictions_b, "predictions_b")
    if a.ndim != 1 or a.shape != b.shape or a.size == 0:
        raise ValueError(
            f"predictions must be two non-empty vectors of one length, got shapes {a.shape!r} and {b.shape!r}. "
            "Pass classes (logits.argmax(-1)), not logits."
        )
    for name, values in (("predictions_a", a), ("predictions_b", b)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got dtype {values.dtype!s}. Pass logits.argmax(-1).")
    return float(np.mean(a == b))


def _to_numpy(values: Array, what: str) -> np.ndarray:
    """Convert a sequence, or a tensor on any device and of any dtype (numpy has no bfloat16), to an array."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{what} must be numbers, got dtype {array.dtype!s}.")
    return array


def _require_none(constraint: str, values: np.ndarray, offending: np.ndarray, remedy: str) -> None:
    """Raise an error that shows the first offending rows, if there are any."""
    rows = np.flatnonzero(offending)
    if rows.size:
        shown = ", ".join(f"row {row}: {values[row].tolist()}" for row in rows[:5])
        more = f" and {rows.size - 5} more" if rows.size > 5 else ""
        raise ValueError(f"{constraint}, got {shown}{more}. {remedy}")
