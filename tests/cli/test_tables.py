"""Numbers for people to read."""

from __future__ import annotations

import pytest

from peft_graft.workflows.format import size, table


def test_columns_line_up() -> None:
    assert table(("layer", "n"), [("a", "1"), ("longer", "1,000")]) == "layer       n\na           1\nlonger  1,000"


def test_a_table_may_be_empty() -> None:
    assert table(("layer", "n"), []) == "layer  n"


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 KB"), (13_440, "13.4 KB"), (99_960, "100 KB"), (999_600, "1.0 MB"),
     (1.6e7, "16.0 MB"), (2.9e12, "2.9 TB"), (5e15, "5000.0 TB")],
)  # fmt: skip
def test_sizes_have_three_digits_or_two(nbytes: float, text: str) -> None:
    assert size(nbytes) == text
