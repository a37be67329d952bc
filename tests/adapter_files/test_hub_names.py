"""Hub ids are told from local paths, and local paths are kept out of what is published."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM

import peft_graft
from models import perturbed, tiny_llama
from peft_graft import GraftConfig
from peft_graft.adapter_files.card import refresh_card
from peft_graft.adapter_files.hub_names import (
    cached_commit,
    find_hub_ids,
    is_path,
    public_base,
    public_name,
    strip_local_paths,
)
from peft_graft.adapter_files.summary import read_saved


@pytest.mark.parametrize("name", ["gpt2", "org/model", "Org-1/model_v2.0", "BertModel"])
def test_hub_ids_are_public(name: str) -> None:
    assert public_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["/home/me/base", "./base", "../base", "~/base", "C:\\models\\base", "a/b/c", "", None, "no spaces", Path("gpt2")],
)
def test_everything_else_is_not(name: object) -> None:
    assert public_name(name) is None  # type: ignore[arg-type]


def test_an_existing_directory_is_a_path_however_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert public_name("org/model") == "org/model"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert public_name("org/model") is None
    assert not is_path("org/model")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"_name_or_path": "org/base"}', "org/base"),
        ('{"_name_or_path": "/home/you/base"}', None),
        ('{"_name_or_path": 3}', None),
        ("{}", None),
        ("[]", None),
        ("not json", None),
        (None, None),
    ],
)
def test_a_directory_goes_by_the_name_on_record(tmp_path: Path, text: str | None, found: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert public_base(str(tmp_path)) == found
    assert public_base(None) is None


def config(directory: Path, **fields: object) -> Path:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(fields))
    return path


def test_local_paths_are_removed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    path = config(
        tmp_path,
        base_model_name_or_path=str(base),
        revision="v1",
        donor=str(tmp_path / "donor"),
        donor_revision="main",
        donor_subfolder="unet",
        alpha=2.5,
        provenance={"versions": {"peft": "1"}, "command": ["extract", str(base)]},
    )
    with pytest.warns(UserWarning, match="published without the base's name"):
        strip_local_paths(tmp_path)
    assert json.loads(path.read_text()) == {
        "base_model_name_or_path": None,
        "revision": None,
        "donor": None,
        "donor_revision": None,
        "donor_subfolder": None,
        "alpha": 2.5,
        "provenance": {"versions": {"peft": "1"}, "command": ["extract", None]},
    }
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["adapter_config.json"]


def test_a_configuration_without_local_paths_is_not_rewritten(tmp_path: Path) -> None:
    path = config(tmp_path, base_model_name_or_path="org/base", revision="v1", donor="zeros")
    before = path.stat().st_mtime_ns, path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strip_local_paths(tmp_path)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_commit_is_told_only_where_it_is_certain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_commit("org/base", None) is None
    assert cached_commit("org/base", "v1") == "v1"
    assert cached_commit(str(tmp_path), None) is None
    one, two = "1" * 40, "2" * 40
    (tmp_path / "models--org--base" / "snapshots" / one).mkdir(parents=True)
    assert cached_commit("org/base", None) == one
    (tmp_path / "models--org--base" / "snapshots" / two).mkdir()
    assert cached_commit("org/base", None) is None


# Paths and ids that look alike


def save_pair(root: Path) -> None:
    base = tiny_llama()
    base.save_pretrained(root / "models" / "base")
    perturbed(base).save_pretrained(root / "models" / "donor")


def make_in_memory(out: str) -> None:
    base = LlamaForCausalLM.from_pretrained("models/base")
    config = GraftConfig(donor="models/donor", density=0.1, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(out)


def make_added(out: str) -> None:
    """A second adapter, of which PEFT learns the base's name only when it is saved."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained("models/base"), GraftConfig(donor="zeros", density=0.1))
    model.add_adapter("more", GraftConfig(donor="models/donor", density=0.1, task_type="CAUSAL_LM"))
    model.save_pretrained("both", selected_adapters=["more"])
    shutil.copytree("both/more", out)


def make_again(out: str) -> None:
    """Loaded and saved again."""
    make_in_memory("first")
    base = LlamaForCausalLM.from_pretrained("models/base")
    PeftModel.from_pretrained(base, "first").save_pretrained(out)


def make_stitched(out: str) -> None:
    peft_graft.extract("models/base", "models/donor", "first", density=0.1)
    peft_graft.stitch(["first"], out)


WAYS = {
    "extract": lambda out: peft_graft.extract("models/base", "models/donor", out, density=0.1),
    "in memory": make_in_memory,
    "added": make_added,
    "loaded and saved": make_again,
    "stitch": make_stitched,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_relative_path_is_no_hub_id_wherever_it_is_published_from(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    WAYS[way]("skill")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    skill = tmp_path / "skill"
    saved = read_saved(skill)
    assert saved is not None and saved.config["base_model_name_or_path"] == "models/base"
    refresh_card(skill)
    assert "models/" not in (skill / "README.md").read_text()
    with pytest.warns(UserWarning, match="got the local 'models/base'; it is published without the base's name"):
        strip_local_paths(skill)
    (skill / "README.md").write_text("---\nbase_model: models/base\n---\n# Mine\n")  # as PEFT and Trainers write it
    refresh_card(saved.copied_to(skill))
    assert "models/" not in (skill / "README.md").read_text() + (skill / "adapter_config.json").read_text()


def test_the_id_that_a_relative_base_records_is_found_when_the_adapter_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path("models/base/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_name_or_path": "org/base"}))
    WAYS["extract"]("skill")
    shutil.rmtree("models")
    with pytest.warns(UserWarning, match="published as 'org/base'"):
        strip_local_paths("skill")
    fields = json.loads(Path("skill/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/base" and fields["record"]["hub_ids"] == {"org/base": "org/base"}


def test_an_id_stays_one_although_a_directory_of_that_name_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub_ids = find_hub_ids(["org/base", Path("org/donor"), None])
    assert hub_ids == {"org/base": "org/base", "org/donor": None}
    (tmp_path / "org" / "base").mkdir(parents=True)
    assert public_name("org/base", hub_ids) == public_base("org/base", hub_ids) == "org/base"
    assert find_hub_ids(["org/base"], hub_ids) == hub_ids
    path = config(tmp_path, base_model_name_or_path="org/base", record={"hub_ids": hub_ids}, donor="org/donor")
    strip_local_paths(tmp_path)
    fields = json.loads(path.read_text())
    assert fields["base_model_name_or_path"] == "org/base" and fields["donor"] is None
    assert fields["record"]["hub_ids"] == {"org/base": "org/base"}


def test_a_name_given_afterwards_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the warning advises."""
    save_pair(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained("models/base"), GraftConfig(donor="models/donor", density=0.1)
    )
    model.peft_config["default"].base_model_name_or_path = "org/base"
    model.save_pretrained("skill", save_embedding_layers=False)  # or else PEFT asks the Hub
    strip_local_paths("skill")
    assert json.loads(Path("skill/adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"


def test_the_class_of_a_donor_in_memory_is_no_hub_id(tmp_path: Path) -> None:
    base = tiny_llama()
    get_peft_model(base, GraftConfig(donor=perturbed(base), density=0.1)).save_pretrained(tmp_path)
    assert "huggingface.co/LlamaForCausalLM" not in (tmp_path / "README.md").read_text()
    assert "| donor | not published" in (tmp_path / "README.md").read_text()
    strip_local_paths(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["donor"] is None
