"""The card's file: rewritten with the adapter, without losing what people wrote into it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .card_content import REPO, TITLE, render, template, update_data
from .hub_names import replace_text
from .summary import read_saved

CARD_FILE = "README.md"

_TRAINER = "generated automatically according to the information the Trainer had access to"
_REGION = re.compile(r"<!-- peft-graft:(\w+) ?(\w*) -->.*?<!-- /peft-graft:\1 -->", re.S)


def refresh_card(
    directory: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    pictures: Sequence[tuple[str, str]] = (),
    repo_id: str | None = None,
    tags: Sequence[str] = (),
) -> Path | None:
    """Write the card of a saved adapter, or bring the facts in an existing one up to date.

    Only the parts between peft-graft's marks are rewritten. Numbers and pictures stay as long as the adapter is the
    same, bit for bit and in alpha, and go when it is another; a part that was deleted stays deleted. A card without
    marks keeps its text and gets the parts at its end, unless it is an unedited template of PEFT, transformers or a
    Trainer.

    Args:
        directory: The adapter's directory. Nothing is done where it holds no whole graft.
        metrics: Scores in [0, 1] by model and name, `{"graft": {"accuracy": ...}, "base": ..., "donor": ...}`, as
            in the `metrics.json` of examples/graft.py; `data`, `rows` and `note` may say what was measured on.
        pictures: File name in the directory and caption.
        repo_id: Where it will be published, for the snippet.
        tags: Further tags.

    Returns:
        Path of the card, or None.
    """
    saved = read_saved(directory)
    if saved is None:
        return None
    path = Path(directory) / CARD_FILE
    old = ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None
    data = old.data if old is not None else ModelCardData()
    marks = {name: stamp for name, stamp in _REGION.findall(old.text)} if old is not None else {}
    is_known = marks.get("measured") == saved.stamp
    update_data(data, saved, metrics, is_known, repo_id, tags)
    fresh = render(data, saved, metrics, pictures, repo_id, _trainer_section(old.text) if old is not None else None)
    if old is None or _is_stock(old.text) or _TRAINER in old.text:
        card = fresh
    else:
        card = old
        wanted = (
            {"use", "facts"} | ({"measured"} if metrics is not None else set()) | ({"pictures"} if pictures else set())
        )
        stale = {name for name, stamp in marks.items() if stamp != saved.stamp}
        card.text = _with_parts(old.text, _parts(fresh.text), wanted | stale)
    if repo_id is not None:
        card.text = re.sub(rf"\A(\s*)# {TITLE}$", rf"\1# {repo_id.split('/')[-1]}", card.text, count=1, flags=re.M)
        card.text = card.text.replace(f'"{REPO}"', f'"{repo_id}"')
    save_card(card, path)
    return path


def adopt_edits(card: ModelCard, published: ModelCard) -> ModelCard:
    """Keep what people wrote into a published card, unless the new card was edited itself.

    Args:
        card: The new card.
        published: The card that it would replace.

    Returns:
        The published card with the new card's parts and metadata, or the new card.
    """
    unedited = ModelCard.from_template(ModelCardData(), template_str=template()).text
    if _own_lines(card.text) != _own_lines(unedited) or _is_stock(published.text):
        return card
    fields, kept = card.data.to_dict(), published.data.to_dict()
    fields["tags"] = sorted({*(fields.get("tags") or []), *(kept.get("tags") or [])})
    published.data = ModelCardData(**{**kept, **fields}, ignore_metadata_errors=True)
    parts = _parts(card.text)
    published.text = _with_parts(published.text, parts, set(parts))
    return published


def save_card(card: ModelCard, path: Path) -> None:
    """Write a card at once or not at all."""
    replace_text(path, f"---\n{card.data.to_yaml()}\n---\n{card.text.rstrip()}\n")


def _parts(text: str) -> dict[str, str]:
    return {match[1]: match[0] for match in _REGION.finditer(text)}


def _with_parts(text: str, parts: Mapping[str, str], rewritten: Collection[str]) -> str:
    """Rewrite parts of a text, where it has them; put all at its end, where it has none."""
    if _REGION.search(text) is None:
        return text.rstrip() + "\n\n" + "\n\n".join(parts.values()) + "\n"
    return _REGION.sub(lambda match: parts[match[1]] if match[1] in rewritten else match[0], text)


def _own_lines(text: str) -> list[str]:
    """What is not between marks, without the title."""
    return [line for line in _REGION.sub("", text).splitlines() if line.strip() and not line.startswith("# ")]


def _is_stock(text: str) -> bool:
    """Whether a text is an untouched template of PEFT or of transformers' push_to_hub."""
    body, _, rest = text.partition("### Framework versions")
    stock = {*ModelCard.from_template(ModelCardData()).text.splitlines(), "### Framework versions"}
    lines = [line for line in body.splitlines() if line.strip()]
    unknown = [line for line in lines if line not in stock and not line.startswith("This is the model card of a ")]
    return "# Model Card for Model ID" in lines and not unknown and all(
        line.startswith("- PEFT ") for line in rest.splitlines() if line.strip()
    )  # fmt: skip


def _trainer_section(text: str) -> str | None:
    """Return what a Trainer's own card tells about the training, None for other cards."""
    heading = "## Training procedure"
    return heading + text.split(heading, 1)[1].rstrip() if _TRAINER in text and heading in text else None
