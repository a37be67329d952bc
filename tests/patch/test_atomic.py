"""Files and directories that appear whole or not at all, and output directories that are refused."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peft_graft.patch import atomic
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


# Files of the user


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin", "model_index.json"],
)
def test_a_directory_with_a_model_is_refused_even_with_overwrite(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"output_dir must hold no model, got '{name}'.*output_dir=.*-graft"):
        check_output_dir(tmp_path, True, ("adapter_config.json",))
    check_output_dir(tmp_path, True, writes_model=True)


def test_files_of_a_trainer_are_no_model(tmp_path: Path) -> None:
    for name in ("training_args.bin", "adapter_model.safetensors", "README.md"):
        (tmp_path / name).write_text("mine")
    check_output_dir(tmp_path, False, ("adapter_config.json",))


def test_a_model_is_not_written_beside_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="output_dir must hold no adapter, got 'adapter_config.json'"):
        check_output_dir(tmp_path, True, writes_model=True)


@pytest.mark.parametrize("way", ["itself", "another spelling", "a link", "a linked parent", "a file in it"])
def test_an_input_is_no_output_whatever_leads_there(way: str, tmp_path: Path) -> None:
    source = tmp_path / "deep" / "donor"
    source.mkdir(parents=True)
    (source / "weights").write_text("mine")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "other").symlink_to(source.parent)
    target = {
        "another spelling": source / ".." / "donor",
        "a link": tmp_path / "link",
        "a linked parent": tmp_path / "other" / "donor",
    }.get(way, source)
    given = source / "weights" if way == "a file in it" else source
    with pytest.raises(FileExistsError, match="which holds the donor '.*deep/donor.*Give a new directory"):
        check_output_dir(target, True, (), inputs={"base": "org/base", "donor": given, "more": None})
    check_output_dir(source / "skill", False, (), inputs={"donor": given})


# Ends that no exception announces

# The module alone, because importing the package takes seconds.
CHILD = f"""
import sys, time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
spec = spec_from_file_location("atomic", {atomic.__file__!r})
room = sys.modules["atomic"] = module_from_spec(spec)
spec.loader.exec_module(room)
from atomic import atomic_directory, atomic_file
writer = vars(room)[sys.argv[1]]
with writer(Path("out")) as aside:
    if writer is atomic_directory:
        (aside / "half").write_text("half")
    else:
        aside.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def stop_while_writing(writer: str, number: int, cwd: Path) -> int:
    process = subprocess.Popen([sys.executable, "-c", CHILD, writer], cwd=cwd, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert len(list(cwd.iterdir())) == 1
    process.send_signal(number)
    process.communicate()
    return process.returncode


@pytest.mark.parametrize(
    ("writer", "number"),
    [
        ("atomic_directory", signal.SIGTERM),
        ("atomic_directory", signal.SIGHUP),
        ("atomic_directory", signal.SIGUSR1),
        ("atomic_file", signal.SIGTERM),
    ],
)
def test_a_signal_leaves_nothing_behind(writer: str, number: int, tmp_path: Path) -> None:
    assert stop_while_writing(writer, number, tmp_path) == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    assert stop_while_writing("atomic_directory", signal.SIGKILL, tmp_path) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with atomic_directory(tmp_path / "elsewhere"):
        assert left.exists()
    with atomic_directory(tmp_path / "out") as aside:
        with atomic_directory(tmp_path / "out") as other:  # what is in use stays
            assert aside.exists() and other.exists()
        assert not left.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "out"]


def test_signals_that_the_program_handles_are_left_alone(tmp_path: Path) -> None:
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("handled"))
    try:
        with atomic_directory(tmp_path / "out"):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["handled"] and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_thread_writes_as_well(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_directory(tmp_path / "out") as aside:
            (aside / "a").write_text("a")

    with ThreadPoolExecutor(1) as pool:
        pool.submit(write).result()
    assert (tmp_path / "out" / "a").read_text() == "a"
