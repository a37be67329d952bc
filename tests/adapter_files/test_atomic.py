"""Directories that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_graft.adapter_files.atomic import require_room, written_aside


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with written_aside(target) as aside:
        (aside / "a").write_text("a")
        assert not target.exists() and aside.parent == target.parent
    assert [file.name for file in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(RuntimeError), written_aside(target) as aside:
        (aside / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_file_takes_its_place_after_the_others(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "z").mkdir(parents=True)  # a directory in the place of a file: putting "z" there fails
    (target / "a").write_text("old")
    with pytest.raises(OSError), written_aside(target, last="a") as aside:
        (aside / "a").write_text("new")
        (aside / "z").write_text("new")
    assert (target / "a").read_text() == "old"


def test_room_is_asked_for_by_name_or_altogether(tmp_path: Path) -> None:
    require_room(tmp_path / "out", False)
    (tmp_path / "mine").write_text("mine")
    require_room(tmp_path, False, ("theirs",))
    require_room(tmp_path, True)
    with pytest.raises(FileExistsError, match="output_dir must be empty, got 'mine'"):
        require_room(tmp_path, False)
    with pytest.raises(FileExistsError, match="output_dir must hold no adapter yet, got 'mine'"):
        require_room(tmp_path, False, ("mine",))
    with pytest.raises(NotADirectoryError, match="got the file"):
        require_room(tmp_path / "mine", True)
