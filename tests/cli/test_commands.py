"""Every command is the library's function of the same name, with the same arguments."""

from __future__ import annotations

import argparse
import filecmp
import inspect as signatures
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peft_graft
from models import perturbed, tiny_bert, tiny_llama
from peft_graft import GraftConfig, diff, extract, inspect
from peft_graft.cli import main
from peft_graft.cli.commands import CLI_ONLY, COMMANDS, Command
from peft_graft.cli.main import build_parser
from peft_graft.patch.combinations import COMBINATIONS
from peft_graft.workflows.export import EXPORTS

# As the entry point runs it, from the sources.
PROGRAM = [sys.executable, "-c", "import sys; from _peft_graft_cli import main; sys.exit(main())"]
# Arguments of the functions that the command line sets by itself: a bar is for terminals, and further fields of
# GraftConfig are for Python.
PYTHON_ONLY = {"show_progress_bar", "config_options"}


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


def actions(command: Command) -> dict[str, argparse.Action]:
    """A command's arguments by name."""
    parser = argparse.ArgumentParser(add_help=False)
    command.add_arguments(parser)
    return {action.dest: action for action in parser._actions}


# The table


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_options_are_the_arguments_of_the_function(command: Command) -> None:
    assert command.name in peft_graft.__all__
    parameters = signatures.signature(getattr(peft_graft, command.name)).parameters
    found = actions(command)
    assert found.keys() - CLI_ONLY == parameters.keys() - PYTHON_ONLY
    for name in found.keys() - CLI_ONLY:
        required, default = found[name].required, parameters[name].default
        assert required == (default is default_missing) or name in ("density", "num_params", "exact")
        assert required or found[name].default == default, name
    positional = [name for name, action in found.items() if not action.option_strings]
    assert [*parameters][: len(positional)] == positional


default_missing = signatures.Parameter.empty


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_options_are_kebab_case_and_explained(command: Command) -> None:
    found = actions(command)
    assert [action.dest for action in found.values() if not action.help] == []
    for name, action in found.items():
        if action.option_strings:
            assert action.option_strings[0] == f"--{name.replace('_', '-')}"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_examples_parse(command: Command) -> None:
    lines = command.examples.replace("\\\n", " ").splitlines()
    examples = [line.split("|")[0].split(">")[0] for line in lines if line.strip().startswith("peft-graft")]
    assert len(examples) >= 2
    for example in examples:
        assert "_" not in " ".join(word for word in example.split() if word.startswith("--"))
        assert build_parser().parse_args(shlex.split(example)[1:]).command == command.name


@pytest.mark.parametrize(
    ("name", "option", "table"), [("export", "to", EXPORTS), ("stitch", "combination_type", COMBINATIONS)]
)
def test_choices_are_those_of_the_library(name: str, option: str, table: dict[str, object]) -> None:
    (command,) = (command for command in COMMANDS if command.name == name)
    assert set(actions(command)[option].choices or ()) == table.keys()


# Commands


def test_extract_is_the_librarys(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "extract base donor --output-dir one --num-params 50 --target-modules q_proj down_proj --alpha 0.5"
    code, out, err = run(capsys, line)
    assert code == 0 and re.fullmatch(r"peft-graft: note: donor differs from the base in 17 of 17 .* all\) .*\n", err)
    assert run(capsys, f"{line} --overwrite --quiet") == (0, "one\n", "")
    assert re.fullmatch(r"one: 50 of [\d,]+ entries, [\d.]+ K?B, [\d.]+ bytes per entry in all, in [\d.]+ s\n", out)
    extract("base", "donor", "other", num_params=50, target_modules=["q_proj", "down_proj"], alpha=0.5)
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
    assert run(capsys, f"extract base donor --output-dir out --density 0.1 --target-modules {words}")[0] == 0
    found = GraftConfig.from_pretrained("out").target_modules
    assert found == meant if words != "all" else found > meant


def test_an_exact_patch_is_smaller_than_a_donor_in_which_everything_differs(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "extract base donor --output-dir out --exact")[::2] == (0, "")
    sizes = [Path(name).stat().st_size for name in ("out/adapter_model.safetensors", "donor/model.safetensors")]
    assert sizes[0] < sizes[1]


def test_inspect_and_diff(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract base donor --output-dir skill --density 0.05")
    code, out, _ = run(capsys, "inspect skill --json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(inspect("skill").to_dict()))
    assert "234 in " in run(capsys, "inspect skill")[1]
    code, out, err = run(capsys, "diff base donor --json")
    assert (code, err) == (0, "") and json.loads(out)["total"] == diff("base", "donor").total.to_dict()
    tensors = run(capsys, "diff base donor --by tensor")[1].splitlines()
    assert [line.split()[0] for line in tensors[1:-1]] == [each.name for each in diff("base", "donor").tensors]


def test_stitch_says_how_much_is_contested(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("one", 1), ("other", 2)):
        run(capsys, f"extract base donor --output-dir {name} --density 0.5 --selection random --seed {seed}")
    code, out, _ = run(capsys, "stitch one other --weights 1 -0.5 --combination-type mean --output-dir both")
    counts = {
        name: json.loads((pair / name / "adapter_config.json").read_text())["record"]["entries"]
        for name in ("one", "both")
    }
    contested = 2 * counts["one"] - counts["both"]
    assert code == 0 and out.startswith(f"both: {counts['both']:,} entries, ")
    assert out.endswith(f"; taken by more than one of the 2 adapters: {contested:,}\n")


def test_export_says_what_is_left_out(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "extract base donor --output-dir skill --density 0.05")
    code, out, _ = run(capsys, "export skill --to lora --rank 2 --output-dir lora")
    assert code == 0
    assert re.search(
        r"^lora: \d+ of 234 entries of the patch\nleft out: \d+ entries of LlamaRMSNorm\.weight$", out, re.M
    )
    assert re.search(r"^model\.layers\.0\.mlp\.down_proj +0\.\d{3}$", out, re.M)
    code, out, _ = run(capsys, "export skill --to vllm --output-dir vllm --json")
    assert code == 0 and json.loads(out)["carried"] == 234


# Errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("extract base nowhere --output-dir out --density 0.1", "donor must be a directory, or a Hub id"),
        ("extract nowhere donor --output-dir out --density 0.1", "base must be a directory, or a Hub id"),
        ("extract base base --output-dir out --density 0.1", "donor must differ from the base"),
        ("extract base bert --output-dir out --density 0.1", "donor must hold every targeted tensor of the base"),
        ("extract base donor --output-dir out --density 7", "density must be in (0, 1], got 7.0"),
        ("extract base donor --output-dir out --density 1e-9", "density must give at least one entry"),
        ("extract base donor --output-dir out --density 0.1 --selection fisher", "selection must need no data here"),
        ("extract base donor --output-dir out --density 0.1 --selection nonsense", "selection must be one of"),
        ("extract base donor --output-dir base/config.json --density 0.1", "output_dir must be a directory"),
        ("inspect base", "adapter must be a directory or repository with a graft's"),
        ("inspect nobody/nothing", "adapter must be a directory, or a Hub id"),
        ("diff base nowhere", "donor must be a directory, or a Hub id"),
        ("export base --to lora --output-dir out", "adapter must be a finished graft"),
        ("export ./nowhere --to lora --output-dir out", "adapter must be an existing directory or a Hub id"),
        ("stitch base base --output-dir out", "adapter_config.json and adapter_model.safetensors, got none in 'base'"),
        ("inspect ./nowhere", "adapter must be an existing directory or a Hub id, got './nowhere'"),
        ("push me/skill base", "directory must hold a saved graft"),
        ("push ./skill me/skill", "the repository comes before the directory"),
    ],
)
def test_errors_are_one_line_and_code_1(
    line: str, message: str, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "bert" in line:
        tiny_bert().save_pretrained("bert")
    before = sorted(path.name for path in pair.iterdir())
    code, out, err = run(capsys, line)
    assert code == 1 and out == ""
    assert err.startswith("peft-graft: error: ") and message in err and err.count("\n") == 1
    assert sorted(path.name for path in pair.iterdir()) == before


# Real processes


def test_a_killed_run_leaves_nothing_half_written(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, num_hidden_layers=3, intermediate_size=1024, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    command = [*PROGRAM, "extract", "base", "donor", "--output-dir", "out", "--density", "0.5"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
    while not list(tmp_path.glob(".out.*.tmp")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert not (tmp_path / "out").exists()
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", num_params=1)  # no trace of it


def test_an_error_in_a_process_of_its_own(pair: Path) -> None:
    ran = subprocess.run([*PROGRAM, "diff", "base", "nowhere"], capture_output=True, text=True)
    assert ran.returncode == 1 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and ran.stderr.startswith("peft-graft: error: donor must be")
