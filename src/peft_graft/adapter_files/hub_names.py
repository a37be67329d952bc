"""Names that others can follow: what a published adapter may call its base and its donor."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

CONFIG_FILE = "adapter_config.json"


def is_path(name: str) -> bool:
    """Whether a name can only be a path: absolute on any system, or beginning with `.` or `~`, or with a backslash."""
    return os.path.isabs(name) or PureWindowsPath(name).is_absolute() or name.startswith((".", "~")) or "\\" in name


def public_name(name: str | os.PathLike[str] | None) -> str | None:
    """Return a name if it means the same to everybody: a Hub id, not a file or directory of this machine.

    Args:
        name: What a model was loaded from.

    Returns:
        The name, or None.
    """
    if not name or isinstance(name, os.PathLike) or is_path(name) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def recorded_name(directory: str | os.PathLike[str]) -> str | None:
    """Return the Hub id that the configuration in a model's directory gives as its origin, None where it gives none."""
    try:
        fields = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = fields.get("_name_or_path") if isinstance(fields, dict) else None
    return public_name(name) if isinstance(name, str) else None


def public_base(name: str | None) -> str | None:
    """Return the public name of a base, which a local directory may have on record."""
    return public_name(name) or (recorded_name(name) if name else None)


def cached_commit(name: str | None, revision: str | None) -> str | None:
    """Return the commit that a model of the Hub was loaded at, as far as the cache can tell.

    A loaded model does not say its commit. A revision that was asked for leads to it; without one it is certain only
    where the cache holds a single commit.

    Args:
        name: What the model was loaded from.
        revision: Branch, tag or commit that was asked for, None if unknown.

    Returns:
        The commit, or `revision` as it is.
    """
    if name is None or public_name(name) is None:
        return revision
    if revision is not None:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(path).parent.name if isinstance(path, str) else revision
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None


def make_public(directory: str | os.PathLike[str]) -> None:
    """Take this machine's paths out of a saved adapter's configuration, before it is published.

    A base in a local directory gets the name on record there, or none; a donor in a local directory gets none, as its
    record names what it was fine-tuned from. Nothing is guessed.

    Args:
        directory: An adapter's directory; `adapter_config.json` in it is replaced at once or not at all.

    Warns:
        UserWarning: The base has no public name, or another one than was used here.
    """
    path = Path(directory) / CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    base, donor = fields.get("base_model_name_or_path"), fields.get("donor")
    clean = {name: _without_paths(value) if name == "provenance" else value for name, value in fields.items()}
    if base and not public_name(base):
        found = public_base(base)
        # A revision belongs to the name that it was given with.
        clean |= {"base_model_name_or_path": found, "revision": None}
        become = f"published as {found!r}, the name on record there" if found else "published without the base's name"
        warnings.warn(
            f"base_model_name_or_path should be the id of a Hub repository, got the local {base!r}; {become}. "
            "Set it in model.peft_config[...] or adapter_config.json to let others find the base.",
            stacklevel=3,
        )
    if donor and donor != "zeros" and not public_name(donor):
        clean |= {"donor": None, "donor_revision": None}
    if clean != fields:
        replace_text(path, json.dumps(clean, indent=2, sort_keys=True))


def replace_text(path: Path, text: str) -> None:
    """Write a text file at once or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        # The donors of a combined graft: a relative path looks like the id of a repository.
        local = isinstance(value.get("donor"), str) and value["donor"] != "zeros" and not public_name(value["donor"])
        clean = {key: _without_paths(part) for key, part in value.items()}
        return clean | {"donor": None, "donor_revision": None} if local else clean
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    return None if isinstance(value, str) and is_path(value) else value
