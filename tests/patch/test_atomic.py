"""Files and directories that appear whole or not at all, and output directories that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_graft.patch.atomic import atomic_directory, atomic_file, check_output_dir


def test_a_directory_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as aside:
        (aside / "a").write_text("a")
        assert not target.exists() and aside.parent == target.parent
    assert [file.name for file in target.iterdir()] == ["a"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "a").write_text("old")
    with pytest.raises(RuntimeError), atomic_directory(target) as aside:
        (aside / "a").write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_last_file_takes_its_place_after_the_others(tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "z").mkdir(parents=True)  # a directory in the place of a file: putting "z" there fails
    (target / "a").write_text("old")
    with pytest.raises(OSError), atomic_directory(target, last="a") as aside:
        (aside / "a").write_text("new")
        (aside / "z").write_text("new")
    assert (target / "a").read_text() == "old"


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old" and temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_output_directory_is_refused_by_name_or_altogether(tmp_path: Path) -> None:
    check_output_dir(tmp_path / "out", False)
    (tmp_path / "mine").write_text("mine")
    check_output_dir(tmp_path, False, ("theirs",))
    check_output_dir(tmp_path, True)
    with pytest.raises(FileExistsError, match="output_dir must be empty, got 'mine'"):
        check_output_dir(tmp_path, False)
    with pytest.raises(FileExistsError, match="output_dir must hold no adapter yet, got 'mine'"):
        check_output_dir(tmp_path, False, ("mine",))
    with pytest.raises(NotADirectoryError, match="got the file"):
        check_output_dir(tmp_path / "mine", True)
