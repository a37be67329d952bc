"""Publish a saved adapter on the Hub in one commit, with a complete card and its pictures."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..adapter_files.card import CARD_FILE, adopt_edits, refresh_card, save_card
from ..adapter_files.hub_names import CONFIG_FILE, strip_local_paths
from ..adapter_files.summary import WEIGHTS_FILE, SavedAdapter, read_saved
from ..analysis.localization import locate
from ..analysis.plots import density_recovery, skill_map
from ..patch.atomic import ends_by_exception

MAP_FILE = "skill_map.png"
RECOVERY_FILE = "density_recovery.png"


def write_card(
    directory: str | os.PathLike[str],
    metrics: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    recovery: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write the card of a saved adapter with its measurements and, if matplotlib is installed, its pictures.

    `save_pretrained` writes a card without these. Changes that people made in the card are kept.

    Args:
        directory: Directory of an adapter.
        metrics: Measurements of this adapter, as `peft_graft.adapter_files.card.refresh_card` takes them, or the path
            of a JSON file that holds them.
        recovery: Arguments of `peft_graft.analysis.plots.density_recovery`, if the curve was measured.
        repo_id: Repository where the adapter will be published, for the code that loads it.

    Returns:
        Path of the card.

    Raises:
        ValueError: The directory holds no finished graft.
        OSError: The file of the measurements does not exist.
    """
    return _write_card(_require_graft(Path(directory)), metrics, recovery, repo_id)


def _write_card(
    saved: SavedAdapter,
    metrics: Mapping[str, Any] | str | os.PathLike[str] | None,
    recovery: Mapping[str, Any] | None,
    repo_id: str | None,
) -> Path:
    path = saved.directory
    if metrics is None or isinstance(metrics, Mapping):
        scores = metrics
    else:
        scores = json.loads(Path(metrics).read_text(encoding="utf-8"))
    pictures = []
    if find_spec("matplotlib") is not None:
        place = locate(saved.load_patch())
        percent = 100 * place.share
        skill_map(percent, place.layers, place.modules, label="% of the patch").savefig(path / MAP_FILE)
        pictures.append((MAP_FILE, "Percent of the entries, by layer (the input below, the output above) and module"))
        if recovery is not None:
            density_recovery(**recovery).savefig(path / RECOVERY_FILE)
            pictures.append((RECOVERY_FILE, "How much of the donor's score a patch keeps, by density"))
    card = refresh_card(saved, metrics=scores, pictures=pictures, repo_id=repo_id)
    if card is None:
        raise _no_graft(path)
    return card


def push(
    repo_id: str,
    directory: str | os.PathLike[str],
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    metrics: Mapping[str, Any] | str | os.PathLike[str] | None = None,
) -> CommitInfo:
    """Publish a saved adapter: its two files, its card and the card's pictures, in one commit.

    The directory is not changed. Local paths are left out of the upload. A README.md that was edited on the Hub keeps
    its text, unless the one in the directory was edited too.

    Args:
        repo_id: `owner/name`; created if it does not exist.
        directory: Directory of the adapter; other files in it are not uploaded.
        private: Whether the repository is private. Default: the owner's default for new repositories.
        revision: Branch, created if it does not exist.
        commit_message: Message of the commit. Default: "Upload graft with peft-graft".
        create_pr: Open a pull request instead of committing.
        token: Token with write access. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        metrics: Measurements for the card, as in `write_card`.

    Returns:
        The commit.

    Raises:
        ValueError: The directory holds no finished graft, or the repository exists and is not as private as asked.
        PatchError: The patch is damaged.
        HfHubHTTPError: The Hub refuses or cannot be reached; then no file has changed there.
    """
    path = Path(directory)
    saved = _require_graft(path)
    saved.load_patch()  # refuse a damaged patch before anything is published
    api = HfApi(token=token)
    with ends_by_exception(), TemporaryDirectory() as folder:
        staging = Path(folder)
        names = [CONFIG_FILE, WEIGHTS_FILE, *([CARD_FILE] if (path / CARD_FILE).is_file() else [])]
        for name in [*names, *_pictures(path)]:
            shutil.copyfile(path / name, staging / name)
        strip_local_paths(staging)
        _write_card(saved.copied_to(staging), metrics, None, repo_id)
        try:
            _open_repository(api, repo_id, private, revision, create_pr)
            _keep_published_text(api, repo_id, revision, staging / CARD_FILE)
            # upload_folder may make several commits, between which a reader would see half an adapter.
            return api.create_commit(
                repo_id,
                [CommitOperationAdd(file.name, file) for file in sorted(staging.iterdir())],
                revision=revision,
                commit_message=commit_message or "Upload graft with peft-graft",
                create_pr=create_pr,
            )
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403):
                error.append_to_message(
                    "\nPublishing needs a token with write access: run `hf auth login`, set HF_TOKEN, or pass a token."
                )
            raise


def _open_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> None:
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private is not None and bool(api.model_info(repo_id).private) != private:
        raise ValueError(
            f"private must be as the existing repository {repo_id!r} is, got {private!r}. "
            "Change the repository's visibility first, or leave private out."
        )
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        except HfHubHTTPError as error:
            # Whoever may only open pull requests cannot create a branch, and needs none if the branch exists.
            if not create_pr or error.response is None or error.response.status_code != 403:
                raise


def _keep_published_text(api: HfApi, repo_id: str, revision: str | None, path: Path) -> None:
    try:
        published = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except EntryNotFoundError:
        return
    card, old = (ModelCard.load(one, ignore_metadata_errors=True) for one in (path, published))
    save_card(adopt_edits(card, old), path)


def _pictures(directory: Path) -> list[str]:
    """Return the names of the pictures that the card in a directory shows."""
    card = directory / CARD_FILE
    shown = re.findall(r"!\[[^\]]*\]\(([\w.-]+\.png)\)", card.read_text(encoding="utf-8")) if card.is_file() else []
    return sorted({name for name in shown if (directory / name).is_file()})


def _require_graft(directory: Path) -> SavedAdapter:
    saved = read_saved(directory)
    if saved is None:
        raise _no_graft(directory)
    if saved.in_training:
        raise ValueError(
            f"adapter must be a finished patch, got the checkpoint of a mask in training in {str(directory)!r}. "
            "Call model.save_pretrained(...) after the training."
        )
    return saved


def _no_graft(directory: Path) -> ValueError:
    found = sorted(file.name for file in directory.iterdir())[:5] if directory.is_dir() else "no directory"
    return ValueError(
        f"directory must hold a saved graft ({CONFIG_FILE} and {WEIGHTS_FILE}), got {found!r} in {str(directory)!r}. "
        "Write one with model.save_pretrained(...) or peft-graft extract; the repository comes before the directory."
    )
