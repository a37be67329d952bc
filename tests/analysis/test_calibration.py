"""Calibration and agreement, against torchmetrics and by their properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from peft_graft.analysis.calibration import agreement, expected_calibration_error, reliability_bins


def _case(seed: int, rows: int, classes: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, generator=generator)
    return logits.softmax(-1), torch.randint(classes, (rows,), generator=generator)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 200),
    classes=st.integers(2, 7),
    bins=st.integers(1, 30),
    scale=st.floats(0.0, 8.0),
)
def test_ece_equals_torchmetrics(seed: int, rows: int, classes: int, bins: int, scale: float) -> None:
    probabilities, labels = _case(seed, rows, classes, scale)
    place = probabilities.double().amax(-1) * bins
    assume(float((place - place.round()).abs().min()) > 1e-4)  # on the edge of two bins, rounding decides
    expected = multiclass_calibration_error(probabilities, labels, num_classes=classes, n_bins=bins, norm="l1")
    assert expected_calibration_error(probabilities, labels, bins) == pytest.approx(expected.item(), abs=2e-5)


def test_ece_by_hand() -> None:
    probabilities = [[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]]  # bins 0.9: half right; 0.7: all right
    assert expected_calibration_error(probabilities, [0, 1, 1, 1], bins=10) == pytest.approx(0.5 * 0.4 + 0.5 * 0.3)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 100), bins=st.integers(1, 20))
@settings(deadline=None, max_examples=40)
def test_bins_hold_every_prediction_once_and_average_to_accuracy(seed: int, rows: int, bins: int) -> None:
    probabilities, labels = _case(seed, rows, 3, 2.0)
    result = reliability_bins(probabilities, labels, bins)
    filled = result.counts > 0
    assert result.edges.shape == (bins + 1,) and result.counts.sum() == rows
    assert np.isnan(result.accuracy[~filled]).all() and np.isnan(result.confidence[~filled]).all()
    accuracy = (probabilities.argmax(-1) == labels).double().mean().item()
    assert np.sum(result.counts[filled] * result.accuracy[filled]) / rows == pytest.approx(accuracy)
    assert (result.confidence[filled] >= result.edges[:-1][filled] - 1e-9).all()
    assert (result.confidence[filled] <= result.edges[1:][filled] + 1e-9).all()


def test_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    result = reliability_bins([[0.5, 0.5], [0.25, 0.75]], [0, 0], bins=4)
    assert result.counts.tolist() == [0, 1, 1, 0]
    assert result.accuracy[1:3].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_float_dtype_is_accepted(dtype: torch.dtype) -> None:
    probabilities, labels = _case(0, 50, 4, 3.0)
    exact = expected_calibration_error(probabilities, labels)
    assert expected_calibration_error(probabilities.to(dtype), labels) == pytest.approx(exact, abs=0.05)


def test_numpy_torch_and_lists_give_one_answer() -> None:
    probabilities, labels = _case(1, 30, 3, 2.0)
    values = {
        expected_calibration_error(p, y)
        for p, y in (
            (probabilities, labels),
            (probabilities.numpy(), labels.numpy()),
            (probabilities.tolist(), labels.tolist()),
        )
    }
    assert len(values) == 1


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "message"),
    [
        ([[2.0, -1.0], [0.5, 0.5]], [0, 1], 15, r"must be in \[0, 1\], got row 0: \[2.0, -1.0\]"),
        ([[0.2, 0.2], [0.5, 0.5]], [0, 1], 15, r"must add up to 1, got row 0"),
        ([[float("nan"), 0.5], [0.5, 0.5]], [0, 1], 15, r"must be in \[0, 1\], got row 0"),
        ([[0.5, 0.5], [0.5, 0.5]], [0, 2], 15, r"labels must be in \[0, 2\), got row 1: 2"),
        ([[0.5, 0.5], [0.5, 0.5]], [-1, -1], 15, r"got row 0: -1, row 1: -1"),
        ([[0.5, 0.5]], [0, 1], 15, r"labels must be of shape \(1,\)"),
        ([[0.5, 0.5]], [0.0], 15, r"labels must be integers"),
        ([0.5, 0.5], [0, 1], 15, r"must be of shape \[N, C\]"),
        (np.zeros((0, 2)), [], 15, r"must be of shape \[N, C\]"),
        ([[1.0]], [0], 15, r"two columns 1 - p and p"),
        ([[0.5, 0.5]], [0], 0, r"bins must be at least 1, got 0"),
        ([["a", "b"]], [0], 15, r"probabilities must be numbers"),
    ],
)
def test_bad_input_is_refused_by_name(probabilities: object, labels: object, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(probabilities, labels, bins)  # type: ignore[arg-type]


def test_only_the_first_five_offenders_are_listed() -> None:
    with pytest.raises(ValueError, match=r"row 4: .* and 3 more"):
        expected_calibration_error(np.full((8, 2), 0.9), np.zeros(8, dtype=int))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=50))
def test_agreement_is_symmetric_and_counts_equal_decisions(pairs: list[tuple[int, int]]) -> None:
    a, b = (list(side) for side in zip(*pairs, strict=True))
    share = agreement(a, b)
    assert share == agreement(b, a) == sum(x == y for x, y in pairs) / len(pairs)
    assert agreement(a, a) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([0, 1], [0], r"vectors of one length, got shapes \(2,\) and \(1,\)"),
        ([], [], r"non-empty"),
        ([[0.1, 0.9]], [[0.2, 0.8]], r"argmax"),
        ([0, 1], [0.0, 1.0], r"predictions_b must be integers"),
    ],
)
def test_agreement_refuses_what_are_not_decisions(a: list, b: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agreement(a, b)
