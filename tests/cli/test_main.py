"""Arguments in either spelling, errors in one line, exit codes, and interrupts that are described truthfully."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from peft_graft.cli import main
from peft_graft.cli.commands import COMMANDS
from peft_graft.cli.main import build_parser
from peft_graft.patch.atomic import atomic_directory
from peft_graft.workflows import diff as diff_module
from peft_graft.workflows import extract as extract_module
from peft_graft.workflows import push as push_module
from peft_graft.workflows.extract import ExtractResult

EXTRACT = "extract base donor --output-dir out --density 0.1"
PUSH = "push me/skill skill"


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


def usage_error(capsys: pytest.CaptureFixture[str], line: str) -> str:
    with pytest.raises(SystemExit) as left:
        main(shlex.split(line))
    assert left.value.code == 2
    return capsys.readouterr().err


def replace(monkeypatch: pytest.MonkeyPatch, module: Any, does: Any) -> None:
    """Replace the function of a command's module by another."""
    monkeypatch.setattr(module, module.__name__.rpartition(".")[2], does)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Arguments


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"peft-graft {version('peft-graft')}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert all(re.search(rf"^ +{command.name} ", text, flags=re.M) for command in COMMANDS)


def test_snake_case_is_accepted() -> None:
    kebab = "extract b d --output-dir my_out --num-params 5 --target-modules q_proj v_proj --budget-scope=tensor"
    snake = "extract b d --output_dir my_out --num_params 5 --target_modules q_proj v_proj --budget_scope=tensor"
    one, other = (build_parser().parse_args(shlex.split(line)) for line in (kebab, snake))
    assert one == other and one.output_dir == "my_out" and one.target_modules == ["q_proj", "v_proj"]
    assert build_parser().parse_args(["push", "r", "d", "--no_private", "--commit_message=a_b"]).commit_message == "a_b"


@pytest.mark.parametrize("option", ["--out x", "--output x", "--dens 0.1", "--exa"])
def test_abbreviations_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = EXTRACT.replace("--output-dir out", "") if "--out" in option else EXTRACT.replace("--density 0.1", "")
    assert "peft-graft extract: error:" in usage_error(capsys, f"{line} {option}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("extract base donor --output-dir out", "one of the arguments --density --num-params --exact is required"),
        (f"{EXTRACT} --exact", "not allowed with argument"),
        ("export skill --to pickle --output-dir out", "invalid choice: 'pickle'"),
        ("push me/skill", "the following arguments are required: DIR"),
    ],
)
def test_wrong_usage_is_code_2(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in usage_error(capsys, line)


# Failures


@pytest.mark.parametrize("error", [ValueError("a\nb  c"), FileNotFoundError("a b c")])
def test_an_expected_error_is_one_line_and_code_1(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    replace(monkeypatch, diff_module, fail)
    assert run(capsys, "diff base donor") == (1, "", "peft-graft: error: a b c\n")
    with pytest.raises(type(error)):
        main(shlex.split("diff base donor --traceback"))


def test_a_mistake_of_this_package_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(monkeypatch, diff_module, lambda *args, **kwargs: {}["missing"])
    with pytest.raises(KeyError):
        main(shlex.split("diff base donor"))


# Interrupts


def test_an_interrupt_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    replace(monkeypatch, extract_module, stop)
    assert run(capsys, EXTRACT) == (130, "", "peft-graft: interrupted; nothing was written to out\n")
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    assert run(capsys, EXTRACT) == (130, "", "peft-graft: interrupted; nothing was written to out\n")
    replace(monkeypatch, diff_module, stop)
    assert run(capsys, "diff base donor") == (130, "", "peft-graft: interrupted\n")


def test_an_interrupt_after_the_adapter_was_put_in_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        Path("out").mkdir(exist_ok=True)
        Path("out/aside").write_text("new")
        os.replace("out/aside", "out/adapter_config.json")
        raise KeyboardInterrupt

    replace(monkeypatch, extract_module, stop)
    assert run(capsys, EXTRACT) == (130, "", "peft-graft: interrupted after out was written; it is complete\n")
    code, _, err = run(capsys, EXTRACT)
    assert code == 130
    assert err == "peft-graft: interrupted while files in out were replaced; run the command again with --overwrite\n"


def test_an_interrupted_push_may_have_happened(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    replace(monkeypatch, push_module, stop)
    message = "peft-graft: interrupted; look at me/skill on the Hub, which may have changed\n"
    assert run(capsys, PUSH) == (130, "", message)


# Quiet


def test_quiet_prints_the_result_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def extract(*args: Any, **kwargs: Any) -> ExtractResult:
        seen.append((kwargs["show_progress_bar"], are_progress_bars_disabled()))
        exec(
            compile("import warnings; warnings.warn('odd')", "x", "exec"), {"__name__": "peft_graft.workflows.extract"}
        )
        return ExtractResult(Path("out"), 5, 50, 500, 5000)

    replace(monkeypatch, extract_module, extract)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    before = warnings.showwarning, list(warnings.filters), are_progress_bars_disabled()
    code, out, err = run(capsys, EXTRACT)
    assert code == 0 and out.startswith("out: 5 of 50 entries, 500 B, ") and err == "peft-graft: warning: odd\n"
    assert run(capsys, f"{EXTRACT} --quiet") == (0, "out\n", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    run(capsys, EXTRACT)
    assert seen == [(True, before[2]), (False, True), (False, before[2])]
    assert (warnings.showwarning, list(warnings.filters), are_progress_bars_disabled()) == before


# Other signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_told_with_what_it_left(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        with atomic_directory(Path("out")) as aside:
            (aside / "half").write_text("half")
            signal.raise_signal(number)

    replace(monkeypatch, extract_module, stop)
    message = f"peft-graft: ended by {number.name}; nothing was written to out\n"
    assert run(capsys, EXTRACT) == (128 + number, "", message)
    assert list(Path().glob(".out*")) == []


def test_other_exits_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise SystemExit(7)

    replace(monkeypatch, diff_module, stop)
    with pytest.raises(SystemExit, match="7"):
        main(shlex.split("diff base donor"))
