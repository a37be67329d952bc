"""Accuracy, F1, expected calibration error and agreement as `evaluate.Metric` classes that need no download.

`evaluate.load("accuracy")` downloads a script; these are classes: `Accuracy().compute(predictions=p, references=y)`. No
other module imports this one, because `evaluate` takes seconds to import.
"""

from __future__ import annotations

from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, List, Value
from sklearn.metrics import accuracy_score, f1_score

from .calibration import agreement, expected_calibration_error

__all__ = ["F1", "Accuracy", "Agreement", "ExpectedCalibrationError"]


class _GraftMetric(evaluate.Metric):
    """Base class of the metrics, which describes them to `evaluate`."""

    description: ClassVar[str]
    citation: ClassVar[str] = ""
    inputs: ClassVar[Features] = Features(predictions=Value("int64"), references=Value("int64"))

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation=self.citation, inputs_description="", features=self.inputs
        )


class Accuracy(_GraftMetric):
    """Share of correct predictions, in [0, 1]: `compute(predictions, references) -> {"accuracy": float}`."""

    description = "Share of predictions that equal their reference."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(_GraftMetric):
    """Harmonic mean of precision and recall, in [0, 1]: `compute(predictions, references, average) -> {"f1": float}`.

    `average` is scikit-learn's: "binary" (class 1, the default), "macro", "micro" or "weighted".
    """

    description = "Harmonic mean of precision and recall."

    def _compute(self, predictions: Any, references: Any, average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}


class ExpectedCalibrationError(_GraftMetric):
    """Mean gap of confidence and accuracy, in [0, 1]: `compute(predictions, references, bins=15) -> {"ece": float}`.

    `predictions` are class probabilities, one list of C per example; `references` are classes.
    """

    description = "Mean gap between the confidence in the top label and its accuracy, over equal-width bins."
    citation = "Guo et al. 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599"
    inputs = Features(predictions=List(Value("float64")), references=Value("int64"))

    def _compute(self, predictions: Any, references: Any, bins: int = 15) -> dict[str, float]:
        return {"ece": expected_calibration_error(np.asarray(predictions), np.asarray(references), bins)}


class Agreement(_GraftMetric):
    """Share of equal predictions, in [0, 1]: `compute(predictions, references) -> {"agreement": float}`.

    `predictions` are the classes that one model predicts (the graft), `references` those of the other (the donor).
    """

    description = "Share of examples on which two models predict the same class."

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"agreement": agreement(np.asarray(predictions), np.asarray(references))}
