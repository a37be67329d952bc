"""What a saved adapter is made of: its bytes, where its entries are, and where it comes from; no model is loaded."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adapter_files.hub_names import CONFIG_FILE
from ..adapter_files.summary import WEIGHTS_FILE, fetch_adapter, read_saved
from ..analysis.localization import Place, locate
from ..checkpoints.donor import CheckpointDonor, Extent
from ..patch.index_codec import CODECS
from ..patch.patch import PatchError, parse_file_key
from .format import size, table

_ORIGIN = (
    "base_model_name_or_path",
    "revision",
    "base_model_type",
    "task_type",
    "donor",
    "donor_revision",
    "selection",
    "scope",
    "granularity",
    "density",
    "num_params",
    "alpha",
    "seed",
    "provenance",
)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What a saved adapter is made of.

    Attributes:
        source: Directory or Hub id.
        nbytes: Bytes of the tensors' file: "header", "indices", "values", "heads" (modules stored whole) and "training"
            (logits of a mask in training); they add up to the size of the file.
        entries: Entries of the patch.
        eligible: Entries that might have been taken, None where that is not on record.
        tensors: Patched tensors.
        dtypes: How many tensors have values of which dtype.
        codecs: How many tensors have their indices coded in which way.
        place: Entries by layer and kind of module.
        origin: The fields of the configuration that say how the adapter was made.
        fingerprint: The base's fingerprint, without its samples.
    """

    source: str
    nbytes: dict[str, int]
    entries: int
    eligible: int | None
    tensors: int
    dtypes: dict[str, int]
    codecs: dict[str, int]
    place: Place
    origin: dict[str, Any]
    fingerprint: dict[str, Any]

    @property
    def bytes_per_entry(self) -> float:
        """Bytes for each entry, the header and the indices included, modules stored whole not."""
        whole = self.nbytes["heads"] + self.nbytes["training"]
        return (sum(self.nbytes.values()) - whole) / max(self.entries, 1)

    def by_layer(self) -> dict[str, int]:
        """Return entries by layer, from the first to the last, and at the end of what is in none."""
        return dict(zip(self.place.layers, _sums(self.place.counts, 1), strict=True))

    def by_module(self) -> dict[str, int]:
        """Return entries by kind of module."""
        return dict(zip(self.place.modules, _sums(self.place.counts, 0), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON; `cells` has the entries by layer and, in each, by kind of module."""
        cells = {
            layer: {
                module: int(count) for module, count in zip(self.place.modules, row, strict=True) if not np.isnan(count)
            }
            for layer, row in zip(self.place.layers, self.place.counts, strict=True)
        }
        return {
            "source": self.source,
            "bytes": {**self.nbytes, "file": sum(self.nbytes.values())},
            "bytes_per_entry": self.bytes_per_entry,
            "entries": self.entries,
            "eligible": self.eligible,
            "tensors": self.tensors,
            "dtypes": self.dtypes,
            "codecs": self.codecs,
            "by_layer": self.by_layer(),
            "by_module": self.by_module(),
            "cells": cells,
            "fingerprint": self.fingerprint,
            **self.origin,
        }

    def to_text(self) -> str:
        """Return everything that a person wants to see at once."""
        total = sum(self.nbytes.values())
        whole = " without the heads" if self.nbytes["heads"] else ""
        share = f", 1 in {self.eligible / self.entries:,.0f} of {self.eligible:,}" if self.eligible else ""
        facts = [
            ("adapter", self.source),
            ("entries", f"{self.entries:,} in {self.tensors} tensors{share}"),
            ("bytes", f"{size(total)}, {self.bytes_per_entry:.2f} an entry{whole}"),
            ("values", _counted(self.dtypes)),
            ("indices", _counted(self.codecs)),
            *((key, _short(value)) for key, value in self.origin.items() if value is not None),
            ("fingerprint", _short(self.fingerprint)),
        ]
        parts = [
            "\n".join(f"{key:<24} {value}" for key, value in facts),
            table(
                ("bytes of", "bytes", "share", "an entry"),
                [
                    (part, f"{count:,}", f"{count / total:.1%}", f"{count / max(self.entries, 1):.2f}")
                    for part, count in self.nbytes.items()
                    if count
                ],
            ),
            _counts("layer", self.by_layer(), self.entries),
            _counts("module", self.by_module(), self.entries),
        ]
        return "\n\n".join(parts)


def read_anatomy(source: str | os.PathLike[str], revision: str | None = None) -> Anatomy:
    """Look into a saved adapter. Only the headers of its tensors are read, and none of its values.

    Args:
        source: An adapter's directory, or a Hub id, of which only the adapter's two files are fetched.
        revision: Branch, tag or commit of a Hub id.

    Returns:
        What it is made of.

    Raises:
        PatchError: There is no graft at `source`, or its file is malformed.
        OSError: The repository cannot be read.
    """
    directory = fetch_adapter(source, revision)
    saved = read_saved(directory)
    if saved is None:
        raise PatchError(
            f"adapter must be a directory or repository with a graft's {CONFIG_FILE} and {WEIGHTS_FILE}, got "
            f"{os.fspath(source)!r}. Write one with model.save_pretrained or peft-graft extract."
        )
    weights = directory / WEIGHTS_FILE
    file = CheckpointDonor(weights, role="adapter")
    extents = {name: file.extent(name) for name in file.names()}
    counts = {name: torch.empty(count, device="meta") for name, count in saved.counts.items()}
    fingerprint = saved.config.get("fingerprint") or {}
    return Anatomy(
        os.fspath(source),
        _bytes(extents, weights.stat().st_size),
        sum(saved.counts.values()),
        saved.config.get("eligible"),
        len(saved.counts),
        dict(Counter(_dtype(extents[key]) for key in extents if _kind(key) == "values")),
        _codecs(weights, [extents[key] for key in extents if _kind(key) == "indices"]),
        locate(counts),
        {key: saved.config.get(key) for key in _ORIGIN},
        {key: fingerprint[key] for key in ("dtype", "sha256", "count") if key in fingerprint},
    )


def _kind(key: str) -> str | None:
    parsed = parse_file_key(key)
    return None if parsed is None else parsed[2]


def _bytes(extents: dict[str, Extent], whole: int) -> dict[str, int]:
    """Bytes by purpose. Tensors follow each other without gaps, so each ends where the next one begins."""
    ordered = sorted(extents, key=lambda key: (extents[key].offset, key))
    ends = [*(extents[key].offset for key in ordered[1:]), whole]
    found = {"header": extents[ordered[0]].offset if ordered else whole}
    found |= dict.fromkeys(("indices", "values", "heads", "training"), 0)
    for key, end in zip(ordered, ends, strict=True):
        kind = _kind(key)
        purpose = "heads" if kind is None else kind if kind in found else "training"
        found[purpose] += end - extents[key].offset
    return found


def _codecs(weights: Path, extents: list[Extent]) -> dict[str, int]:
    with weights.open("rb") as file:
        names: Counter[str] = Counter()
        for extent in extents:
            file.seek(extent.offset)
            tag = file.read(1)
            names[CODECS.get(tag[0], "unknown") if tag else "unknown"] += 1
    return dict(names)


def _dtype(extent: Extent) -> str:
    return str(extent.dtype).removeprefix("torch.")


def _sums(counts: np.ndarray[Any, np.dtype[np.float64]], axis: int) -> list[int]:
    return [int(total) for total in np.nansum(counts, axis=axis)]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in sorted(counts.items())) or "none"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _counts(what: str, counts: dict[str, int], entries: int) -> str:
    rows = [(name, f"{count:,}", f"{count / max(entries, 1):.1%}") for name, count in counts.items()]
    return table((what, "entries", "share"), rows)
