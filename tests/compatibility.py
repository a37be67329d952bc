"""A pytest plugin: `--compatibility=FILE` writes the table of features from the tests that passed in this very run.

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
SECTIONS: dict[str, tuple[str, ...]] = {
    "Making, saving, loading": (
        "get_peft_model, forward",
        "save_pretrained, from_pretrained",
        "push_to_hub, from_pretrained of the Hub",
        "AutoPeftModelFor...",
        "loading before `import peft_graft`",
        "a PEFT before 0.21",
        "another base",
        "loading under another name",
        "load_adapter over a loaded one",
        "low_cpu_mem_usage",
        "torch_device",
        "is_trainable",
        "get_peft_model_state_dict, set_peft_model_state_dict",
        "state_dict and load_state_dict of the whole model",
        "inject_adapter_in_model",
        "add_adapter, enable_adapters, save_pretrained of transformers",
        "load_adapter of transformers",
        "model card of save_pretrained",
        "check_if_peft_model",
        "PeftConfig: from_pretrained, save_pretrained, deepcopy, pickle",
    ),
    "What can be targeted": (
        "every kind of module that owns parameters",
        "recurrent and parametrized modules",
        "integer weights",
        "target_modules: names, an expression, all-linear",
        "target_parameters, 3-D experts",
        "exclude_modules",
        "layers_to_transform, layers_pattern",
        "modules_to_save, task heads",
        "tied weights",
        "LoRA's own options in a config",
    ),
    "Switching and merging": (
        "set_adapter, add_adapter, delete_adapter",
        "active adapters and their order",
        "disable_adapter, disable_adapter_layers",
        "merge_adapter, unmerge_adapter, safe_merge",
        "merge_and_unload, unload",
        "several adapters of different targets",
        "several adapters active at once",
        "add_weighted_adapter",
        "adapter_names: an adapter for each row",
        "adapter_names with patches that all rows share",
        "several threads on one model",
        "hot-swapping",
        "rescale_adapter_scale",
    ),
    "Beside other methods": (
        "a graft merged into the base, then a LoRA",
        "a LoRA merged into the base, then a graft",
        "a fine-tuned LoRA as the donor",
        "prompt tuning of a grafted model",
        "a LoRA around or inside a graft",
        "PeftMixedModel",
        "convert_to_lora",
    ),
    "Training": (
        "gradients for the mask only",
        "print_trainable_parameters",
        "requires_grad of several adapters",
        "inference_mode",
        "Trainer: train, checkpoint, resume",
        "a loop with Accelerate",
        "DDP and FSDP2",
        "a mask learned by Trainer under every task type",
        "data-driven rules and fitted alpha under every task type",
        "TRL's SFTTrainer trains a learned mask",
        "gradient checkpointing, reentrant or not",
        "mixed precision",
        "autocast_adapter_dtype",
        "cast_mixed_precision_params",
    ),
    "Looking at the model": (
        "repr",
        "deepcopy, pickle",
        "get_layer_status, get_model_status",
        "forward hooks on base and wrapped modules",
        "disable_input_dtype_casting",
        "resize_token_embeddings",
    ),
    "Architectures": (
        "BERT, RoBERTa, GPT-2, Llama, Qwen, Mixtral, Mamba, T5, ViT, Whisper",
        "generate",
        "pipeline of transformers",
    ),
    "A base in another shape": (
        "the base in another float dtype",
        "half, bfloat16, to(dtype) of a grafted model",
        "device_map",
        "a base offloaded to memory",
        "data-driven rules on an offloaded base",
        "a base offloaded to disk",
        "a graft of the float base on a quantized one",
        "making a graft on a quantized base",
        "merging into a quantized base",
        "torch.compile",
        "torch.export",
        "torch.no_grad, torch.inference_mode",
    ),
}
_OPTION = "--compatibility"
_VERSIONS = "Written with "
_HEAD = f"""# What works with PEFT

Each row names the tests that show it, in `tests/`. "works" means that all of them pass; "no" means that they show the
error that you get instead. `make compatibility` writes this page, and only if every test passed in that run. The
default test suite checks that page and tests agree, so do not edit it by hand. `make suites` also runs PEFT's own
tests with grafts.

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
                tests = "<br>".join(f"`{claim.test.removeprefix('tests/')}`" for claim in shown)
                lines.append(f"| {feature} | {verdict} | {tests} |")
    return "\n".join(lines) + "\n"


def without_versions(table: str) -> str:
    """The table less the line that depends on where it was written."""
    return "\n".join(line for line in table.splitlines() if not line.startswith(_VERSIONS))


def _versions() -> str:
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    known = [f"{name} {installed[name]}" for name in VERSIONS_OF if name in installed]
    return ", ".join([f"Python {sys.version_info.major}.{sys.version_info.minor}", *known])


class _Recorder:
    """Note how every test ended, and write the table at the end."""

    def __init__(self, root: Path, target: Path) -> None:
        self.root, self.target = root, target
        self.outcomes: dict[str, list[str]] = {}
        self.problems: list[str] = []

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
