"""Reading ahead asks for both sides alike, stops when told, and never stands in the way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from threading import Event

import pytest

from peft_graft.cli import read_ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the kernel is asked for: (side and file, offset)."""
    found: list[tuple[str, int]] = []

    def advise(descriptor: int, start: int, length: int, what: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found.append((f"{path.parent.name}/{path.name}", start))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(read_ahead, "_STEP", 10)
    return found


def write(tmp_path: Path, side: str, *sizes: int) -> list[Path]:
    (tmp_path / side).mkdir()
    for number, size in enumerate(sizes):
        (tmp_path / side / f"{number}.safetensors").write_bytes(bytes(size))
    return sorted((tmp_path / side).iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up names of open files in /proc")
def test_both_sides_are_asked_for_in_turns(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    read_ahead._advise([write(tmp_path, "a", 15, 5), write(tmp_path, "b", 15)], Event())
    assert asked == [
        ("a/0.safetensors", 0), ("b/0.safetensors", 0), ("a/0.safetensors", 10), ("b/0.safetensors", 10),
        ("a/1.safetensors", 0),
    ]  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks up names of open files in /proc")
def test_it_stops_when_told_and_at_half_the_memory(
    tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    files, stop = [write(tmp_path, "a", 1000)], Event()
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4, "SC_PHYS_PAGES": 15}[name])
    read_ahead._advise(files, stop)
    assert [start for _, start in asked] == [0, 10, 20]
    stop.set()
    read_ahead._advise(files, stop)
    assert len(asked) == 3


def test_what_cannot_be_read_is_passed_over(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "a", 5)
    (tmp_path / "a" / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    with read_ahead.read_ahead("org/model", str(tmp_path / "a"), str(tmp_path / "none")):
        time.sleep(0.05)
    assert capfd.readouterr().err == ""
