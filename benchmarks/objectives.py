"""Compare what a learned mask is fitted to: the labels, or the donor's own outputs, with the donor and with noise.

    python benchmarks/objectives.py --donors out/sst2_adamw0 --train train.jsonl --validation test.jsonl

For each objective and density, one mask is learned on the donor, and one on the same donor with its deltas shuffled
within each tensor: what that one reaches was trained, not found. Every graft is measured by accuracy, by its agreement
with the donor, and by KL(donor || graft), on rows that nothing is fitted on. The column `start_loss` has the loss that
the mask of the largest deltas has on the calibration rows with a fitted alpha, `end_loss` that of what was kept. One
csv file per donor; rows are written as soon as they are known, and a second run continues where the first one stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tasks
from flags import Flags
from graft import GraftArguments, batches, fit, helped
from peft_graft import AlphaCallback, GraftConfig, store_donor_outputs
from peft_graft.analysis.metrics import Agreement
from peft_graft.training.donor_objective import divergence
from peft_graft.training.donor_outputs import Distributions

COLUMNS = (
    "donor", "seed", "objective", "deltas", "density", "entries", "alpha", "accuracy", "ece", "loss", "agreement", "kl",
    "start_loss", "end_loss", "helped", "seconds", "threads",
)  # fmt: skip


def shuffle(directory: Path, out: Path, seed: int) -> Path:
    """Write a donor whose deltas are shuffled within each tensor, except in the head, and return its directory."""
    if not (out / "model.safetensors").exists():
        base, donor = (load_file(directory / name / "model.safetensors") for name in ("base", "donor"))
        generator = torch.Generator().manual_seed(seed)
        for name, value in donor.items():
            if value.is_floating_point() and not name.startswith(("classifier", "score")):
                delta = (value.float() - base[name].float()).flatten()
                order = torch.randperm(delta.numel(), generator=generator)
                donor[name] = (base[name].float() + delta[order].view_as(value)).to(value.dtype)
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.json").write_bytes((directory / "donor" / "config.json").read_bytes())
        save_file(donor, out / "model.safetensors", {"format": "pt"})
    return out


class Bench:
    """One donor: its data, its outputs, and the points measured so far.

    Args:
        directory: Output directory of `make_donor.py`.
        args: The flags.
    """

    def __init__(self, directory: Path, args: argparse.Namespace) -> None:
        self.args, self.directory = args, directory
        self.made = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))["arguments"]
        self.tokenizer = AutoTokenizer.from_pretrained(directory / "base")
        seed, count = self.made["seed"], args.calibration_rows + args.mask_rows
        seen = self.made["max_train_samples"] or tasks.SIZES["train"]
        rows = tasks.load_rows(args.train, limit=count, skip=seen, seed=seed)
        test = tasks.load_rows(args.validation, label_names=tasks.label_names(rows), limit=args.test_rows)
        parts = (rows.select(range(args.calibration_rows)), rows.select(range(args.calibration_rows, len(rows))), test)
        self.calibration, self.train, self.test = (tasks.tokenize(part, self.tokenizer) for part in parts)
        self.path = Path(args.out) / f"{directory.name}.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.done: set[tuple[str, ...]] = set()
        if self.path.exists():
            with self.path.open(encoding="utf-8") as file:
                self.done = {self._key(row) for row in csv.DictReader(file)}
        self.shuffled = shuffle(directory, Path(args.out) / f"{directory.name}_shuffled", seed)
        self.donor_logits, self.labels = tasks.predict(self._load("donor"), self.test, self.tokenizer)
        # Stored once, from the donor itself: a mask over shuffled deltas is fitted to what the real donor says.
        self.outputs = Path(args.out) / f"{directory.name}_outputs"
        if not self.outputs.exists():
            model = get_peft_model(
                self._load("base"), GraftConfig(donor=str(directory / "donor"), num_params=1, task_type="SEQ_CLS")
            )
            rows_of = [*batches(self.train, self.tokenizer), *batches(self.calibration, self.tokenizer)]
            store_donor_outputs(model, rows_of, output_dir=self.outputs)
        for name in ("base", "donor"):
            self._write({"objective": "", "deltas": name, "density": float(name == "donor")}, self._load(name))

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["objective"], row["deltas"], f"{float(row['density']):.1e}"

    def _load(self, name: str) -> Any:
        return AutoModelForSequenceClassification.from_pretrained(self.directory / name).eval()

    def _write(self, row: dict[str, Any], model: Any) -> None:
        if self._key(row) in self.done:
            return
        logits, _ = tasks.predict(model.eval(), self.test, self.tokenizer)
        decisions = {"predictions": logits.argmax(-1).tolist(), "references": self.donor_logits.argmax(-1).tolist()}
        donor = Distributions.of(self.donor_logits, self.donor_logits.shape[-1])
        row |= {"donor": self.directory.name, "seed": self.made["seed"], "threads": torch.get_num_threads()}
        row |= {**tasks.measure(logits, self.labels), **Agreement().compute(**decisions)}
        row["kl"] = float(divergence(donor, logits).mean())
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.done.add(self._key(row))
        print(" ".join(f"{name} {row[name]}" for name in COLUMNS if name in row), flush=True)

    def point(self, objective: str, deltas: str, density: float) -> None:
        """Learn one mask and measure it, unless there is a row of it."""
        row: dict[str, Any] = {"objective": objective, "deltas": deltas, "density": density}
        if self._key(row) in self.done:
            return
        started = time.perf_counter()
        options = GraftArguments(
            density=density, objective=objective, donor_outputs=str(self.outputs) if objective == "donor" else None,
            seed=self.made["seed"], output_dir=str(self.path.parent / "tmp"),
        )  # fmt: skip
        donor = str(self.directory / "donor" if deltas == "own" else self.shuffled)
        model = fit(self._load("base"), donor, self.tokenizer, self.train, self.calibration, options)
        losses = next(c.losses for c in model.trainer.callback_handler.callbacks if isinstance(c, AlphaCallback))
        row |= {"start_loss": losses[0], "end_loss": min(losses.values()), "helped": helped(model)}
        row |= {"entries": model.peft_config["default"].record.entries, "alpha": model.peft_config["default"].alpha}
        self._write(row | {"seconds": round(time.perf_counter() - started, 1)}, model)


def main() -> None:
    """Measure all points that have no row yet."""
    parser = Flags(__doc__)
    parser.add_argument("--donors", nargs="+", type=Path, required=True, help="directories made by make_donor.py")
    parser.add_argument("--train", required=True, help="training rows, the file that the donors were made from")
    parser.add_argument("--validation", required=True, help="rows to measure on; nothing is fitted on them")
    parser.add_argument("--densities", nargs="+", type=float, default=[1e-4, 1e-3], help="densities, in this order")
    parser.add_argument("--objectives", nargs="+", default=["labels", "donor"], help="'labels', 'donor' or both")
    parser.add_argument("--deltas", nargs="+", default=["own", "shuffled"], help="'own', 'shuffled' or both")
    parser.add_argument("--mask-rows", type=int, default=2048, help="rows that train the mask")
    parser.add_argument("--calibration-rows", type=int, default=512, help="other rows that fit alpha")
    parser.add_argument("--test-rows", type=int, help="rows to measure on; default all")
    parser.add_argument("--out", default="benchmarks/out", help="directory for the csv files")
    args = parser.parse_args()
    for directory in args.donors:
        bench = Bench(directory, args)
        for density in args.densities:
            for deltas in args.deltas:
                for objective in args.objectives:
                    bench.point(objective, deltas, density)


if __name__ == "__main__":
    main()
