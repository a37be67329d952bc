"""Hub ids are told from local paths, and local paths are kept out of what is published."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
from huggingface_hub import constants

from peft_graft.adapter_files.hub_names import cached_commit, is_path, public_base, public_name, strip_local_paths


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
