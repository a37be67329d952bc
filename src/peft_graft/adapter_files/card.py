"""Write the model card of a saved adapter, and keep the text that people wrote into it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from yaml import YAMLError

from ..patch.atomic import atomic_file
from .card_content import REPO, TITLE, render, template, update_metadata
from .summary import SavedAdapter, read_saved

CARD_FILE = "README.md"

_TRAINER = "generated automatically according to the information the Trainer had access to"
_SECTION = re.compile(r"<!-- peft-graft:(\w+) ?(\w*) -->.*?<!-- /peft-graft:\1 -->", re.S)


def refresh_card(
    adapter: str | os.PathLike[str] | SavedAdapter,
    *,
    metrics: Mapping[str, Any] | None = None,
    pictures: Sequence[tuple[str, str]] = (),
    repo_id: str | None = None,
    tags: Sequence[str] = (),
    hub_ids: Mapping[str, str | None] | None = None,
) -> Path | None:
    """Write the card of a saved adapter, or bring the sections of an existing card up to date.

    Only the sections between peft-graft's comments are rewritten; a section that was deleted stays deleted. Scores and
    pictures are kept as long as the tensors and alpha are the same, bit for bit, and removed otherwise. A card without
    such comments keeps its text and gets the sections at its end, unless it is an unedited template of PEFT,
    transformers or a Trainer.

    Args:
        adapter: The adapter or its directory. If the directory does not hold a whole graft, nothing is written.
        metrics: Scores in [0, 1] by model and name, `{"graft": {"accuracy": ...}, "base": ..., "donor": ...}`, as
            in the `metrics.json` of examples/graft.py. `data`, `rows` and `note` may describe the data.
        pictures: File name in the directory and caption of each picture.
        repo_id: Repository where the adapter will be published, for the code that loads it.
        tags: Further tags.
        hub_ids: Hub ids by the names of models, beyond those that the adapter's record holds.

    Returns:
        Path of the card, or None if nothing was written.

    Raises:
        PatchError: The file of the tensors is not whole safetensors, or the configuration is not JSON.
    """
    saved = adapter if isinstance(adapter, SavedAdapter) else read_saved(adapter)
    if saved is None:
        return None
    if hub_ids:
        saved = saved.copied_to(saved.directory)
        saved.hub_ids = {**hub_ids, **saved.hub_ids}
    path = saved.directory / CARD_FILE
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    data = old.data if old is not None else ModelCardData()
    hashes = dict(_SECTION.findall(old.text)) if old is not None else {}
    keep_scores = metrics is None and hashes.get("measured") == saved.content_hash
    update_metadata(data, saved, metrics, keep_scores, repo_id, tags)
    card = render(data, saved, metrics, pictures, _trainer_section(old.text) if old is not None else None)
    if old is not None and not _is_stock(old.text) and _TRAINER not in old.text:
        stale = {name for name, content_hash in hashes.items() if content_hash != saved.content_hash}
        given = {name for name, values in (("measured", metrics), ("pictures", pictures or None)) if values is not None}
        old.text = _with_sections(old.text, _sections(card.text), {"use", "facts"} | given | stale)
        card = old
    if repo_id is not None:
        card.text = re.sub(rf"\A(\s*)# {TITLE}$", rf"\1# {repo_id.split('/')[-1]}", card.text, count=1, flags=re.M)
        card.text = card.text.replace(f'"{REPO}"', f'"{repo_id}"')
    save_card(card, path)
    return path


def adopt_edits(card: ModelCard, published: ModelCard) -> ModelCard:
    """Keep the text that people wrote into a published card, unless the new card was edited itself.

    Args:
        card: The new card.
        published: The card that it would replace.

    Returns:
        The published card with the new card's sections and metadata, or the new card.
    """
    unedited = ModelCard.from_template(ModelCardData(), template_str=template()).text
    if _own_lines(card.text) != _own_lines(unedited) or _is_stock(published.text):
        return card
    fields, kept = card.data.to_dict(), published.data.to_dict()
    fields["tags"] = sorted({*(fields.get("tags") or []), *(kept.get("tags") or [])})
    published.data = ModelCardData(**{**kept, **fields}, ignore_metadata_errors=True)
    sections = _sections(card.text)
    published.text = _with_sections(published.text, sections, set(sections))
    return published


def require_readable_card(directory: Path) -> None:
    """Refuse a directory whose card cannot be read, before an adapter is made that would go beside it.

    Args:
        directory: The directory that the adapter will be put into; it need not exist.

    Raises:
        ValueError: The card is not UTF-8, or its metadata is not a YAML mapping.
    """
    path = directory / CARD_FILE
    try:
        if path.is_file():
            ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"card in output_dir must be UTF-8 with metadata in YAML, got {str(path)!r} ({error}). "
            "Its text would be kept: correct the file, or move it away."
        ) from error


def carry_card(source: Path, directory: Path) -> None:
    """Copy the card of a directory, if it has one, to where an adapter is written that will replace what is there.

    Saving the adapter then updates the card and keeps the text that people wrote, as it does in the place itself.

    Args:
        source: The directory that the adapter will be put into; it need not exist.
        directory: The temporary directory that the adapter is saved to.
    """
    if (source / CARD_FILE).is_file():
        shutil.copyfile(source / CARD_FILE, directory / CARD_FILE)


def save_card(card: ModelCard, path: Path) -> None:
    """Write a card; an older file at `path` is replaced at once or not at all."""
    with atomic_file(path) as temporary:
        text = f"---\n{card.data.to_yaml()}\n---\n{card.text.rstrip()}\n"
        temporary.write_text(text, encoding="utf-8", newline="")


def _sections(text: str) -> dict[str, str]:
    return {match[1]: match[0] for match in _SECTION.finditer(text)}


def _with_sections(text: str, sections: Mapping[str, str], rewritten: Collection[str]) -> str:
    """Rewrite the named sections that a text has; append all sections if it has none."""
    if _SECTION.search(text) is None:
        return text.rstrip() + "\n\n" + "\n\n".join(sections.values()) + "\n"
    return _SECTION.sub(lambda match: sections[match[1]] if match[1] in rewritten else match[0], text)


def _own_lines(text: str) -> list[str]:
    """Return the lines outside of the sections, without titles."""
    return [line for line in _SECTION.sub("", text).splitlines() if line.strip() and not line.startswith("# ")]


def _is_stock(text: str) -> bool:
    """Return whether a text is the unedited template of PEFT or of transformers' push_to_hub."""
    body, _, rest = text.partition("### Framework versions")
    stock = {*ModelCard.from_template(ModelCardData()).text.splitlines(), "### Framework versions"}
    lines = [line for line in body.splitlines() if line.strip()]
    unknown = [line for line in lines if line not in stock and not line.startswith("This is the model card of a ")]
    return "# Model Card for Model ID" in lines and not unknown and all(
        line.startswith("- PEFT ") for line in rest.splitlines() if line.strip()
    )  # fmt: skip


def _trainer_section(text: str) -> str | None:
    """Return the section on the training procedure of a Trainer's card, None for other cards."""
    heading = "## Training procedure"
    return heading + text.split(heading, 1)[1].rstrip() if _TRAINER in text and heading in text else None
