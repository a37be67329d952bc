"""Show the bytes of a saved adapter, the place of its entries and its origin, without loading a model."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
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
from ..patch.packing import CODES, PACKED
from ..patch.patch import PatchError, parse_file_key

_Rows = Mapping[str, tuple[str, Sequence[int]]]

# The fields of the configuration that say how an adapter was made, in the order in which they are shown.
ORIGIN_FIELDS = (
    "base_model_name_or_path",
    "revision",
    "base_subfolder",
    "base_model_type",
    "task_type",
    "donor",
    "donor_revision",
    "donor_subfolder",
    "selection",
    "budget_scope",
    "granularity",
    "density",
    "num_params",
    "alpha",
    "seed",
    "provenance",
)


@dataclass(frozen=True, eq=False)
class InspectResult:
    """Contents and origin of a saved adapter.

    Attributes:
        source: Directory or Hub id.
        nbytes: Bytes of the tensors' file by purpose: "header", "table" (of the patched tensors), "indices", "scales"
            (of coded values), "values", "modules_to_save" (stored whole) and "training" (logits of a mask in training).
            They add up to the size of the file.
        entries: Number of entries of the patch.
        eligible: Number of entries that the budget is a share of, None if it is not on record.
        tensors: Number of patched tensors.
        values: Number of tensors by the dtype or the code of their values.
        codecs: Number of tensors by the code of their indices.
        place: Entries by layer and kind of module.
        origin: The fields of the configuration that say how the adapter was made.
        fingerprint: Fingerprint of the base, without its samples.
    """

    source: str
    nbytes: dict[str, int]
    entries: int
    eligible: int | None
    tensors: int
    values: dict[str, int]
    codecs: dict[str, int]
    place: Place
    origin: dict[str, Any]
    fingerprint: dict[str, Any]

    @property
    def bytes_per_entry(self) -> float:
        """Bytes of the file per entry of the patch, with header and indices, without modules stored whole."""
        whole = self.nbytes["modules_to_save"] + self.nbytes["training"]
        return (sum(self.nbytes.values()) - whole) / max(self.entries, 1)

    def by_layer(self) -> dict[str, int]:
        """Return the number of entries by layer, from the first to the last; entries outside of layers come last."""
        return dict(zip(self.place.layers, _sums(self.place.counts, 1), strict=True))

    def by_module(self) -> dict[str, int]:
        """Return the number of entries by kind of module."""
        return dict(zip(self.place.modules, _sums(self.place.counts, 0), strict=True))

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON; `cells` has the entries by layer and, in each layer, by kind of module."""
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
            "values": self.values,
            "codecs": self.codecs,
            "by_layer": self.by_layer(),
            "by_module": self.by_module(),
            "cells": cells,
            "fingerprint": self.fingerprint,
            **self.origin,
        }


def inspect(
    adapter: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> InspectResult:
    """Read the contents and the origin of a saved adapter from its configuration and the header of its tensors' file.

    Args:
        adapter: Directory of the adapter, or a Hub id, of which only the adapter's two files are fetched.
        revision: Branch, tag or commit of an adapter on the Hub.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.

    Returns:
        Bytes, entries and origin.

    Raises:
        PatchError: `adapter` holds no graft, or its file is malformed.
        OSError: The directory does not exist, or the repository cannot be read.
    """
    directory = fetch_adapter(adapter, revision, token)
    saved = read_saved(directory)
    if saved is None:
        raise PatchError(
            f"adapter must be a directory or repository with a graft's {CONFIG_FILE} and {WEIGHTS_FILE}, got "
            f"{os.fspath(adapter)!r}. Write one with model.save_pretrained or peft-graft extract."
        )
    weights = directory / WEIGHTS_FILE
    file = CheckpointDonor(weights, role="adapter")
    extents = {name: file.extent(name) for name in file.names()}
    counts = {name: torch.empty(count, device="meta") for name, count in saved.counts.items()}
    fields = {**saved.config, **saved.record}
    fingerprint = fields.get("fingerprint") or {}
    return InspectResult(
        source=os.fspath(adapter),
        nbytes=_count_bytes(extents, weights.stat().st_size, saved.rows),
        entries=sum(saved.counts.values()),
        eligible=fields.get("eligible"),
        tensors=len(saved.counts),
        values=_count_values(extents, saved.rows),
        codecs=_count_codecs(weights, _find_indices(extents, saved.rows)),
        place=locate(counts),
        origin={key: fields.get(key) for key in ORIGIN_FIELDS},
        fingerprint={key: fingerprint[key] for key in ("dtype", "sha256", "count") if key in fingerprint},
    )


def _kind(key: str) -> str | None:
    parsed = parse_file_key(key)
    return None if parsed is None else parsed[2]


def _count_bytes(extents: dict[str, Extent], file_size: int, rows: _Rows) -> dict[str, int]:
    """Return the bytes by purpose. Tensors follow each other without gaps, so each ends where the next one begins."""
    ordered = sorted(extents, key=lambda key: (extents[key].offset, key))
    ends = [*(extents[key].offset for key in ordered[1:]), file_size]
    found = {"header": extents[ordered[0]].offset if ordered else file_size}
    found |= dict.fromkeys(("table", "indices", "scales", "values", "steps", "modules_to_save", "training"), 0)
    for code, row in rows.values():
        for purpose, size in CODES[code].sections(row).items():
            found[purpose] += size
    for key, end in zip(ordered, ends, strict=True):
        kind = _kind(key)
        if kind == PACKED:
            continue
        purpose = "modules_to_save" if kind is None else kind if kind in found else "training"
        found[purpose] += end - extents[key].offset
    return found


def _count_values(extents: dict[str, Extent], rows: _Rows) -> dict[str, int]:
    """Return the number of tensors by the dtype or the code of their values."""
    apart = [_dtype_name(extents[key]) for key in extents if _kind(key) == "values"]
    return dict(Counter([*(CODES[code].name for code, _ in rows.values()), *apart]))


def _find_indices(extents: dict[str, Extent], rows: _Rows) -> list[int]:
    """Return where the coded indices of each tensor begin in the file."""
    starts = [extents[key].offset for key in extents if _kind(key) == "indices"]
    at = next((extents[key].offset for key in extents if _kind(key) == PACKED), 0)
    for code, row in rows.values():
        sections = CODES[code].sections(row)
        if "indices" in sections:
            starts.append(at)
        at += sum(sections.values())
    return starts


def _count_codecs(weights: Path, starts: list[int]) -> dict[str, int]:
    with weights.open("rb") as file:
        names: Counter[str] = Counter()
        for start in starts:
            file.seek(start)
            tag = file.read(1)
            names[CODECS.get(tag[0], "unknown") if tag else "unknown"] += 1
    return dict(names)


def _dtype_name(extent: Extent) -> str:
    return str(extent.dtype).removeprefix("torch.")


def _sums(counts: np.ndarray[Any, np.dtype[np.float64]], axis: int) -> list[int]:
    return [int(total) for total in np.nansum(counts, axis=axis)]
