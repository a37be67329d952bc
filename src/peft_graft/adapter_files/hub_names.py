"""Tell Hub ids from local paths, and keep local paths out of what is published."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..patch.atomic import atomic_file
from ..peft_compat.huggingface_hub_names import repo_folder_name

CONFIG_FILE = "adapter_config.json"
_NO_DONOR = {"donor": None, "donor_revision": None, "donor_subfolder": None}


def is_path(name: str) -> bool:
    """Return whether a name can only be a path: absolute on any system, with a leading `.` or `~`, or a backslash."""
    return os.path.isabs(name) or PureWindowsPath(name).is_absolute() or name.startswith((".", "~")) or "\\" in name


def find_hub_ids(
    names: Iterable[str | os.PathLike[str] | None], known: Mapping[str, str | None] | None = None
) -> dict[str, str | None]:
    """Decide which names of models are Hub ids, for the record of an adapter that is being made from these models.

    Later, from another working directory, a relative path such as `models/base` could not be told from a Hub id.

    Args:
        names: Names or paths that models were loaded from; None is left out.
        known: Decisions made before, which are kept.

    Returns:
        Hub id by name: the name itself if it is one; for a path the id that the model's directory records, or None.
    """
    found = {os.fspath(name): public_name(name) or recorded_name(name) for name in names if name}
    return {**found, **(known or {})}


def public_name(name: str | os.PathLike[str] | None, hub_ids: Mapping[str, str | None] | None = None) -> str | None:
    """Return a name if it is a Hub id, which everybody can follow, and not a path of this machine.

    Args:
        name: Name or path that a model was loaded from.
        hub_ids: Decisions on record, from `find_hub_ids`. A name without one is judged by how it looks here and now.

    Returns:
        The name, or None if it is a path, an existing file or directory, or no valid id.
    """
    if hub_ids and isinstance(name, str) and name in hub_ids:
        return name if hub_ids[name] == name else None
    if not name or isinstance(name, os.PathLike) or is_path(name) or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def recorded_name(directory: str | os.PathLike[str]) -> str | None:
    """Return the Hub id that `config.json` in a model's directory records as its origin, None if there is none."""
    try:
        fields = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = fields.get("_name_or_path") if isinstance(fields, dict) else None
    return public_name(name) if isinstance(name, str) else None


def public_base(name: str | None, hub_ids: Mapping[str, str | None] | None = None) -> str | None:
    """Return the Hub id of a base: the one on record, or else its name, or the id that its local directory records."""
    if hub_ids and name is not None and name in hub_ids:
        return hub_ids[name]
    return public_name(name) or (recorded_name(name) if name else None)


def cached_commit(name: str | None, revision: str | None) -> str | None:
    """Return the commit that a model of the Hub was loaded at, if the cache can tell.

    A loaded model does not record its commit. The cache resolves the revision that was asked for; without a revision
    the commit is certain only if the cache holds a single one.

    Args:
        name: Name or path that the model was loaded from.
        revision: Branch, tag or commit that was asked for, None if unknown.

    Returns:
        The commit, or `revision` as it was given.
    """
    if name is None or public_name(name) is None:
        return revision
    if revision is not None:
        path = try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(path).parent.name if isinstance(path, str) else revision
    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    commits = [path.name for path in snapshots.iterdir()] if snapshots.is_dir() else []
    return commits[0] if len(commits) == 1 else None


def strip_local_paths(directory: str | os.PathLike[str]) -> None:
    """Remove local paths from the configuration of a saved adapter, before it is published.

    The path of a base is replaced by the Hub id that its directory records, or removed. The path of a donor is removed:
    the id that its directory records is that of the model it was fine-tuned from.

    Args:
        directory: The adapter's directory, whose `adapter_config.json` is rewritten if it holds such paths.

    Warns:
        UserWarning: The base was given by its path, so that its published name is another one or none.
    """
    path = Path(directory) / CONFIG_FILE
    fields = json.loads(path.read_text(encoding="utf-8"))
    base, donor = fields.get("base_model_name_or_path"), fields.get("donor")
    record = fields["record"] if isinstance(fields.get("record"), dict) else {}
    hub_ids = record.get("hub_ids") or {}
    clean = _clean_provenance(fields, hub_ids)
    if record:
        clean["record"] = _clean_provenance(record, hub_ids)
    if hub_ids:
        clean["record"]["hub_ids"] = {found: found for found in hub_ids.values() if found}
    if base and not public_name(base, hub_ids):
        found = public_base(base, hub_ids)
        # The revision belongs to the name that it was given with.
        clean |= {"base_model_name_or_path": found, "revision": None}
        published = f"published as {found!r}, the id recorded there" if found else "published without the base's name"
        warnings.warn(
            f"base_model_name_or_path should be the id of a Hub repository, got the local {base!r}; it is {published}. "
            "Set the id in model.peft_config[...] or adapter_config.json, so that others find the base.",
            stacklevel=3,
        )
    if donor and donor != "zeros" and not public_name(donor, hub_ids):
        clean |= _NO_DONOR
    if clean != fields:
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(clean, indent=2, sort_keys=True), encoding="utf-8", newline="")


def _clean_provenance(fields: Mapping[str, Any], hub_ids: Mapping[str, str | None]) -> dict[str, Any]:
    # No other field: in the base64 of a fingerprint, a leading slash means nothing.
    return {name: _without_paths(value, hub_ids) if name == "provenance" else value for name, value in fields.items()}


def _without_paths(value: Any, hub_ids: Mapping[str, str | None]) -> Any:
    if isinstance(value, Mapping):
        # A donor of a combined graft may be a relative path, which looks like a Hub id.
        donor = value.get("donor")
        local = isinstance(donor, str) and donor != "zeros" and not public_name(donor, hub_ids)
        clean = {key: _without_paths(part, hub_ids) for key, part in value.items()}
        return clean | _NO_DONOR if local else clean
    if isinstance(value, list):
        return [_without_paths(part, hub_ids) for part in value]
    return None if isinstance(value, str) and is_path(value) else value
