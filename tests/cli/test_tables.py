"""Results are plain columns in a pipe and tables of rich on a terminal, with the same cells."""

from __future__ import annotations

import sys

import pytest
import torch

from peft_graft.analysis.localization import locate
from peft_graft.cli.tables import format_size, print_diff, print_inspection, print_table
from peft_graft.workflows.diff import DiffResult, Distance
from peft_graft.workflows.inspect import InspectResult

ROWS = [("a[red]b", "1"), ("longer", "1,000")]


def pretend_terminal(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")  # no colours, so that cells can be compared
    monkeypatch.setenv("COLUMNS", str(columns))


def test_columns_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer", "n"), ROWS)
    assert capsys.readouterr().out == "layer        n\na[red]b      1\nlonger   1,000\n"


def test_a_table_may_be_empty(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("layer", "n"), [])
    assert capsys.readouterr().out == "layer  n\n"


def test_a_terminal_gets_a_table_with_the_same_cells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch, 100)
    print_table(("layer", "n"), ROWS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["layer", "n"] in lines and [list(row) for row in ROWS] == [
        line for line in lines if line[1:] and line[0] != "layer"
    ]
    assert any(len(line) == 1 and not line[0].isalnum() for line in lines)  # a rule below the header


def test_no_number_is_cut_where_the_terminal_is_narrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_terminal(monkeypatch, 30)
    print_table(("layer", "entries"), [("model.layers.10.self_attn.q_proj.weight", "1,234,567")])
    out = capsys.readouterr().out
    assert "1,234,567" in out and "…" not in out
    assert "".join(line.split()[0] for line in out.splitlines() if "─" not in line and line.split())[5:] == (
        "model.layers.10.self_attn.q_proj.weight"
    )


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (13_440, "13.4 KB"), (99_960, "100 KB"), (999_600, "1.0 MB"),
     (1.6e7, "16.0 MB"), (2.9e12, "2.9 TB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_have_three_digits_or_two(nbytes: float, text: str) -> None:
    assert format_size(nbytes) == text


def test_a_diff_has_a_row_per_layer_or_tensor(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = [Distance(f"h.{layer}.{name}", 10, 5, 1.0, 4.0, 1.0, 1.0, 0.5, 1.0) for layer in (2, 10) for name in "ab"]
    found = DiffResult(tensors, only_in_base=["x"], only_in_donor=[f"y{i}" for i in range(7)])
    print_diff(found, "layer")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["layer", "h.2", "h.10", "all"]
    assert lines[1].split() == ["h.2", "20", "50.00%", "1.00e-01", "2.828", "2.00e+00", "60°", "1.00e+00"]
    assert lines[4:] == ["only in the base: 1 (x)", "only in the donor: 7 (y0, y1, y2, y3, y4, ...)"]
    print_diff(found, "tensor")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:6]] == [
        "tensor", *(tensor.name for tensor in tensors), "all",
    ]  # fmt: skip


def test_an_inspection_shows_facts_bytes_and_places(capsys: pytest.CaptureFixture[str]) -> None:
    counts = {"h.0.mlp.weight": 30, "h.1.mlp.weight": 70}
    print_inspection(
        InspectResult(
            source="skill",
            nbytes={"header": 500, "indices": 200, "values": 300, "modules_to_save": 1000, "training": 0},
            entries=100,
            eligible=2000,
            tensors=2,
            values={"bfloat16": 2},
            codecs={"Rice": 1, "run": 1},
            place=locate({name: torch.empty(count, device="meta") for name, count in counts.items()}),
            origin={"density": 0.05, "donor": None},
            fingerprint={"sha256": "f" * 200},
        )
    )
    facts, parts, layers, modules = capsys.readouterr().out.split("\n\n")
    assert "entries      100 in 2 tensors, 1 in 20 of 2,000\n" in facts
    assert "bytes        2.0 KB, 10.00 an entry without modules_to_save\n" in facts
    assert "indices      Rice (1 tensors), run (1 tensors)\n" in facts
    assert "density      0.05\n" in facts and "donor" not in facts and facts.endswith("fff...")
    assert parts.splitlines()[1].split() == ["header", "500", "25.0%", "5.00"] and "training" not in parts
    assert [line.split() for line in layers.splitlines()[1:]] == [["0", "30", "30.0%"], ["1", "70", "70.0%"]]
    assert modules.splitlines()[1].split() == ["mlp", "100", "100.0%"]
