"""The `evaluate.Metric` classes, against torchmetrics, offline."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    binary_f1_score,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from peft_graft.analysis.metrics import F1, Accuracy, Agreement, ExpectedCalibrationError

CLASSES = 3
labels = st.lists(st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=20)
@given(pairs=labels)
def test_accuracy_and_macro_f1_equal_torchmetrics(pairs: list[tuple[int, int]]) -> None:
    predictions, references = (torch.tensor(side) for side in zip(*pairs, strict=True))
    accuracy = Accuracy(keep_in_memory=True).compute(predictions=predictions, references=references)
    f1 = F1(keep_in_memory=True).compute(predictions=predictions, references=references, average="macro")
    # micro: the share of right predictions, whatever the classes
    assert accuracy["accuracy"] == pytest.approx(
        multiclass_accuracy(predictions, references, num_classes=CLASSES, average="micro").item(), abs=1e-6
    )
    assert f1["f1"] == pytest.approx(
        multiclass_f1_score(predictions, references, num_classes=CLASSES, average="macro").item(), abs=1e-6
    )


def test_binary_f1_equals_torchmetrics() -> None:
    generator = torch.Generator().manual_seed(0)
    predictions, references = (torch.randint(2, (64,), generator=generator) for _ in range(2))
    value = F1().compute(predictions=predictions, references=references)
    assert value == {"f1": pytest.approx(binary_f1_score(predictions, references).item(), abs=1e-6)}


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_ece_equals_torchmetrics(bins: int) -> None:
    generator = torch.Generator().manual_seed(1)
    probabilities = torch.randn(80, 4, generator=generator).mul(3).softmax(-1)
    references = torch.randint(4, (80,), generator=generator)
    value = ExpectedCalibrationError().compute(predictions=probabilities, references=references, bins=bins)
    oracle = multiclass_calibration_error(probabilities, references, num_classes=4, n_bins=bins, norm="l1")
    assert value == {"ece": pytest.approx(oracle.item(), abs=1e-5)}


def test_agreement_counts_equal_decisions() -> None:
    assert Agreement().compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"agreement": 0.75}


def test_batches_add_up_to_the_whole() -> None:
    metric = Accuracy()
    for predictions, references in (([0, 1], [0, 0]), ([1], [1]), ([2, 2, 2], [2, 2, 0])):
        metric.add_batch(predictions=predictions, references=references)
    assert metric.compute() == {"accuracy": pytest.approx(4 / 6)}


def test_logits_in_place_of_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Pass softmax\(logits\)"):
        ExpectedCalibrationError().compute(predictions=[[3.0, -1.0]], references=[0])


@pytest.mark.slow
def test_calibration_does_not_import_evaluate() -> None:
    code = "import sys, peft_graft.analysis.calibration; sys.exit('evaluate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
