"""The command line: help that is fast and teaches, errors in one line, results that equal the library's."""

from __future__ import annotations

import filecmp
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models import perturbed, tiny_bert, tiny_llama
from peft_graft import GraftConfig
from peft_graft.cli import main
from peft_graft.cli.commands import COMMANDS
from peft_graft.cli.main import build_parser
from peft_graft.patch.combinations import COMBINATIONS
from peft_graft.workflows.diff import compare
from peft_graft.workflows.export import EXPORTS
from peft_graft.workflows.extract import extract
from peft_graft.workflows.inspect import read_anatomy

PROGRAM = [sys.executable, "-m", "peft_graft"]
NAMES = [command.name for command in COMMANDS]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with `base` and `donor`, which is also where commands run."""
    base = tiny_llama(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(shlex.split(line))
    out, err = capsys.readouterr()
    return code, out, err


# Help


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)], ids=lambda arguments: " ".join(arguments))
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    ran = subprocess.run([*PROGRAM[:1], "-X", "importtime", *PROGRAM[1:], *arguments, "--help"], capture_output=True)
    imported = set(re.findall(r"\| +([\w.]+)$", ran.stderr.decode(), flags=re.M))
    assert "argparse" in imported and ran.returncode == 0
    assert not imported & {"torch", "numpy", "peft", "transformers", "huggingface_hub", "safetensors", "tqdm"}


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"peft-graft {version('peft-graft')}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    text = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all(re.search(rf"^ +{name} ", text, flags=re.M) for name in NAMES)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_parse(command) -> None:
    lines = command.examples.replace("\\\n", " ").splitlines()
    examples = [line.split("|")[0].split(">")[0] for line in lines if line.strip().startswith("peft-graft")]
    assert len(examples) >= 2
    for example in examples:
        arguments = build_parser().parse_args(shlex.split(example)[1:])
        assert arguments.command == command.name


def test_every_option_is_explained() -> None:
    subparsers = next(action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
    bare = [
        f"{name} {action.option_strings or action.dest}"
        for name, parser in subparsers.choices.items()
        for action in parser._actions
        if not action.help
    ]
    assert bare == ["push ['--commit_message']"]


def test_the_forms_of_export_are_those_of_the_library() -> None:
    (to,) = (
        action
        for action in next(a for a in build_parser()._actions if a.choices).choices["export"]._actions
        if action.dest == "to"
    )
    assert set(to.choices) == EXPORTS.keys()


def test_the_combinations_of_stitch_are_those_of_the_library() -> None:
    stitch = next(a for a in build_parser()._actions if a.choices).choices["stitch"]
    (combination,) = (action for action in stitch._actions if action.dest == "combination")
    assert set(combination.choices) == COMBINATIONS.keys()


# Commands


def test_extract_is_the_librarys(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "extract base donor --output_dir one --num_params 50 --target_modules q_proj down_proj --alpha 0.5"
    code, out, err = run(capsys, line)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"one: 50 of [\d,]+ entries, [\d.]+ KB, [\d.]+ bytes an entry in all, in [\d.]+ s\n", out)
    config = GraftConfig(donor="donor", num_params=50, target_modules=["q_proj", "down_proj"], alpha=0.5)
    extract("base", config, "other")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(f"one/{name}", f"other/{name}", shallow=False)


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("q_proj", {"q_proj"}),
        ("self_attn.q_proj v_proj", {"self_attn.q_proj", "v_proj"}),
        ("'.*layers.1.*_proj'", ".*layers.1.*_proj"),
        ("all", {"embed_tokens", "lm_head"}),
    ],
)
def test_modules_are_names_or_one_expression(
    words: str, meant: set[str] | str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, f"extract base donor --output_dir out --density 0.1 --target_modules {words}")[0] == 0
    found = GraftConfig.from_pretrained("out").target_modules
    assert found == meant if words != "all" else found > meant


def test_an_exact_patch_warns_in_one_line(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "extract base donor --output_dir out --exact")
    assert code == 0
    assert re.fullmatch(r"peft-graft: warning: patch should be smaller than the donor, .*\n", err)


def test_inspect_and_diff(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract base donor --output_dir skill --density 0.05")
    code, out, _ = run(capsys, "inspect skill --json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(read_anatomy("skill").to_dict()))
    assert run(capsys, "inspect skill")[1] == read_anatomy("skill").to_text() + "\n"
    code, out, err = run(capsys, "diff base donor --json")
    assert (code, err) == (0, "") and json.loads(out)["total"] == compare("base", "donor").total.to_dict()
    assert run(capsys, "diff base donor --by tensor")[1] == compare("base", "donor").to_text(by_tensor=True) + "\n"


def test_stitch_says_how_much_is_contested(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        run(capsys, f"extract base donor --output_dir {name} --density 0.5 --selection random --seed {seed}")
    code, out, _ = run(capsys, "stitch one other --weights 1 -0.5 --combination mean --output_dir both")
    counts = {
        name: json.loads((pair / name / "adapter_config.json").read_text())["entries"] for name in ("one", "both")
    }
    contested = 2 * counts["one"] - counts["both"]
    assert code == 0 and out.startswith(f"both: {counts['both']:,} entries, ")
    assert out.endswith(f"; taken by more than one of the 2 adapters: {contested:,}\n")


def test_export_says_what_is_left_out(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract base donor --output_dir skill --density 0.05")
    code, out, _ = run(capsys, "export skill --to lora --rank 2 --output_dir lora")
    assert code == 0
    assert re.search(
        r"^lora: \d+ of 234 entries of the patch\nleft out: \d+ entries of LlamaRMSNorm\.weight$", out, re.M
    )
    assert re.search(r"^model\.layers\.0\.mlp\.down_proj +0\.\d{3}$", out, re.M)
    code, out, _ = run(capsys, "export skill --to vllm --output_dir vllm --json")
    assert code == 0 and json.loads(out)["carried"] == 234


# Errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extract base nowhere --output_dir out --density 0.1", "donor must be a directory, or a Hub id"),
        ("extract nowhere donor --output_dir out --density 0.1", "base must be a directory, or a Hub id"),
        ("extract base base --output_dir out --density 0.1", "donor must differ from the base"),
        ("extract base bert --output_dir out --density 0.1", "donor must hold every targeted tensor of the base"),
        ("extract base donor --output_dir out --density 7", "density must be in (0, 1], got 7.0"),
        ("extract base donor --output_dir out --density 1e-9", "density must give at least one entry"),
        ("extract base donor --output_dir out --density 0.1 --selection fisher", "selection must need no data here"),
        ("extract base donor --output_dir out --density 0.1 --selection nonsense", "selection must be one of"),
        ("extract base donor --output_dir base/config.json --density 0.1", "output_dir must be a directory"),
        ("inspect base", "adapter must be a directory or repository with a graft's"),
        ("inspect nobody/nothing", "adapter must be a directory, or a Hub id"),
        ("diff base nowhere", "donor must be a directory, or a Hub id"),
        ("export base --to lora --output_dir out", "adapter must be a finished graft"),
        ("export ./nowhere --to lora --output_dir out", "adapter must be a directory, or a Hub id, got './nowhere'"),
        ("stitch base base --output_dir out", "adapter_config.json and adapter_model.safetensors, got none in 'base'"),
        ("inspect ./nowhere", "adapter must be a directory, or a Hub id, got './nowhere'"),
        ("push base me/skill", "directory must hold a saved graft"),
    ],
)
def test_errors_are_one_line_and_code_2(
    line: str, message: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "bert" in line:
        tiny_bert().save_pretrained("bert")
    before = sorted(path.name for path in pair.iterdir())
    code, out, err = run(capsys, line)
    assert code == 2 and out == ""
    assert err.startswith("peft-graft: error: ") and message in err and err.count("\n") == 1
    assert sorted(path.name for path in pair.iterdir()) == before


def test_a_traceback_can_be_asked_for(pair: Path) -> None:
    with pytest.raises(ValueError, match="donor must differ from the base"):
        main(shlex.split("--traceback extract base base --output_dir out --density 0.1"))


def test_a_budget_is_needed_and_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    for budget in ("", "--density 0.1 --exact"):
        with pytest.raises(SystemExit) as exit_:
            main(shlex.split(f"extract base donor --output_dir out {budget}"))
        assert exit_.value.code == 2


# Real processes


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, num_hidden_layers=3, intermediate_size=1024, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    command = [*PROGRAM, "extract", "base", "donor", "--output_dir", "out", "--density", "0.5"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".out.*.tmp")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not (tmp_path / "out").exists()
    extract(tmp_path / "base", GraftConfig(donor=tmp_path / "donor", num_params=1), tmp_path / "out")  # no trace of it


def test_an_error_in_a_process_of_its_own(pair: Path) -> None:
    ran = subprocess.run([*PROGRAM, "diff", "base", "nowhere"], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("peft-graft: error: donor must be")
