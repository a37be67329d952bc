"""The runner of PEFT's own tests, and, where `PEFT_TESTS` says where these are, all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNNER = Path(__file__).parent / "peft_suites" / "run.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run([sys.executable, str(RUNNER), *arguments], capture_output=True, text=True, env=environment)


def test_a_directory_without_the_tests_is_refused(tmp_path: Path) -> None:
    done = run("--peft-tests", str(tmp_path))
    assert done.returncode == 2
    assert f"--peft-tests must hold testing_common.py, got {str(tmp_path)!r}" in done.stderr


@pytest.mark.slow
def test_grafts_pass_the_tests_of_peft() -> None:
    tests = os.environ.get("PEFT_TESTS")
    if tests is None:
        pytest.skip("set PEFT_TESTS to the tests of the installed PEFT, or let tests/peft_suites/run.py download them")
    done = run("--peft-tests", tests)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
