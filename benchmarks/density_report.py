"""Make a table and pictures from the csv files of density_recovery.py.

    python benchmarks/density_report.py --csv out/*.csv --task "SST-2 on MiniLM" --picture docs/density_recovery

prints a Markdown table (mean and standard deviation over the seeds) and draws one picture per optimizer. With the file
of one donor, `--card DIR` adds its curve to the card of an adapter that `examples/graft.py` made from this donor.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flags import Flags
from peft_graft.analysis.plots import density_recovery
from peft_graft.workflows.push import write_card

ORDER = ("learned", "magnitude", "path_taylor", "sigmoid", "random")
Rows = list[dict[str, str]]


def read(paths: Iterable[Path]) -> Rows:
    """Return all rows of the csv files, each with the scores of its donor and its base."""
    rows: Rows = []
    for path in paths:
        with path.open(encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        ends = {row["rule"]: row for row in found if row["rule"] in ("base", "donor")}
        for row in found:
            for end, scores in ends.items():
                row |= {f"{end}_{name}": scores[name] for name in ("accuracy", "ece", "loss")}
            rows.append(row)
    return rows


def mean(rows: Rows, column: str) -> float:
    """Return the mean of a column."""
    return statistics.fmean(float(row[column]) for row in rows)


def spread(rows: Rows, column: str) -> str:
    """Return the standard deviation of a column as text; empty for a single row."""
    return f" ± {statistics.stdev(float(row[column]) for row in rows):.4f}" if len(rows) > 1 else ""


def share(row: dict[str, str]) -> float:
    """Return the share of the donor's accuracy that a point keeps."""
    return float(row["accuracy"]) / float(row["donor_accuracy"])


def gain(row: dict[str, str]) -> float:
    """Return the share of the donor's gain over the base that a point keeps; NaN if the donor has gained nothing."""
    base, donor = float(row["base_accuracy"]), float(row["donor_accuracy"])
    return (float(row["accuracy"]) - base) / (donor - base) if donor != base else float("nan")


def groups(rows: Rows) -> dict[tuple[str, float, str, str], Rows]:
    """Group rows by (optimizer, density, rule, alpha mode), in the order of the table."""
    found: dict[tuple[str, float, str, str], Rows] = defaultdict(list)
    for row in rows:
        if row["rule"] in ORDER:
            coded = row.get("values") or "donor"
            rule = row["rule"] if coded == "donor" else f"{row['rule']}, {coded}"
            found[row["optimizer"], float(row["density"]), rule, row["alpha_mode"]].append(row)
    return dict(sorted(found.items(), key=lambda item: (*item[0][:2], _rank(item[0][2]), item[0][3])))


def _rank(rule: str) -> tuple[int, str]:
    """Return the place of a rule in the table, with its codes of values after it."""
    name, _, coded = rule.partition(", ")
    return ORDER.index(name), coded


def table(rows: Rows) -> str:
    """Return a Markdown table of all points."""
    lines = []
    for optimizer in sorted({row["optimizer"] for row in rows}):
        donors = [row for row in rows if row["optimizer"] == optimizer and row["rule"] == "donor"]
        lines += [
            f"\n**{optimizer} donors** ({len(donors)} seed{'s' * (len(donors) > 1)}): "
            f"accuracy {mean(donors, 'accuracy'):.4f} (base {mean(donors, 'base_accuracy'):.4f}), "
            f"ECE {mean(donors, 'ece'):.3f}, loss {mean(donors, 'loss'):.4f}\n",
            "| density | rule | alpha | accuracy | of accuracy | of gain | ECE | loss | agreement | seeds | seconds |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (kind, density, rule, mode), found in groups(rows).items():
            if kind != optimizer:
                continue
            alphas = [float(row["alpha"]) for row in found]
            ends = sorted({f"{min(alphas):.3g}", f"{max(alphas):.3g}"}, key=float)
            alpha = "1" if mode == "1" else f"auto ({' ... '.join(ends)})"
            lines.append(
                f"| {density:.0e} | {rule} | {alpha} | {mean(found, 'accuracy'):.4f}{spread(found, 'accuracy')} | "
                f"{statistics.fmean(map(share, found)):.1%} | {statistics.fmean(map(gain, found)):.0%} | "
                f"{mean(found, 'ece'):.3f} | {mean(found, 'loss'):.4f} | {mean(found, 'agreement'):.3f} | "
                f"{len(found)} | {mean(found, 'seconds'):.0f} |"
            )
    return "\n".join(lines)


def curve(rows: Rows, optimizer: str, title: str) -> dict[str, Any]:
    """Return accuracy by density for one optimizer, as arguments of `peft_graft.analysis.plots.density_recovery`."""
    ends = [row for row in rows if row["optimizer"] == optimizer and row["rule"] == "donor"]
    found = {key[1:]: value for key, value in groups(rows).items() if key[0] == optimizer}
    densities = sorted({density for density, _, _ in found})
    curves: dict[str, dict[str, list[float]]] = {}
    for rule in ORDER:
        for mode in ("1", "auto"):
            if any((density, rule, mode) in found for density in densities):
                curves.setdefault(rule, {})[mode] = [
                    mean(found[density, rule, mode], "accuracy") if (density, rule, mode) in found else float("nan")
                    for density in densities
                ]
    base, donor = mean(ends, "base_accuracy"), mean(ends, "accuracy")
    return {"densities": densities, "curves": curves, "base": base, "donor": donor, "title": title}


def pictures(rows: Rows, stem: Path, task: str) -> list[Path]:
    """Draw accuracy by density, one picture per optimizer, and return the paths."""
    written = []
    for optimizer in sorted({row["optimizer"] for row in rows}):
        seeds = sum(row["optimizer"] == optimizer and row["rule"] == "donor" for row in rows)
        title = f"{optimizer} donors{task and ', '}{task}, mean of {seeds} seeds"
        path = stem.with_name(f"{stem.name}_{optimizer}.png")
        density_recovery(**curve(rows, optimizer, title)).savefig(path)
        written.append(path)
    return written


def main() -> None:
    """Read the flags, print the table, and write the pictures."""
    parser = Flags(__doc__)
    parser.add_argument(
        "--csv", nargs="+", type=Path, help="files of density_recovery.py; default benchmarks/out/*.csv"
    )
    parser.add_argument("--picture", type=Path, help="path and start of the name of the pictures")
    parser.add_argument("--task", default="", help="name of the task in the pictures")
    parser.add_argument("--card", type=Path, metavar="DIR", help="an adapter's directory, with its metrics.json")
    args = parser.parse_args()
    args.csv = args.csv or sorted(Path("benchmarks/out").glob("*.csv"))
    if not args.csv:
        parser.error("--csv must name at least one file, got none. Run density_recovery.py first.")
    rows = read(args.csv)
    print(table(rows))
    if args.card:
        write_card(args.card, args.card / "metrics.json", recovery=curve(rows, rows[0]["optimizer"], args.task))
    if args.picture:
        for path in pictures(rows, args.picture, args.task):
            print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
