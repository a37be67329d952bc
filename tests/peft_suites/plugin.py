"""pytest plugin: gives PEFT's tests the graft cases, leaves out what does not apply, and tells what it left out."""

from __future__ import annotations

import importlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    CUSTOM,
    TOGETHER,
    FixedLike,
    Graft,
    LoraLike,
    TiedModel,
    for_parameters,
    for_task,
    in_place_of_lora,
    like_loras,
    meet_the_base,
)
from PIL import Image
from rules import BORROWED, BORROWED_FIXED, DESELECTED, EXEMPTIONS, SAME_BASE

from peft_graft import GraftConfig

torch.set_num_threads(1)
meet_the_base()

_HEAD = """# Grafts in PEFT's own tests

Written by `python tests/peft_suites/run.py --report FILE`. PEFT's parametrised tests run with the cases of `cases.py`
instead of PEFT's own methods, and those of `rules.py` that take LoRA as an example run with a graft in its place.
Models are tiny and random (`tiny_hub.py`), under the names that PEFT's tests load. "Not about grafts" are tests of one
other method, or of none. What else is left out has its reason below; `rules.py` says which tests these are, and where a
graft takes part in an exemption that PEFT makes for one of its methods.
"""

_FOREIGN = "about one other method, or about none"
_outcomes: dict[str, Counter[str]] = defaultdict(Counter)
_left_out: dict[str, Counter[str]] = defaultdict(Counter)
_skipped: Counter[str] = Counter()

# What to run a parametrised test with instead of PEFT's own rows, by the names of its arguments.
_CASES: dict[str, Callable[[list[Any]], Any]] = {
    "test_name, model_id, config_cls, config_kwargs": lambda rows: CUSTOM,
    "test_name, tuner_method, config_cls, config_kwargs_1, config_kwargs_2": lambda rows: TOGETHER,
    "config_cls": lambda rows: [Graft],
    "config_cls,config_kwargs": lambda rows: for_task(rows[0][1].get("task_type")),
    "model_id,config_cls,config_kwargs": for_parameters,
    "config_class, mandatory_kwargs": lambda rows: [(GraftConfig, {})],
    "config_class": lambda rows: [GraftConfig],
    "test_name, config0, config1": like_loras,
    "config0": like_loras,
    "peft_config": like_loras,
    "config": like_loras,
}


class _Everything(dict[str, int]):
    """PEFT's record of the models that were loaded before, for which it goes offline: all of them."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return 0


def pytest_configure() -> None:
    """Keep PEFT's tests off the network."""
    utilities = importlib.import_module("tests.testing_utils")
    utilities._HUB_MODEL_ACCESSES = _Everything()
    utilities.load_cat_image = lambda: Image.effect_noise((64, 64), 50).convert("RGB")


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: Any) -> None:
    """Replace PEFT's lists of methods by ours."""
    marks = metafunc.definition.own_markers
    for position, mark in enumerate(marks):
        if mark.name == "parametrize" and mark.args[0] in _CASES:
            names, rows = mark.args[:2]
            marks[position] = pytest.mark.parametrize(names, list(_CASES[names](rows))).mark


def _matches(rules: list[str], item: Any) -> bool:
    return any(re.search(rule, item.nodeid) for rule in rules)


def _why_not(item: Any) -> str | None:
    """Why a test is not run, or None."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    grafts = any(isinstance(value, GraftConfig) or value in (Graft, GraftConfig) for value in values)
    if not grafts and not _matches(BORROWED + BORROWED_FIXED, item):
        return _FOREIGN
    return next((rule.reason for rule in DESELECTED if re.search(rule.tests, item.nodeid)), None)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep what is about grafts and applies to them."""
    kept, dropped = [], []
    for item in items:
        reason = _why_not(item)
        if reason is None:
            kept.append(item)
        else:
            dropped.append(item)
            _left_out[reason][item.path.stem] += 1
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: Any) -> None:
    """Let grafts take the part of other methods, as the rules say; before fixtures, which make configs too."""
    item.patches = patches = pytest.MonkeyPatch()
    for exemption in EXEMPTIONS:
        if re.search(exemption.tests, item.nodeid):
            module = importlib.import_module(f"tests.{exemption.module}")
            patches.setattr(module, exemption.name, exemption.stand_in)
    for rules, config in ((BORROWED, LoraLike), (BORROWED_FIXED, FixedLike)):
        if _matches(rules, item):
            patches.setattr(item.module, "LoraConfig", config)
    if _matches(BORROWED, item) and hasattr(item.cls, "check_requires_grad"):
        check = item.cls.check_requires_grad
        patches.setattr(
            item.cls,
            "check_requires_grad",
            lambda self, model, *names: check(self, model, *in_place_of_lora(model, names)),
        )
    if _matches(SAME_BASE, item):
        for layer in (torch.nn.Linear, torch.nn.Embedding):
            patches.setattr(layer, "reset_parameters", _seeded(layer.reset_parameters))
    if (models := getattr(item.module, "MockTransformerWrapper", None)) is not None:
        patches.setattr(models, "from_pretrained", _with_tied(models.from_pretrained))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: Any) -> None:
    """Give the names back."""
    item.patches.undo()


def _seeded(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    def reset_parameters(self: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            stock(self)

    return reset_parameters


def _with_tied(stock: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        if model_id != "tied":
            return stock(model_id, dtype=dtype)
        torch.manual_seed(0)
        return TiedModel().to(dtype or torch.float32)

    return from_pretrained


def pytest_runtest_logreport(report: Any) -> None:
    """Count."""
    suite = Path(report.nodeid.partition("::")[0]).stem
    if report.when == "call" or report.outcome != "passed":
        _outcomes[suite][report.outcome] += 1
    if report.skipped:  # also what PEFT expects to fail
        _skipped[getattr(report, "wasxfail", None) or report.longrepr[2].removeprefix("Skipped: ")] += 1


def _table() -> Iterator[str]:
    suites = sorted(_outcomes.keys() | {suite for counts in _left_out.values() for suite in counts})
    rows = [
        [
            suite,
            *(_outcomes[suite][key] for key in ("passed", "failed", "skipped")),
            sum(counts[suite] for reason, counts in _left_out.items() if reason != _FOREIGN),
            _left_out[_FOREIGN][suite],
        ]
        for suite in suites
    ]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    yield f"PEFT {version('peft')}, transformers {version('transformers')}, torch {version('torch')}.\n"
    yield "| suite | passed | failed | skipped by PEFT | do not apply | not about grafts |"
    yield "| --- | --- | --- | --- | --- | --- |"
    yield from (f"| {' | '.join(map(str, row))} |" for row in rows)
    yield "\nTests that do not apply:\n"
    yield from (f"- {sum(counts.values())}: {why}" for why, counts in _left_out.items() if why != _FOREIGN)
    yield "\nSkipped by PEFT:\n"
    yield from (f"- {count}: {why.replace('<', '').replace('>', '')}" for why, count in _skipped.most_common())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the table, and write it where `--report` says."""
    if not _outcomes:
        return
    lines = list(_table())
    terminalreporter.section("grafts in PEFT's suites")
    terminalreporter.write_line("\n".join(lines))
    if report := os.environ.get("PEFT_SUITES_REPORT"):
        Path(report).write_text(f"{_HEAD}\n" + "\n".join(lines) + "\n", encoding="utf-8")
