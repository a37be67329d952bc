"""Figures of arrays with matplotlib; the numbers come from the other modules.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart; every line also has its own marker.
matplotlib comes with the extra `peft-graft[plots]` and is imported when a figure is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .calibration import ReliabilityBins

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

__all__ = ["density_recovery", "reliability_diagram", "skill_map"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_INK, _FAINT = "#333333", "#D9D9D9"


def density_recovery(
    densities: ArrayLike,
    curves: Mapping[str, Mapping[str, ArrayLike]],
    *,
    base: float,
    donor: float,
    errors: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    ylabel: str = "accuracy",
    title: str = "",
) -> Figure:
    """Draw the score of a patch by density, between base and donor: one colour per rule, dashed at alpha = 1.

    Args:
        densities: Shares of the eligible entries, shape [K], in (0, 1]; drawn on a logarithmic axis.
        curves: Rule name -> {"1": values at alpha = 1, "auto": values at a fitted alpha}, each of shape [K]; NaN
            where there is no measurement. Either key may be absent.
        base: The base's value, a horizontal line.
        donor: The donor's value, a horizontal line.
        errors: Half widths of the error bands, in the structure of `curves`, not negative; none by default.
        ylabel: Name of the values.
        title: Title of the figure.

    Returns:
        The figure, with its legend beside the axes.

    Raises:
        ValueError: If a density is outside (0, 1], a curve has another length, or an alpha is neither "1" nor "auto".
    """
    x = np.asarray(densities, dtype=np.float64)
    if x.ndim != 1 or x.size == 0 or not ((x > 0) & (x <= 1)).all():
        raise ValueError(f"densities must be a vector in (0, 1], got {x.tolist()!r}. Leave out budgets of 0.")
    if not curves or len(curves) > len(COLORS):
        raise ValueError(f"curves must have 1 to {len(COLORS)} rules, got {list(curves)!r}. Draw several figures.")
    order = np.argsort(x)
    figure, axes = _figure(7.6, 4.4)
    for color, marker, (rule, by_alpha) in zip(COLORS, MARKERS, curves.items(), strict=False):
        for alpha, values in by_alpha.items():
            if alpha not in ("1", "auto"):
                raise ValueError(f"alpha must be '1' or 'auto', got {alpha!r} in curve {rule!r}.")
            y = _vector(values, x.size, f"curve {rule!r}, alpha {alpha!r}")
            axes.plot(
                x[order],
                y[order],
                color=color,
                marker=marker,
                markersize=5,
                markerfacecolor=color if alpha == "auto" else "white",
                linestyle="-" if alpha == "auto" else (0, (4, 2)),
                linewidth=1.8,
                label=f"{rule}, alpha = {alpha}",
            )
            band = (errors or {}).get(rule, {}).get(alpha)
            if band is not None:
                half = _vector(band, x.size, f"error of curve {rule!r}, alpha {alpha!r}")
                low, high = y[order] - half[order], y[order] + half[order]
                axes.fill_between(x[order], low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(donor, color=_INK, linewidth=1.2, linestyle=(0, (1, 1)), label="donor", zorder=1)
    axes.axhline(base, color="#888888", linewidth=1.2, linestyle=(0, (6, 2, 1, 2)), label="base", zorder=1)
    axes.set_xscale("log")
    axes.set_xlabel("density (share of the eligible entries taken from the donor)")
    axes.set_ylabel(ylabel)
    axes.grid(True, color=_FAINT, linewidth=0.6)
    _finish(figure, axes, title, legend=True)
    return figure


def reliability_diagram(bins: Mapping[str, ReliabilityBins], *, title: str = "") -> Figure:
    """Draw accuracy against confidence by bin, above a histogram of the confidences.

    Args:
        bins: Model name (base, donor, graft, ...) -> its bins from `calibration.reliability_bins`.
        title: Title of the figure.

    Returns:
        The figure. A perfectly calibrated model lies on the dotted diagonal; the ECE of each model is in the legend.

    Raises:
        ValueError: If there is no model, or more than there are colours.
    """
    if not bins or len(bins) > len(COLORS):
        raise ValueError(f"bins must be of 1 to {len(COLORS)} models, got {list(bins)!r}. Draw several figures.")
    figure, axes = _figure(6.4, 5.0)
    axes.remove()
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1)})
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1.0, linestyle=(0, (1, 1)), label="perfect", zorder=1)
    for color, marker, (name, one) in zip(COLORS, MARKERS, bins.items(), strict=False):
        filled = one.counts > 0
        label = f"{name} (ECE {one.expected_calibration_error:.3f})"
        axes.plot(one.confidence[filled], one.accuracy[filled], color=color, marker=marker, linewidth=1.8, label=label)
        below.stairs(one.counts / one.counts.sum(), one.edges, color=color, linewidth=1.5)
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="share")
    below.set_ylim(bottom=0)
    for one_axes in (axes, below):
        one_axes.grid(True, color=_FAINT, linewidth=0.6)
    _despine(below)
    _finish(figure, axes, title, legend=True)
    return figure


def skill_map(
    matrix: ArrayLike,
    layers: Sequence[str],
    modules: Sequence[str],
    *,
    label: str = "share of the patch",
    title: str = "",
    annotate: bool = True,
) -> Figure:
    """Draw the place of a skill as a heat map: one row per layer, one column per kind of module.

    Args:
        matrix: Values, shape [layers, modules], any unit, not negative; NaN where a layer has no such module.
        layers: Row names, from the input (drawn at the bottom) to the output.
        modules: Column names.
        label: Name of the values, for the colour bar.
        title: Title of the figure.
        annotate: Whether to write each value into its cell.

    Returns:
        The figure, with a colour bar that starts at 0.

    Raises:
        ValueError: If the names do not fit the matrix, or a value is negative or infinite.
    """
    values = np.asarray(matrix, dtype=np.float64)
    if values.shape != (len(layers), len(modules)) or values.size == 0:
        raise ValueError(
            f"matrix must be of shape {(len(layers), len(modules))!r}, one row per layer and one column per module, "
            f"got {values.shape!r}."
        )
    present = ~np.isnan(values)
    if not (np.isfinite(values[present]) & (values[present] >= 0)).all():
        raise ValueError("matrix must be finite and not negative, with NaN where a layer has no such module.")
    top = float(values[present].max(initial=0.0)) or 1.0
    figure, axes = _figure(2.6 + 0.75 * len(modules), 1.6 + 0.42 * len(layers))
    image = axes.imshow(np.ma.masked_invalid(values), origin="lower", aspect="auto", cmap="cividis", vmin=0.0, vmax=top)
    axes.set_facecolor("#F2F2F2")  # cells without a tensor
    axes.set_xticks(range(len(modules)), modules, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    if annotate:
        for row, column in np.argwhere(present):
            value = values[row, column]
            ink = "black" if value > 0.55 * top else "white"  # cividis runs from dark to light
            axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=7.5)
    figure.colorbar(image, ax=axes, label=label, fraction=0.05, pad=0.03).outline.set_visible(False)
    _finish(figure, axes, title, legend=False)
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure without pyplot, which would need a window system and keep the figure until it is closed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plots need matplotlib. Run `pip install peft-graft[plots]`.") from error
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _despine(axes: Axes) -> None:
    """Hide the upper and right edge of the axes."""
    axes.spines[["top", "right"]].set_visible(False)


def _finish(figure: Figure, axes: Axes, title: str, legend: bool) -> None:
    """Apply the common style: title, legend and edges."""
    _despine(axes)
    if title:
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    if legend:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8.5)


def _vector(values: ArrayLike, size: int, what: str) -> np.ndarray:
    """Convert the values of one line to an array, and check their number."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (size,):
        raise ValueError(f"{what} must have {size} values, one per density, got shape {array.shape!r}.")
    return array
