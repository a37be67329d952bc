"""Find a saved adapter and read the facts about it, each file at most once."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..patch.packing import TABLE, read_table
from ..patch.patch import PEFT_PREFIX, Patch, PatchError, parse_file_key
from .hub_names import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
RECORDED = ("base_model_type", "eligible", "entries", "fingerprint", "provenance")
_RENAMED = {"scope": "budget_scope", "candidates": "candidate_ratio"}  # since 0.1.0

_HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


class SavedAdapter:
    """A graft in a directory, as `read_saved` returns it.

    The configuration, the header of the tensors and the table of a packed patch are read at once. The patch and the
    hash of the file are read when they are first needed, and kept: pass this object on instead of reading the directory
    again.

    Args:
        directory: The directory, which holds the two files of an adapter.
        config: Fields of `adapter_config.json`.

    Attributes:
        directory: The directory.
        config: Fields of `adapter_config.json`.
        config_bytes: Size of `adapter_config.json`.
        tensors_bytes: Size of `adapter_model.safetensors`.
        counts: Number of patched entries by tensor name.
        rows: Code of the values and row of the table by tensor name, of a packed patch.
        modules_to_save_bytes: Bytes of the modules stored whole (task heads), by the module's name.
        hub_ids: Hub ids on record by the names of models; a copy of the adapter keeps them.
        num_labels: Number of classes of the stored task head, None if there is none.
        in_training: Whether this is a checkpoint of a mask in training, which holds candidates and no finished patch.

    Raises:
        PatchError: The file of the tensors is not whole safetensors, or its table is malformed.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        self.directory, self.config = directory, config
        self.config_bytes, self.tensors_bytes = (
            (directory / name).stat().st_size for name in (CONFIG_FILE, WEIGHTS_FILE)
        )
        self.counts: dict[str, int] = {}
        self.rows: dict[str, tuple[str, list[int]]] = {}
        self.modules_to_save_bytes: dict[str, int] = {}
        self.hub_ids: Mapping[str, str | None] = self.record.get("hub_ids") or {}
        self.num_labels: int | None = None
        self.in_training = False
        self._read_header()

    @property
    def record(self) -> Mapping[str, Any]:
        """The recorded results of the configuration, as far as there are any."""
        return self.config.get("record") or {}

    def load_patch(self) -> Patch:
        """Return the patch, which is read and validated by the first call.

        Raises:
            PatchError: The patch is malformed.
        """
        return self._patch

    def load_modules_to_save(self) -> dict[str, torch.Tensor]:
        """Return the tensors of the modules stored whole, by their name in the model.

        Where the vocabulary was resized, PEFT also stores the insides of its wrappers, which are left out here.
        """
        with safe_open(self.directory / WEIGHTS_FILE, framework="pt") as file:
            keys = [key for key in file.keys() if parse_file_key(key) is None]  # noqa: SIM118 - not a mapping
            keys = [key for key in keys if not {"original_module", "modules_to_save"} & {*key.split(".")}]
            return {key.removeprefix(PEFT_PREFIX): file.get_tensor(key) for key in keys}

    @property
    def content_hash(self) -> str:
        """Hash of the tensors and of alpha, 16 hex digits. Adapters of one base that share it compute the same."""
        digest = hashlib.sha256(json.dumps(self.config.get("alpha"), sort_keys=True).encode())
        digest.update(self._tensors_digest)
        return digest.hexdigest()[:16]

    def copied_to(self, directory: str | os.PathLike[str]) -> SavedAdapter:
        """Return this adapter as it stands in a copy of its directory, reading only the configuration again.

        Args:
            directory: A directory with the same tensors. Its configuration may differ.
        """
        copied = copy.copy(self)
        copied.directory = Path(directory)
        copied.config = _read_config(copied.directory)
        copied.config_bytes = (copied.directory / CONFIG_FILE).stat().st_size
        return copied

    @cached_property
    def _patch(self) -> Patch:
        return Patch.load(self.directory / WEIGHTS_FILE)

    @cached_property
    def _tensors_digest(self) -> bytes:
        with (self.directory / WEIGHTS_FILE).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()

    def _read_header(self) -> None:
        weights = self.directory / WEIGHTS_FILE
        try:
            with safe_open(weights, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                    if (parse_file_key(key) or [None])[-1] == TABLE:
                        self.rows = read_table(file.get_tensor(key))
                        self.counts |= {name: row[0] for name, (_, row) in self.rows.items()}
                        continue
                    part = file.get_slice(key)
                    self._count(key, part.get_shape(), part.get_dtype())
        except SafetensorError as error:
            raise PatchError(
                f"adapter file must be whole safetensors, got {str(weights)!r} ({error}). Save or download it again."
            ) from error

    def _count(self, key: str, shape: list[int], dtype: str) -> None:
        parsed = parse_file_key(key)
        if parsed is None:
            name = key.removeprefix(PEFT_PREFIX).rpartition(".")[0]
            nbytes = math.prod(shape) * _ITEMSIZE.get(dtype, 1)
            self.modules_to_save_bytes[name] = self.modules_to_save_bytes.get(name, 0) + nbytes
            if _HEAD.search(key) and len(shape) == 2:
                self.num_labels = shape[0]
        elif parsed[2] == "values":
            self.counts[".".join(part for part in parsed[:2] if part)] = shape[0]
        elif parsed[2] == "logits":
            self.in_training = True


def read_saved(directory: str | os.PathLike[str]) -> SavedAdapter | None:
    """Read a saved adapter: its configuration and the header of its tensors.

    Args:
        directory: The adapter's directory.

    Returns:
        The adapter, or None if the directory does not hold both files of a graft.

    Raises:
        PatchError: The file of the tensors is not whole safetensors, or the configuration is not JSON.
    """
    path = Path(directory)
    if not (path / CONFIG_FILE).is_file() or not (path / WEIGHTS_FILE).is_file():
        return None
    config = _read_config(path)
    return SavedAdapter(path, config) if config.get("peft_type") == "GRAFT" else None


def current_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an `adapter_config.json` under today's names.

    Args:
        fields: Fields as today's versions write them, which stay as they are, or as 0.1.0 did: all recorded results
            stood beside the choices, two of which had other names.

    Returns:
        The fields, with the results in the block "record".
    """
    if "provenance" not in fields:
        return dict(fields)
    choices = {_RENAMED.get(name, name): value for name, value in fields.items() if name not in RECORDED}
    return choices | {"record": {name: fields[name] for name in RECORDED if name in fields}}


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchError(
            f"adapter config must be JSON, got {str(path)!r} ({error}). Save or download it again."
        ) from error
    return current_fields(config) if isinstance(config, dict) else {}


def fetch_adapter(source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the directory of a saved adapter, after downloading its two files if it is on the Hub.

    Args:
        source: Directory or Hub id of the adapter.
        revision: Branch, tag or commit of a Hub id.
        token: Token for the Hub.

    Raises:
        PatchError: The repository does not hold the two files.
        OSError: The directory does not exist, or the repository cannot be read.
    """
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, os.PathLike) or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(
            f"adapter must be an existing directory or a Hub id, got {os.fspath(source)!r}. Hub ids have no leading "
            "slash or dot."
        )
    files = [CONFIG_FILE, WEIGHTS_FILE]
    try:
        directory = Path(snapshot_download(source, revision=revision, allow_patterns=files, token=token))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"adapter must be a directory, or a Hub id that can be reached or is cached, got {source!r}. "
            "A private repository needs a token: run `hf auth login`."
        ) from error
    if not all((directory / name).is_file() for name in files):
        raise PatchError(
            f"adapter repository must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got {source!r} without. "
            "The files of a PEFT adapter stand at the top of its repository."
        )
    return directory
