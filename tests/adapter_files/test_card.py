"""A card is rewritten with its adapter, and loses nothing that a person wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from adapter_cards import METRICS, facts, save
from grafts import graft
from models import perturbed, tiny_bert
from peft_graft import PatchError
from peft_graft.adapter_files.card import adopt_edits, refresh_card
from peft_graft.workflows.push import write_card


def test_the_same_adapter_keeps_its_numbers(tmp_path: Path) -> None:
    path = save(tmp_path)
    write_card(tmp_path, METRICS)
    before = path.read_text()
    save(tmp_path)
    assert path.read_text() == before


@pytest.mark.parametrize("change", [{"density": 0.1}, {"alpha": 3.0}])
def test_another_adapter_loses_the_old_one_s_numbers(tmp_path: Path, change: dict[str, float]) -> None:
    path = save(tmp_path)
    write_card(tmp_path, METRICS)
    save(tmp_path, **change)
    card = ModelCard.load(path)
    assert not card.data.eval_results
    assert "0.9062" not in card.text and "skill_map.png" not in card.text
    assert facts(card.text)["density"] == str(change.get("density", 0.05))


def test_what_a_person_wrote_stays(tmp_path: Path) -> None:
    path = save(tmp_path)
    card = ModelCard.load(path)
    card.text = card.text.replace("# Skill graft", "# My title").replace("## Limits", "My words.\n\n## Limits")
    card.data.license = "mit"
    card.save(path)
    save(tmp_path, density=0.1)
    again = ModelCard.load(path)
    assert again.text.count("My words.") == 1 and "# My title" in again.text
    assert again.data.license == "mit"
    assert facts(again.text)["density"] == "0.1"


def test_a_part_that_was_deleted_stays_deleted(tmp_path: Path) -> None:
    path = save(tmp_path)
    text = path.read_text()
    start, end = text.index("<!-- peft-graft:facts"), text.index("<!-- /peft-graft:facts -->")
    path.write_text(text[:start] + text[end + len("<!-- /peft-graft:facts -->") :])
    save(tmp_path)
    assert "## What it is" not in path.read_text()
    assert "## Load it" in path.read_text()


def test_a_card_without_marks_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nAll of it.\n")
    path = save(tmp_path)
    text = path.read_text()
    assert text.index("All of it.") < text.index("## Load it") < text.index("## What it is")
    assert ModelCard.load(path).data.license == "mit"
    save(tmp_path)
    assert path.read_text() == text


def test_own_tags_stay_when_a_model_saves_again(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.05, task_type="SEQ_CLS")
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    card.data.tags.append("mine")
    card.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert "mine" in ModelCard.load(tmp_path / "README.md").data.tags


def test_published_edits_are_adopted_unless_the_new_card_was_edited(tmp_path: Path) -> None:
    old_path, new_path = save(tmp_path / "old"), save(tmp_path / "new", density=0.1)
    published = ModelCard(old_path.read_text().replace("## Limits", "Theirs.\n\n## Limits"))
    published.data.license, published.data.tags = "mit", ["theirs"]
    adopted = adopt_edits(ModelCard.load(new_path), published)
    assert "Theirs." in adopted.text and facts(adopted.text)["density"] == "0.1"
    assert adopted.data.license == "mit" and {"theirs", "graft"} <= {*adopted.data.tags}
    edited = ModelCard(new_path.read_text().replace("## Limits", "Ours.\n\n## Limits"))
    assert adopt_edits(edited, published) is edited
    stock = ModelCard.from_template(ModelCardData())
    assert adopt_edits(ModelCard.load(new_path), stock).text == ModelCard.load(new_path).text


def test_no_card_is_written_without_a_whole_graft(tmp_path: Path) -> None:
    assert refresh_card(tmp_path) is None and not list(tmp_path.iterdir())
    path = save(tmp_path)
    before = path.read_bytes()
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(PatchError, match="must be whole safetensors"):
        refresh_card(tmp_path)
    assert path.read_bytes() == before
