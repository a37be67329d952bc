"""The table of PEFT's features: it says what the tests say, and is only written when these have passed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import compatibility
from compatibility import SECTIONS, Claim, check, read_claims, render, without_versions

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "peft_compatibility.md"
ROWS = [feature for features in SECTIONS.values() for feature in features]


def test_every_row_has_a_test_and_every_mark_a_row() -> None:
    assert check(read_claims(ROOT)) == []
    assert len(ROWS) == len(set(ROWS))


def test_the_committed_table_is_that_of_the_tests() -> None:
    wanted = without_versions(render(read_claims(ROOT), versions="any"))
    assert without_versions(TABLE.read_text(encoding="utf-8")) == wanted, "run `make compatibility`"


def test_a_table_that_says_something_else_is_noticed() -> None:
    claims = [Claim("a", "works", "tests/test_x.py::test_a"), Claim("b", "no: c", "tests/test_x.py::test_b")]
    sections = {"One": ("a", "b")}
    table = render(claims, "torch 1", sections)
    assert "| a | works | `test_x.py::test_a` |\n| b | no: c | `test_x.py::test_b` |\n" in table
    assert without_versions(table) == without_versions(render(claims, "torch 2", sections)) != table
    for other in ([claims[0]], [claims[0], claims[1]._replace(verdict="works")], [claims[0]._replace(test="t::u")]):
        assert without_versions(render(other, "torch 1", sections)) != without_versions(table)


def test_what_makes_no_table_is_said() -> None:
    claims = [Claim("a", "no: x", "t"), Claim("a", "no: y", "u"), Claim("c", "works", "u")]
    assert check(claims, {"One": ("a", "b")}) == [
        "no test shows 'b'",
        "'c' has no row in SECTIONS",
        "'a' has several verdicts: ['no: x', 'no: y']",
    ]
    assert check([Claim("a", "works", "t"), Claim("a", "no: y", "u")], {"One": ("a",)}) == []


# The plugin, in a project of its own

GOOD = "import pytest\n" + "".join(
    f"@pytest.mark.feature({row!r})\n@pytest.mark.parametrize('x', [1, 2])\ndef test_{i}(x): pass\n"
    for i, row in enumerate(ROWS)
)
BAD = {
    "fails": ("def test_0(x): pass", "def test_0(x): assert x == 1", "test_0: failed"),
    "is skipped": ("def test_0(x): pass", "def test_0(x): x == 1 or pytest.skip('no trl')", "test_0: Skipped: no trl"),
    "fails at the end": ("def test_0(x): pass", "def test_0(x, broken): pass", "test_0: failed"),
    "has no row": (repr(ROWS[0]), "'unknown'", "'unknown' has no row in SECTIONS"),
}
BROKEN = "@pytest.fixture\ndef broken():\n    yield\n    raise OSError\n"


def run(project: Path, *arguments: str, tests: str = GOOD) -> subprocess.CompletedProcess[str]:
    (project / "tests").mkdir(exist_ok=True)
    (project / "tests" / "test_it.py").write_text(tests + BROKEN)
    (project / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    plugin = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "compatibility"]
    code = f"import sys; sys.path.insert(0, {str(Path(compatibility.__file__).parent)!r}); import pytest; "
    code += f"sys.exit(pytest.main({[*plugin[3:], *arguments]!r}))"
    return subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)


def test_a_run_in_which_all_passed_writes_the_table(tmp_path: Path) -> None:
    result = run(tmp_path, "--compatibility=table.md")
    assert result.returncode == 0, result.stdout
    wanted = without_versions(render(read_claims(tmp_path), versions="any"))
    assert without_versions((tmp_path / "table.md").read_text()) == wanted
    assert wanted.count("| works | `test_it.py::test_") == len(ROWS)
    assert {path.name for path in tmp_path.iterdir()} >= {"table.md"} and not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("how", sorted(BAD))
def test_one_test_that_did_not_pass_and_there_is_no_table(how: str, tmp_path: Path) -> None:
    before, after, message = BAD[how]
    result = run(tmp_path, "--compatibility=table.md", tests=GOOD.replace(before, after))
    assert result.returncode == 1 and message in result.stdout, result.stdout
    assert not (tmp_path / "table.md").exists()


def test_a_run_of_some_tests_writes_no_table(tmp_path: Path) -> None:
    result = run(tmp_path, "--compatibility=table.md", "-k", "not test_3")
    assert result.returncode == 1 and "test_3: not run" in result.stdout
    assert not (tmp_path / "table.md").exists()


def test_a_mark_that_the_table_would_not_see_is_refused(tmp_path: Path) -> None:
    hidden = GOOD + f"pytestmark = pytest.mark.feature({ROWS[1]!r})\n"
    result = run(tmp_path, tests=hidden)
    assert result.returncode != 0 and "feature marks must be decorators" in result.stdout + result.stderr
