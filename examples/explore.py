"""The computations behind app.py: grafts of one donor by rule, density and alpha, measured once and remembered."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tasks
from graft import ADAPTER_FILES, DONOR_ROWS, GraftArguments, fit, own_donor
from peft_graft import GraftConfig, Patch
from peft_graft.analysis.localization import Place, locate
from peft_graft.analysis.metrics import Agreement
from peft_graft.analysis.plots import density_recovery, skill_map

# The rules that take less than a minute on a small model: all but `sigmoid`.
RULES = ("learned", "magnitude", "path_taylor", "taylor", "fisher", "wanda", "random")
CURVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
Progress = Callable[[float, str], Any]


def _silent(share: float, what: str) -> None:
    """Ignore a report of progress."""


@dataclass
class ExploreArguments:
    """Flags: the models, the data, and how many rows of it to use."""

    demo_dir: str = field(
        default="demo_out", metadata={"help": "Directory of the base and donor that `make demo`, or the app, makes."}
    )
    base: str | None = field(default=None, metadata={"help": "Base: directory or Hub id. Default: the demo's."})
    donor: str | None = field(default=None, metadata={"help": "Fine-tuned base. Default: the demo's."})
    train: str = field(
        default=tasks.DOCSTRINGS,
        metadata={"help": "Rows that fit mask and alpha: file, Hub data set, or 'docstrings', as in graft.py."},
    )
    validation: str | None = field(
        default=None, metadata={"help": "Rows to measure on. Default: the test split of the embedded task."}
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "Text column, or two columns for pairs. Default: as found."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the labels."})
    rows: int = field(default=512, metadata={"help": "Measure on this many rows."})
    mask_rows: int = field(default=1024, metadata={"help": "Rows that train or score the mask."})
    calibration_rows: int = field(default=256, metadata={"help": "Other rows that fit alpha."})
    skip_train_samples: int = field(
        default=0, metadata={"help": "Shuffled rows of --train to skip, because the donor was trained on them."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the rows and of the selection."})


def demo_is_made(args: ExploreArguments) -> bool:
    """Return whether there is a donor to explore: one that is named, or the demo's."""
    return args.donor is not None or (Path(args.demo_dir) / "donor" / "model.safetensors").is_file()


def make_demo(args: ExploreArguments) -> None:
    """Make the demo's base and donor, like `make demo`."""
    own_donor(GraftArguments(output_dir=args.demo_dir))


@dataclass(frozen=True)
class Setting:
    """One choice of rule, density and alpha.

    Args:
        selection: One of `RULES`.
        density: Share of the eligible entries, in (0, 1].
        alpha: `"auto"`, or a number.
    """

    selection: str
    density: float
    alpha: str = "auto"

    def __post_init__(self) -> None:
        problems = []
        if self.selection not in RULES:
            problems.append(f"selection must be one of {RULES}, got {self.selection!r}.")
        if not 0 < self.density <= 1:
            problems.append(f"density must be in (0, 1], got {self.density!r}.")
        try:
            finite = self.alpha == "auto" or math.isfinite(float(self.alpha))
        except ValueError:
            finite = False
        if not finite:
            problems.append(f"alpha must be 'auto' or a finite number, got {self.alpha!r}.")
        if problems:
            raise ValueError(" ".join(problems))


@dataclass(frozen=True)
class Point:
    """The measured graft of one setting.

    Args:
        setting: The choice.
        scores: accuracy, f1, ece, loss and agreement of the graft.
        entries: Entries of the patch.
        bytes: Size of the adapter's two files.
        alpha: The fitted or given scale.
        seconds: Time that making the patch took.
        place: Map of the entries by layer and module.
    """

    setting: Setting
    scores: dict[str, float]
    entries: int
    bytes: int
    alpha: float
    seconds: float
    place: Place


class Explorer:
    """One base and one donor: graft, measure, draw, compare.

    Args:
        args: Flags, see `--help`.
        progress: Called with a share in [0, 1] and a description of the current step.

    Raises:
        ValueError: Base and donor are not given together or do not fit together, or the data does not fit.
    """

    def __init__(self, args: ExploreArguments, progress: Progress = _silent) -> None:
        if (args.base is None) != (args.donor is None):
            raise ValueError(f"base and donor must be given together, got {args.base!r} and {args.donor!r}. Give both.")
        skip, base, donor = args.skip_train_samples, args.base, args.donor
        if base is None or donor is None:
            base, donor = (str(Path(args.demo_dir) / name) for name in ("base", "donor"))
            skip += _rows_seen(Path(args.demo_dir))
        self.args, self.names = args, {"base": base, "donor": donor}
        progress(0.0, "reading base and donor")
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        device = tasks.launched().device
        self.base = AutoModelForSequenceClassification.from_pretrained(base).to(device).eval()
        self.donor = AutoModelForSequenceClassification.from_pretrained(donor).to(device).eval()
        # The smallest possible graft checks that base and donor fit together, and counts the eligible entries.
        smallest = get_peft_model(copy.deepcopy(self.base), GraftConfig(donor=self.donor, num_params=1))
        self.eligible = int(smallest.peft_config["default"].record.eligible)
        self.labels = [self.base.config.id2label[index] for index in range(self.base.config.num_labels)]
        progress(0.2, "reading the data")
        columns: dict[str, Any] = {"text_columns": args.text_columns, "label_column": args.label_column}
        wanted = args.mask_rows + args.calibration_rows
        rows = tasks.load_rows(args.train, "train", **columns, limit=wanted, skip=skip, seed=args.seed)
        names = None if args.train == tasks.DOCSTRINGS else tasks.label_names(rows)
        test = tasks.load_rows(
            args.validation or args.train, "test" if args.validation is None else "validation", **columns,
            limit=args.rows, label_names=names,
        )  # fmt: skip
        held_out = min(args.calibration_rows, len(rows) // 2)
        self.calibration = tasks.tokenize(rows.select(range(held_out)), self.tokenizer)
        self.train = tasks.tokenize(rows.select(range(held_out, len(rows))), self.tokenizer)
        self.test = tasks.tokenize(test, self.tokenizer)
        self.points: dict[Setting, Point] = {}
        self.graft: PeftModel | None = None
        progress(0.5, "measuring base and donor")
        predicted = {name: self._predict(model) for name, model in (("base", self.base), ("donor", self.donor))}
        self.scores = {name: self._score(logits, predicted["donor"]) for name, logits in predicted.items()}
        self._donor_logits = predicted["donor"]
        base_right, donor_right = (
            predicted[name].argmax(-1) == torch.tensor(self.test["labels"]) for name in ("base", "donor")
        )
        learned = (donor_right & ~base_right).nonzero().flatten().tolist()  # what fine-tuning has taught
        self.example = str(test[learned[0] if learned else 0]["text"])
        self._folder = TemporaryDirectory(prefix="explore-")  # the adapters that were made
        progress(1.0, "ready")

    def close(self) -> None:
        """Remove the adapters that were made."""
        self._folder.cleanup()

    def run(self, setting: Setting) -> Point:
        """Graft and measure; what was done before is remembered.

        Args:
            setting: Rule, density and alpha.

        Returns:
            What it came to. `self.graft` is then this graft.
        """
        folder = Path(self._folder.name) / f"{setting.selection}-{setting.density:.6g}-{setting.alpha}"
        if setting in self.points:
            self.graft = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
            return self.points[setting]
        started = time.perf_counter()
        options = GraftArguments(
            selection=setting.selection, density=setting.density, alpha=setting.alpha, seed=self.args.seed,
            output_dir=self._folder.name,
        )  # fmt: skip
        model = fit(copy.deepcopy(self.base), self.donor, self.tokenizer, self.train, self.calibration, options)
        seconds = time.perf_counter() - started
        model.save_pretrained(folder)
        shapes = {
            name: tuple(layer.base_parameter(param).shape)
            for name, (layer, param) in model.base_model.targets("default").items()
        }
        patch = Patch.load(folder / ADAPTER_FILES[1])
        self.graft = model
        self.points[setting] = Point(
            setting,
            self._score(self._predict(model), self._donor_logits),
            patch.num_params,
            sum((folder / name).stat().st_size for name in ADAPTER_FILES),
            float(model.peft_config["default"].alpha),
            seconds,
            locate(patch, shapes),
        )
        return self.points[setting]

    def curve(
        self, selection: str, alpha: str, densities: Sequence[float] = CURVE, progress: Progress = _silent
    ) -> Iterator[Point]:
        """Graft at several densities, then restore the current graft; densities that give no entry are skipped.

        Args:
            selection: Rule.
            alpha: As in `Setting`.
            densities: Densities, each in (0, 1].
            progress: Called before each density.

        Returns:
            An iterator that yields each point as soon as it is measured.
        """
        possible = [density for density in densities if round(density * self.eligible) >= 1]
        present = self.graft
        for turn, density in enumerate(possible):
            progress(turn / len(possible), f"{selection} at density {density:.0e}")
            yield self.run(Setting(selection, density, alpha))
        self.graft = present

    def recovery(self, score: str = "accuracy") -> Figure | None:
        """Draw all points so far, solid for a fitted alpha and dashed for alpha = 1; None before the first point."""
        points = [point for point in self.points.values() if point.setting.alpha in ("auto", "1")]
        densities = sorted({point.setting.density for point in points})
        curves: dict[str, dict[str, np.ndarray]] = {}
        for point in points:
            line = curves.setdefault(point.setting.selection, {})
            values = line.setdefault(point.setting.alpha, np.full(len(densities), np.nan))
            values[densities.index(point.setting.density)] = point.scores[score]
        ends = {name: self.scores[name][score] for name in ("base", "donor")}
        title = "How much of the donor a patch keeps"
        return density_recovery(densities, curves, **ends, ylabel=score, title=title) if curves else None

    def skill_map(self, point: Point) -> Figure:
        """Draw the entries of a patch by layer and module, in percent."""
        place = point.place
        title = f"Where the {point.entries:,} entries are"
        return skill_map(100 * place.share, place.layers, place.modules, label="percent of the patch", title=title)

    @torch.no_grad()
    def ask(self, text: str) -> dict[str, dict[str, float]]:
        """Ask base, donor and graft to classify a sentence.

        Args:
            text: The sentence.

        Returns:
            Probabilities by model and label; without the graft before the first one is made.

        Raises:
            ValueError: There is no text.
        """
        if not text.strip():
            raise ValueError("text must hold a sentence, got none. Type one.")
        encoded = self.tokenizer(text, truncation=True, max_length=64, return_tensors="pt").to(self.base.device)
        models = {"base": self.base, "donor": self.donor} | ({"graft": self.graft} if self.graft else {})
        probabilities = {name: model(**encoded).logits[0].float().softmax(-1) for name, model in models.items()}
        return {name: dict(zip(self.labels, values.tolist(), strict=True)) for name, values in probabilities.items()}

    def _predict(self, model: Any) -> torch.Tensor:
        logits, _ = tasks.predict(model, self.test, self.tokenizer)
        return logits

    def _score(self, logits: torch.Tensor, donor: torch.Tensor) -> dict[str, float]:
        decisions = {"predictions": logits.argmax(-1).tolist(), "references": donor.argmax(-1).tolist()}
        return tasks.measure(logits, torch.tensor(self.test["labels"])) | Agreement().compute(**decisions)


def table(explorer: Explorer, point: Point | None) -> str:
    """Return a Markdown table of base, donor and graft, and the size of the graft."""
    columns = ("accuracy", "f1", "ece", "loss", "agreement")
    scores = explorer.scores | ({"graft": point.scores} if point else {})
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{row[column]:.4f}" for column in columns) + " |" for name, row in scores.items()
    ]
    if point:
        lines += [
            "",
            f"**{point.entries:,}** of {explorer.eligible:,} entries, **{point.bytes / 1024:.1f} KiB** on disk, "
            f"alpha **{point.alpha:.3g}**, found in {point.seconds:.1f} s.",
        ]
    return "\n".join(lines)


def _rows_seen(demo: Path) -> int:
    """Return the number of rows of the training data that the demo's donor was trained on."""
    record = demo / "donor_metrics.json"
    return json.loads(record.read_text(encoding="utf-8"))["rows"]["train"] if record.is_file() else DONOR_ROWS
