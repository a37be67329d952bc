"""A tiny base and donor with files of rows, made once for all tests of the examples, the benchmarks and the pages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

WORDS = ["good", "fine", "great", "bad", "poor", "awful", "film", "plot", "music", "the", "a", "was", "is", "very"]


def write_rows(path: Path, count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for _ in range(count):
        label = int(torch.randint(2, (), generator=generator))
        word = WORDS[label * 3 + int(torch.randint(3, (), generator=generator))]
        rest = [WORDS[int(i)] for i in torch.randint(6, len(WORDS), (4,), generator=generator)]
        lines.append(json.dumps({"sentence": " ".join([*rest, word]), "label": ["worse", "better"][1 - label]}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


_MADE: list[dict[str, str]] = []  # made once, for all modules that import the fixture


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    if not _MADE:
        _MADE.append(make_world(tmp_path_factory.mktemp("world")))
    return dict(_MADE[0])


def make_world(root: Path) -> dict[str, str]:
    """Make a base, a donor and their data, and return the paths."""
    # Imported here, because every run of the tests imports this plugin.
    from transformers import BertTokenizer

    from make_donor import DonorArguments, make_donor
    from models import VOCAB_SIZE, tiny_bert

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    vocabulary += [f"[unused{i}]" for i in range(VOCAB_SIZE - len(vocabulary))]
    (root / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    (root / "model").mkdir()
    BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "model")
    tiny_bert().save_pretrained(root / "model")
    paths = {name: write_rows(root / f"{name}.jsonl", count, seed) for name, count, seed in
             (("train", 160, 0), ("validation", 48, 1))}  # fmt: skip
    made = make_donor(
        DonorArguments(
            base=str(root / "model"),
            **paths,
            max_train_samples=64,
            optimizer="adamw",
            learning_rate=5e-3,
            epochs=30,
            batch_size=16,
            output_dir=str(root / "made"),
        )  # fmt: skip
    )
    assert made["donor"]["loss"] < made["base"]["loss"]
    return {"base": str(root / "made" / "base"), "donor": str(root / "made" / "donor"), **paths}
