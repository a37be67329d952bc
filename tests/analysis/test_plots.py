"""Figures: each is rendered, and what it shows is what was given."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest

from peft_graft.analysis.calibration import reliability_bins
from peft_graft.analysis.plots import COLORS, density_recovery, reliability_diagram, skill_map

DENSITIES = [1e-2, 1e-5, 1e-4, 1e-3]  # not in order on purpose
CURVES = {
    "magnitude": {"1": [0.67, 0.65, 0.65, 0.65], "auto": [0.83, 0.66, 0.76, 0.80]},
    "random": {"auto": [0.68, 0.65, np.nan, 0.66]},
}


def _png(figure) -> tuple[int, int]:
    """Render a figure; width and height in pixels, read back from the file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = buffer.getvalue()
    assert data.startswith(b"\x89PNG") and len(data) > 5_000
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_density_recovery_shows_every_curve_in_order_of_density() -> None:
    figure = density_recovery(DENSITIES, CURVES, base=0.649, donor=0.845, title="SST-2")
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"magnitude, alpha = 1", "magnitude, alpha = auto", "random, alpha = auto", "donor", "base"}
    np.testing.assert_array_equal(lines["magnitude, alpha = auto"].get_xdata(), sorted(DENSITIES))
    np.testing.assert_array_equal(lines["magnitude, alpha = auto"].get_ydata(), [0.66, 0.76, 0.80, 0.83])
    assert axes.get_xscale() == "log" and axes.get_title(loc="left") == "SST-2"
    assert list(lines["donor"].get_ydata()) == [0.845, 0.845] and list(lines["base"].get_ydata()) == [0.649, 0.649]


def test_density_recovery_tells_alphas_by_line_and_rules_by_colour() -> None:
    (axes,) = density_recovery(DENSITIES, CURVES, base=0.6, donor=0.8).axes
    lines = {line.get_label(): line for line in axes.lines}
    dashed, solid, other = (
        lines[name] for name in ("magnitude, alpha = 1", "magnitude, alpha = auto", "random, alpha = auto")
    )
    assert dashed.get_linestyle() == "--" and solid.get_linestyle() == other.get_linestyle() == "-"
    assert dashed.get_color() == solid.get_color() != other.get_color()
    assert solid.get_marker() != other.get_marker()


def test_density_recovery_draws_bands_around_the_curve() -> None:
    errors = {"magnitude": {"auto": [0.01, 0.02, 0.03, 0.04]}}
    (axes,) = density_recovery(DENSITIES, CURVES, base=0.6, donor=0.9, errors=errors).axes
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.84) and heights.min() == pytest.approx(0.66 - 0.02)


def test_legend_is_outside_the_axes() -> None:
    figure = density_recovery(DENSITIES, CURVES, base=0.6, donor=0.8)
    _png(figure)
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= figure.axes[0].get_window_extent().x1
    assert len(legend.get_texts()) == 5


@pytest.mark.parametrize(
    ("densities", "curves", "message"),
    [
        ([0.0, 0.1], {"magnitude": {"1": [0, 0]}}, r"must be a vector in \(0, 1\]"),
        ([], {"magnitude": {"1": []}}, r"must be a vector"),
        ([0.1], {}, r"curves must have 1 to"),
        ([0.1], {str(i): {"1": [0]} for i in range(len(COLORS) + 1)}, r"curves must have 1 to"),
        ([0.1], {"magnitude": {"2": [0.5]}}, r"alpha must be '1' or 'auto', got '2'"),
        ([0.1, 0.2], {"magnitude": {"1": [0.5]}}, r"curve 'magnitude', alpha '1' must have 2 values"),
    ],
)
def test_density_recovery_refuses_what_it_cannot_draw(densities: list, curves: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        density_recovery(densities, curves, base=0.0, donor=1.0)


def test_reliability_diagram_shows_the_filled_bins_and_the_error() -> None:
    bins = reliability_bins([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.3, 0.7]], [0, 1, 1, 1], bins=10)
    figure = reliability_diagram({"donor": bins})
    axes, below = figure.axes
    diagonal, line = axes.lines
    np.testing.assert_allclose(line.get_xdata(), [0.7, 0.9])
    np.testing.assert_allclose(line.get_ydata(), [1.0, 0.5])
    assert line.get_label() == "donor (ECE 0.350)" and diagonal.get_label() == "perfect"
    assert axes.get_xlim() == axes.get_ylim() == (0.0, 1.0)
    (stairs,) = below.patches
    assert stairs.get_data().values.sum() == pytest.approx(1.0)
    _png(figure)


def test_reliability_diagram_of_no_model_is_refused() -> None:
    with pytest.raises(ValueError, match="bins must be of 1 to"):
        reliability_diagram({})


def test_skill_map_shows_values_names_and_gaps() -> None:
    matrix = np.array([[0.1, 0.2, np.nan], [0.0, 0.3, 0.4]])
    figure = skill_map(matrix, ["0", "1"], ["query", "value", "bias"], title="Where the skill lives")
    axes = figure.axes[0]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array().mask, np.isnan(matrix))
    assert image.get_clim() == (0.0, 0.4)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["query", "value", "bias"]
    assert axes.get_ylim()[0] < axes.get_ylim()[1], "the first layer is at the bottom"
    assert sorted(text.get_text() for text in axes.texts) == ["0", "0.1", "0.2", "0.3", "0.4"]
    _png(figure)


def test_skill_map_of_zeros_has_a_scale() -> None:
    figure = skill_map(np.zeros((2, 2)), ["0", "1"], ["a", "b"], annotate=False)
    assert figure.axes[0].images[0].get_clim() == (0.0, 1.0) and not figure.axes[0].texts


def test_skill_map_grows_with_its_matrix() -> None:
    small = _png(skill_map(np.ones((2, 2)), list("ab"), list("cd")))
    large = _png(skill_map(np.ones((12, 6)), list("abcdefghijkl"), list("mnopqr")))
    assert large[0] > small[0] and large[1] > small[1]


@pytest.mark.parametrize(
    ("matrix", "message"),
    [([[1.0]], r"of shape \(1, 2\)"), ([[1.0, -1.0]], "not negative"), ([[1.0, np.inf]], "finite")],
)
def test_skill_map_refuses_what_it_cannot_draw(matrix: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        skill_map(matrix, ["0"], ["a", "b"])


@pytest.mark.slow
def test_matplotlib_is_imported_only_to_draw() -> None:
    code = "import sys, peft_graft.analysis.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
