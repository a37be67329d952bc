"""Draw the pictures of the concepts page, from the package itself and from the measured points in benchmarks/.

    python docs/pictures.py                        # draws docs/pictures/*.png
    python docs/pictures.py --measure demo_out     # first counts the entries of the patch of `make demo`, for the map

The density-recovery curves on the same page come from benchmarks/density_report.py.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from peft_graft import Patch
from peft_graft.analysis.localization import Place, locate
from peft_graft.analysis.plots import COLORS, MARKERS, skill_map
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.patch.arithmetic import grafted_values
from peft_graft.patch.patch import TensorPatch
from peft_graft.selection.rules import Evidence, get_rule
from peft_graft.selection.topk import top_k_mask

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
WHERE = RESULTS / "where" / "demo.csv"
INK = "#333333"


def figure_of(width: float, height: float) -> Figure:
    """Return a figure without a window."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def equation() -> Figure:
    """Draw the equation on a tensor of 6 x 6 entries: base, donor, delta, mask, patch and graft."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 6, generator=generator)
    far = torch.rand(6, 6, generator=generator) < 0.2  # few entries of this donor move far
    delta = torch.randn(6, 6, generator=generator) * torch.where(far, 1.8, 0.25)
    donor, alpha = base + delta, 1.5
    scores = get_rule("magnitude").score(Evidence("weight", base, delta))
    chosen = top_k_mask(scores.flatten(), 5).nonzero().flatten()
    patch = TensorPatch(chosen, donor.flatten()[chosen])
    mask = torch.zeros(36).index_fill(0, chosen, 1.0).view(6, 6)
    graft = base.flatten().index_put((chosen,), grafted_values(base.flatten()[chosen], patch.values, alpha)).view(6, 6)

    figure = figure_of(10.2, 2.2)
    panels = (
        ("base\n", base, "RdBu_r"), ("donor\n", donor, "RdBu_r"), ("delta\n= donor - base", delta, "RdBu_r"),
        ("mask\n5 of 36 entries", mask, "Greys"), (f"graft\nwith alpha = {alpha}", graft, "RdBu_r"),
    )  # fmt: skip
    axes = figure.subplots(1, 6)
    for at, (title, values, colors) in zip((*axes[:4], axes[5]), panels, strict=True):
        top = 3.0 if colors == "RdBu_r" else 1.0
        at.imshow(values.numpy(), cmap=colors, vmin=-top if colors == "RdBu_r" else 0.0, vmax=top)
        at.set_title(title, fontsize=9, color=INK)
        at.set(xticks=[], yticks=[])
    lines = [f"{index:>5}  {value:+.2f}" for index, value in zip(chosen.tolist(), patch.values.tolist(), strict=True)]
    axes[4].text(
        0.5, 0.5, "index  value\n" + "\n".join(lines), ha="center", va="center", family="monospace", fontsize=9
    )
    axes[4].set_title("patch\nwhat is stored", fontsize=9, color=INK)
    axes[4].set(aspect="equal", box_aspect=1)
    axes[4].set_axis_off()
    return figure


def alphas() -> Figure:
    """Draw the fitted alpha by density, for AdamW and SGD donors: geometric mean over the seeds."""
    found: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((RESULTS / "sst2_minilm").glob("*.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["alpha_mode"] == "auto" and row["rule"] in ("learned", "magnitude"):
                    found[row["optimizer"], row["rule"]][float(row["density"])].append(float(row["alpha"]))
    figure = figure_of(6.4, 3.6)
    axes = figure.add_subplot()
    for color, marker, (optimizer, rule) in zip(COLORS, MARKERS, sorted(found), strict=False):
        points = sorted((density, statistics.geometric_mean(a)) for density, a in found[optimizer, rule].items())
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=color, marker=marker, linewidth=1.8, label=f"{optimizer} donors, {rule} mask")
    axes.axhline(1, color=INK, linewidth=1.0, linestyle=(0, (1, 1)), label="the donor's values")
    axes.set(xscale="log", yscale="log", xlabel="density", ylabel="fitted alpha")
    axes.grid(True, color="#D9D9D9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    return figure


def measure(adapter: Path) -> Place:
    """Count the entries of a graft from examples/graft.py, in every kind of module that it touches in some layer.

    Args:
        adapter: Directory of the graft, with its base in `base`; only headers of the base's files are read.

    Returns:
        The counts.
    """
    patch, base = Patch.load(adapter / "adapter_model.safetensors"), CheckpointDonor(adapter / "base")
    touched = set(locate(patch).modules)
    shapes = {name: base.shape(name) for name in base.names()}
    return locate(patch, {n: shape for n, shape in shapes.items() if touched & set(locate({}, {n: shape}).modules)})


def write_where(place: Place, path: Path) -> None:
    """Write counts as csv: layer, module, entries of the patch, entries of the base."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("layer", "module", "entries", "size"))
        for row, column in np.argwhere(~np.isnan(place.counts)):
            numbers = (int(place.counts[row, column]), int(place.sizes[row, column]))
            rows.writerow((place.layers[row], place.modules[column], *numbers))


def where() -> Figure:
    """Draw the map of the demo's patch: its entries by layer and kind of module."""
    with WHERE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    layers, modules = (list(dict.fromkeys(row[name] for row in rows)) for name in ("layer", "module"))
    share = np.full((len(layers), len(modules)), np.nan)
    total = sum(int(row["entries"]) for row in rows)
    for row in rows:
        share[layers.index(row["layer"]), modules.index(row["module"])] = 100 * int(row["entries"]) / total
    return skill_map(share, layers, modules, label="percent of the patch", title=f"{total:,} entries")


def draw(folder: Path) -> list[Path]:
    """Draw all pictures.

    Args:
        folder: Directory for the pictures.

    Returns:
        The paths of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for make in (equation, alphas, where):
        paths.append(folder / f"{make.__name__}.png")
        # Without the version of matplotlib in it, so that the same picture is the same file.
        make().savefig(paths[-1], dpi=110, metadata={"Software": None})
    return paths


def main() -> None:
    """Read the flags and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="directory of `make demo`: count where its patch lies first")
    args = parser.parse_args()
    if args.measure:
        WHERE.parent.mkdir(parents=True, exist_ok=True)
        write_where(measure(args.measure), WHERE)
    for path in draw(DOCS / "pictures"):
        print(f"wrote {path} ({path.stat().st_size / 1024:.0f} KB)")


if __name__ == "__main__":
    main()
