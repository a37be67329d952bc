"""A pytest plugin: `--compatibility FILE` writes the table of features from the tests that passed in this very run.

A test says which feature it shows with `@pytest.mark.feature("forward")`. A second argument replaces the verdict
"works", as in `@pytest.mark.feature("hot-swapping", "no: PEFT swaps LoRA only")`; such a test shows the error one gets.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

WORKS = "works"
VERSIONS_OF = ("peft", "transformers", "accelerate", "torch", "trl", "torchao", "bitsandbytes")
# The rows, in the order of the table. A row needs a test, and a test's feature needs a row here.
SECTIONS: dict[str, tuple[str, ...]] = {}
_OPTION = "--compatibility"
_VERSIONS = "Written with "
_HEAD = f"""# What works with PEFT

Written by `make compatibility`, only from tests that passed in that run: a row says "works" when all the tests beside
it passed, and "no" when they showed the error that one gets. Never edited by hand; the default suite compares it with
the tests.

{_VERSIONS}"""


class Claim(NamedTuple):
    """What one test shows about one feature."""

    feature: str
    verdict: str
    test: str  # node id without parameters


def read_claims(root: Path) -> list[Claim]:
    """Find the feature marks of all tests below a folder, without importing them.

    Args:
        root: Folder that contains `tests`.

    Returns:
        One claim per mark, in order of file and line.
    """
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.feature":
                    feature, verdict, *_ = *map(ast.literal_eval, decorator.args), WORKS
                    found.append(Claim(feature, verdict, f"{path.relative_to(root).as_posix()}::{node.name}"))
    return found


def check(claims: Iterable[Claim], sections: Mapping[str, Iterable[str]] = SECTIONS) -> list[str]:
    """Say what keeps the claims from making a table: a row without a test, a test without a row, two verdicts."""
    verdicts: dict[str, set[str]] = {}
    for claim in claims:
        verdicts.setdefault(claim.feature, set()).add(claim.verdict)
    rows = [feature for features in sections.values() for feature in features]
    problems = [f"no test shows {feature!r}" for feature in rows if feature not in verdicts]
    problems += [f"{feature!r} has no row in SECTIONS" for feature in verdicts if feature not in rows]
    problems += [
        f"{row!r} has several verdicts: {sorted(said)}" for row, said in verdicts.items() if len(said - {WORKS}) > 1
    ]
    return problems


def render(claims: Iterable[Claim], versions: str, sections: Mapping[str, Iterable[str]] = SECTIONS) -> str:
    """Write the table as Markdown."""
    by_feature: dict[str, list[Claim]] = {}
    for claim in claims:
        by_feature.setdefault(claim.feature, []).append(claim)
    lines = [f"{_HEAD}{versions}."]
    for section, features in sections.items():
        lines += ["", f"## {section}", "", "| Feature | Verdict | Shown by |", "| --- | --- | --- |"]
        for feature in features:
            if shown := by_feature.get(feature):
                verdict = next((claim.verdict for claim in shown if claim.verdict != WORKS), WORKS)
                tests = ", ".join(_link(test) for test in dict.fromkeys(claim.test for claim in shown))
                lines.append(f"| {feature} | {verdict} | {tests} |")
    return "\n".join(lines) + "\n"


def without_versions(table: str) -> str:
    """The table less the line that depends on where it was written."""
    return "\n".join(line for line in table.splitlines() if not line.startswith(_VERSIONS))


def _link(test: str) -> str:
    path, _, name = test.partition("::")
    return f"[{name}](../{path})"


def _versions() -> str:
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    known = [f"{name} {installed[name]}" for name in VERSIONS_OF if name in installed]
    return ", ".join([f"Python {sys.version_info.major}.{sys.version_info.minor}", *known])


class _Recorder:
    """Note how every test ended, and write the table at the end."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self.target = root, target
        self.outcomes: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        outcome = report.outcome
        if report.skipped:
            outcome = report.longrepr[2] if isinstance(report.longrepr, tuple) else "expected to fail"
        self.outcomes.setdefault(report.nodeid.partition("[")[0], []).append(outcome)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        claims = read_claims(self.root)
        self.problems = check(claims)
        for test in dict.fromkeys(claim.test for claim in claims):
            how = set(self.outcomes.get(test, ["not run"]))
            if how != {"passed"}:
                self.problems.append(f"{test}: {', '.join(sorted(how - {'passed'}))}")
        if self.problems:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
            return
        text = render(claims, _versions())
        draft = self.target.with_name(f"{self.target.name}.tmp")
        draft.write_text(text, encoding="utf-8")
        draft.replace(self.target)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.problems:
            terminalreporter.section(f"{self.target} was not written")
            for problem in self.problems:
                terminalreporter.line(problem)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(_OPTION, metavar="FILE", type=Path, help="write the table of PEFT features from this run")


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark, and the recorder where the table is wanted."""
    config.addinivalue_line(
        "markers", "feature(name, verdict='works'): what a test shows in docs/peft_compatibility.md"
    )
    target = config.getoption(_OPTION)
    if target is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config.rootpath, target))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse marks that the table would not see, because they are not decorators of a plain test function."""
    seen = {(claim.test, claim.feature) for claim in read_claims(config.rootpath)}
    hidden = {
        f"{item.nodeid.partition('[')[0]}: {mark.args[0]}"
        for item in items
        for mark in item.iter_markers("feature")
        if (item.nodeid.partition("[")[0], mark.args[0]) not in seen
    }
    if hidden:
        raise pytest.UsageError(f"feature marks must be decorators of a test function, got {sorted(hidden)}.")
