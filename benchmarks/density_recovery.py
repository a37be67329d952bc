"""Measure how much of a donor's skill a patch keeps, by density, rule and alpha: the density-recovery curve.

    python benchmarks/density_recovery.py --donors out/sgd0 out/adamw0 --train train.jsonl --validation test.jsonl

Each point is compared with its base and its donor on the same rows. Each donor directory comes from
`examples/make_donor.py` (base/, donor/, metrics.json); without --donors one is made on the embedded task. Mask and
alpha are fitted on rows of --train that the donor never saw; --validation only measures. The result is one csv file
per donor with one row per point. Rows are written as soon as they are known, so that a second run continues where the
first one stopped. `density_report.py` makes the table and the pictures.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tasks
from flags import Flags
from graft import GraftArguments, batches, fit
from make_donor import DonorArguments, make_donor
from peft_graft import GraftConfig, fit_alpha, initialize_graft
from peft_graft.analysis.metrics import Agreement
from peft_graft.selection.rules import get_rule
from peft_graft.training.measure import measure

RULES = ("magnitude", "learned", "random", "path_taylor", "sigmoid")
DENSITIES = (1e-4, 1e-3, 1e-2, 1e-5, 1e-1)
COLUMNS = (
    "donor", "optimizer", "seed", "rule", "alpha_mode", "density", "entries", "alpha",
    "accuracy", "f1", "ece", "loss", "agreement", "seconds", "torch", "transformers", "peft", "threads",
    "values", "values_error",
)  # fmt: skip


class Bench:
    """One donor: its data, its scores, and the points measured so far.

    Args:
        directory: Output directory of `make_donor.py`.
        args: The flags.
    """

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.args, self.directory = args, directory
        self.made = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["arguments"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory / "base")
        seen, seed = self.made["max_train_samples"] or tasks.SIZES["train"], self.made["seed"]
        rows = tasks.load_rows(args.train, limit=args.mask_rows + args.calibration_rows, skip=seen, seed=seed)
        names = None if args.train == tasks.DOCSTRINGS else tasks.label_names(rows)
        test = tasks.load_rows(
            args.validation or args.train, "validation" if args.validation else "test", label_names=names
        )
        parts = (rows.select(range(args.calibration_rows)), rows.select(range(args.calibration_rows, len(rows))), test)
        self.calibration, self.train, self.test = (tasks.tokenize(part, self.tokenizer) for part in parts)
        self.held_out = batches(self.calibration, self.tokenizer)
        self.path = Path(args.out) / f"{directory.name}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done: set[tuple[str, ...]] = set()
        self.columns: tuple[str, ...] = COLUMNS
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.done = {self._key(row) for row in reader}
                self.columns = tuple(reader.fieldnames or COLUMNS)
        if args.values != ["donor"] and "values" not in self.columns:
            raise SystemExit(f"{self.path} was begun without --values. Give another --out for codes of values.")
        self.measured: dict[str, torch.Tensor] | None = None
        logits, self.labels = tasks.predict(self.load("donor"), self.test, self.tokenizer)
        self.donor_predictions = logits.argmax(-1).tolist()
        self._write("donor", "", 1.0, 0, 1.0, logits, 0.0)
        self._write("base", "", 0.0, 0, 0.0, tasks.predict(self.load("base"), self.test, self.tokenizer)[0], 0.0)

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return (row["rule"], row["alpha_mode"], f"{float(row['density']):.1e}", row.get("values") or "donor")

    def load(self, name: str) -> Any:
        """Load the model "base" or "donor", in evaluation mode."""
        return AutoModelForSequenceClassification.from_pretrained(self.directory / name).eval()

    def _write(
        self,
        rule: str,
        mode: str,
        density: float,
        entries: int,
        alpha: float,
        logits: torch.Tensor,
        seconds: float,
        values: str = "donor",
        error: float = 0.0,
    ) -> None:
        decisions = logits.argmax(-1).tolist()
        row: dict[str, Any] = {
            "donor": self.directory.name, "optimizer": self.made["optimizer"], "seed": self.made["seed"],
            "rule": rule, "alpha_mode": mode, "density": density, "entries": entries, "alpha": alpha,
            **tasks.measure(logits, self.labels),
            **Agreement().compute(predictions=decisions, references=self.donor_predictions),
            "seconds": round(seconds, 2),
            **{name: version(name) for name in ("torch", "transformers", "peft")}, "threads": torch.get_num_threads(),
            "values": values, "values_error": error,
        }  # fmt: skip
        if self._key(row) in self.done:
            return
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.done.add(self._key(row))
        print(
            f"{self.directory.name} {rule:12} {values:5} {mode:5} density {density:.0e} alpha {alpha:8.3g} accuracy "
            f"{row['accuracy']:.4f} ece {row['ece']:.3f} loss {row['loss']:.4f} {seconds:6.1f} s",
            flush=True,
        )

    def _record(self, model: Any, rule: str, mode: str, density: float, seconds: float) -> None:
        config = model.peft_config["default"]
        logits, _ = tasks.predict(model.eval(), self.test, self.tokenizer)
        if rule == "learned" and config.values != "donor":
            model.save_pretrained(self.path.parent / "tmp" / "saved")  # which records what the code loses
        error = (config.record.provenance or {}).get("values_error", 0.0)
        entries, alpha = config.record.entries, config.alpha
        self._write(rule, mode, density, entries, alpha, logits, seconds, config.values, error)

    def point(self, rule: str, density: float, modes: list[str], values: str = "donor") -> None:
        """Measure a rule at a density with a code, for each mode of alpha ("1", "auto") that has no row yet."""
        modes = [mode for mode in modes if (rule, mode, f"{density:.1e}", values) not in self.done]
        if not modes:
            return
        if rule == "learned":
            for mode in modes:
                started = time.perf_counter()
                options = GraftArguments(
                    density=density, alpha=mode, seed=self.made["seed"], output_dir=str(self.path.parent / "tmp"),
                    values=values,
                )  # fmt: skip
                donor = str(self.directory / "donor")
                model = fit(self.load("base"), donor, self.tokenizer, self.train, self.calibration, options)
                self._record(model, rule, mode, density, time.perf_counter() - started)
            return
        started = time.perf_counter()
        config = GraftConfig(
            donor=str(self.directory / "donor"), density=density, selection=rule, task_type="SEQ_CLS",
            seed=self.made["seed"], values=values,
        )  # fmt: skip
        model = get_peft_model(self.load("base"), config)
        if rule == "sigmoid":
            rows = self.train.select(range(self.args.sigmoid_rows))
            passes = batches(rows, self.tokenizer, 32)
            initialize_graft(
                model, passes, calibration=self.held_out, steps=self.args.sigmoid_steps, show_progress_bar=False
            )
        elif get_rule(rule).kind == "scored":
            if self.measured is None:  # the scores do not depend on the density
                rows = batches(self.train.select(range(self.args.score_rows)), self.tokenizer, 32)
                tuner = model.base_model
                self.measured = measure(
                    model, tuner, "default", str(get_rule(rule).evidence), rows, show_progress_bar=False
                )
                self.score_seconds = time.perf_counter() - started
            else:
                started -= self.score_seconds
            model.base_model.build_patch("default", self.measured)
            model.base_model.states["default"].ready = True
        seconds = time.perf_counter() - started
        if "1" in modes:
            self._record(model, rule, "1", density, seconds)
        if "auto" in modes:
            started = time.perf_counter()
            fit_alpha(model, self.held_out, show_progress_bar=False)
            self._record(model, rule, "auto", density, seconds + time.perf_counter() - started)


def embedded_donor(out: str) -> Path:
    """Make the donor of the embedded task unless it exists, and return its directory."""
    directory = Path(out) / "embedded_adamw0"
    if not (directory / "metrics.json").exists():
        make_donor(DonorArguments(optimizer="adamw", max_train_samples=2048, output_dir=str(directory)))
    return directory


def main() -> None:
    """Measure all points that have no row yet."""
    parser = Flags(__doc__)
    parser.add_argument("--donors", nargs="+", type=Path, help="directories made by make_donor.py")
    parser.add_argument(
        "--train", default=tasks.DOCSTRINGS, help="training rows, the file that the donors were made from"
    )
    parser.add_argument("--validation", help="rows to measure on; nothing is fitted on them")
    parser.add_argument("--rules", nargs="+", default=list(RULES), help="rules to measure, in this order")
    parser.add_argument(
        "--densities", nargs="+", type=float, default=list(DENSITIES), help="densities to measure, in this order"
    )
    parser.add_argument(
        "--values", nargs="+", default=["donor"], help="what is stored of an entry: donor, sign, int4, int8"
    )
    parser.add_argument("--alphas", nargs="+", default=["1", "auto"], help="'1', 'auto' or both")
    parser.add_argument("--mask-rows", type=int, default=2048, help="rows that train a learned mask")
    parser.add_argument("--calibration-rows", type=int, default=512, help="other rows that fit alpha")
    parser.add_argument("--score-rows", type=int, default=512, help="how many of the mask's rows score path_taylor")
    parser.add_argument("--sigmoid-rows", type=int, default=1024, help="rows in one pass of the published procedure")
    parser.add_argument("--sigmoid-steps", type=int, default=5, help="passes of the published procedure")
    parser.add_argument("--out", default="benchmarks/out", help="directory for the csv files")
    args = parser.parse_args()
    benches = [Bench(directory, args) for directory in args.donors or [embedded_donor(args.out)]]
    for rule in args.rules:
        for density in args.densities:
            for bench in benches:
                for values in args.values:
                    bench.point(rule, density, args.alphas, values)


if __name__ == "__main__":
    main()
