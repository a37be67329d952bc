"""The command starts without the library, and the library does not care how its process was started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["peft-graft"]
MODULE, FUNCTION = SCRIPT.split(":")
# What an installer writes into bin/peft-graft.
PROGRAM = [sys.executable, "-c", f"import sys; from {MODULE} import {FUNCTION}; sys.exit({FUNCTION}())"]
HEAVY = {"torch", "numpy", "peft", "transformers", "huggingface_hub", "safetensors", "tqdm", "rich", "peft_graft"}


@pytest.mark.parametrize("arguments", [["peft-graft.py"], ["-m", "peft-graft"]], ids=["script", "module"])
def test_a_program_named_like_the_command_gets_the_whole_library(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "peft-graft.py").write_text(
        "import peft_graft\n"
        "from peft import PeftType\n"
        "print(peft_graft.GraftConfig(donor='zeros', density=0.5).peft_type == PeftType.GRAFT)\n"
        "print(sorted(set(peft_graft.__all__) - set(vars(peft_graft))))\n"
    )
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.stdout == "True\n[]\n", ran.stderr


def test_only_the_command_line_looks_at_the_arguments_of_the_process() -> None:
    package = ROOT / "src" / "peft_graft"
    library = [path for path in package.rglob("*.py") if path.parent.name != "cli"]
    assert [path.name for path in library if "argv" in path.read_text(encoding="utf-8")] == []


def test_help_is_there_at_once() -> None:
    """Nothing heavy is imported, and the fastest of a few runs takes less than 0.3 s of processor time."""
    script = f"{PROGRAM[2].removesuffix(f'sys.exit({FUNCTION}())')}import atexit\n"
    script += "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n" + f"sys.exit({FUNCTION}())"
    ran = subprocess.run([sys.executable, "-c", script, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0 and "extract" in ran.stdout
    assert not HEAVY & {*ran.stderr.split()}
    seconds = []
    for _ in range(5):
        before, began = os.times(), time.perf_counter()
        subprocess.run([*PROGRAM, "extract", "--help"], capture_output=True, check=True)
        after = os.times()
        used = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(min(used, time.perf_counter() - began))
    assert min(seconds) < 0.3
