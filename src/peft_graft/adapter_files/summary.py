"""What stands in an adapter's directory: the facts that a card and a push look at, without the patch's values."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from ..patch.patch import PatchError, parse_file_key
from .hub_names import CONFIG_FILE

WEIGHTS_FILE = "adapter_model.safetensors"
PACKAGES = ("peft-graft", "peft", "transformers", "torch")

_HEAD = re.compile(r"(^|\.)(classifier|score)(\.out_proj)?\.weight$")
_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Saved:
    """What stands in an adapter's directory, without its values.

    Attributes:
        config: Fields of `adapter_config.json`.
        counts: Entries by tensor name.
        whole: Bytes of what is stored whole (task heads), by the module's name.
        sizes: Bytes of the two files.
        stamp: Names the adapter: a hash of its tensors and of alpha.
        num_labels: Rows of the stored task head, None where there is none.
        in_training: Whether it is a checkpoint of a mask in training, which holds candidates instead of a patch.
    """

    config: Mapping[str, Any]
    counts: Mapping[str, int]
    whole: Mapping[str, int]
    sizes: tuple[int, int]
    stamp: str
    num_labels: int | None
    in_training: bool


def read_saved(directory: str | os.PathLike[str]) -> Saved | None:
    """Read what a card tells about a saved adapter; None if the directory does not hold a whole graft.

    Raises:
        PatchError: The file of the tensors is not whole safetensors, or the configuration is not JSON.
    """
    path = Path(directory)
    config_file, weights = path / CONFIG_FILE, path / WEIGHTS_FILE
    if not config_file.is_file() or not weights.is_file():
        return None
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PatchError(
            f"adapter config must be JSON, got {str(config_file)!r} ({error}). Save or download it again."
        ) from error
    if not isinstance(config, dict) or config.get("peft_type") != "GRAFT":
        return None
    counts: dict[str, int] = {}
    whole: dict[str, int] = {}
    labels, in_training = None, False
    try:
        with safe_open(weights, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle, not a mapping
                parsed, part = parse_file_key(key), file.get_slice(key)
                shape = part.get_shape()
                if parsed is None:
                    name = key.removeprefix("base_model.model.").rpartition(".")[0]
                    whole[name] = whole.get(name, 0) + math.prod(shape) * _ITEMSIZE.get(part.get_dtype(), 1)
                    labels = shape[0] if _HEAD.search(key) and len(shape) == 2 else labels
                elif parsed[2] == "values":
                    counts[".".join(piece for piece in parsed[:2] if piece)] = shape[0]
                else:
                    in_training |= parsed[2] == "logits"
    except SafetensorError as error:
        raise PatchError(
            f"adapter file must be whole safetensors, got {str(weights)!r} ({error}). Save or download it again."
        ) from error
    digest = hashlib.sha256(json.dumps(config.get("alpha"), sort_keys=True).encode())
    with weights.open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    sizes = (weights.stat().st_size, config_file.stat().st_size)
    return Saved(config, counts, whole, sizes, digest.hexdigest()[:16], labels, in_training)


def fetch_adapter(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the directory of an adapter; of a Hub id, after its two files have been fetched.

    Raises:
        PatchError: The repository has no such files.
        OSError: There is no such directory, or the repository cannot be read.
    """
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, os.PathLike) or path.is_absolute() or source.startswith("."):
        raise FileNotFoundError(
            f"adapter must be a directory, or a Hub id, got {os.fspath(source)!r}, which is not there. Check the path."
        )
    try:
        config = Path(hf_hub_download(source, CONFIG_FILE, revision=revision))
        # Both of one commit, which is what the cache's directory is named after.
        return Path(hf_hub_download(source, WEIGHTS_FILE, revision=config.parent.name)).parent
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"adapter must be a directory, or a Hub id that can be reached or is cached, got {source!r}. "
            "Check the spelling and the network."
        ) from error
    except EntryNotFoundError as error:
        raise PatchError(
            f"adapter repository must hold {CONFIG_FILE} and {WEIGHTS_FILE}, got {source!r} without. "
            "Check that it is a PEFT adapter."
        ) from error


def installed_versions() -> dict[str, str]:
    """Return the versions of what makes a patch, as far as they are installed as packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
