"""What tests of saved adapters and their cards share: saving a tiny one, scores, and the facts that a card states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from grafts import graft
from models import perturbed, tiny_bert

METRICS = {
    "base": {"accuracy": 0.5, "f1": 0.25, "ece": 0.125, "agreement": 0.5625, "loss": 1.0},
    "donor": {"accuracy": 0.9375, "f1": 0.875, "ece": 0.0625, "agreement": 1.0, "forgotten": 0.03125},
    "graft": {"accuracy": 0.90625, "f1": 0.84375, "ece": 0.09375, "agreement": 0.96875, "forgotten": 0.015625},
    "data": {"train": "/home/me/train.jsonl", "validation": "org/data"},
    "rows": {"train": 512, "calibration": 64, "validation": 1024},
    "note": "Another split.",
}


def save(directory: Path, density: float = 0.05, name: str | None = "org/base", **options: Any) -> Path:
    """Save a graft of a tiny classifier, and return the path of its card."""
    base = tiny_bert(num_labels=3)
    base.config.name_or_path = name or ""
    base.name_or_path = name
    model = graft(base, perturbed(base), density=density, task_type="SEQ_CLS", **options)
    model.save_pretrained(directory, save_embedding_layers=False)  # org/base cannot be asked for its vocabulary
    return directory / "README.md"


def facts(text: str) -> dict[str, str]:
    """Return the rows of the tables of a card."""
    return dict(re.findall(r"^\| ([\w ]+) \| (.*) \|$", text, flags=re.M))
