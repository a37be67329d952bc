"""Print results: tables of rich on a terminal, plain columns in a pipe or file."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a type is no reason to import torch
    from ..workflows.diff import DiffResult, Distance
    from ..workflows.inspect import InspectResult

_UNITS = ("B", "KB", "MB", "GB", "TB")
_MAX_NAMES = 5
_MAX_TEXT = 160


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns.

    Args:
        header: Names of the columns.
        rows: Cells; the first of each row is a name and aligned to the left, the others are aligned to the right.
    """
    if sys.stdout.isatty():
        _print_rich(header, rows)
    else:
        print(_in_columns([header, *rows]))


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Print pairs of a name and a text of any length."""
    width = max(len(name) for name, _ in facts)
    for name, text in facts:
        print(f"{name:<{width}}  {text}")


def print_json(fields: dict[str, Any]) -> None:
    """Print a result for other programs."""
    print(json.dumps(fields, indent=2))


def format_size(nbytes: float) -> str:
    """Return a number of bytes with a unit: `13.4 MB`, where 1 KB is 1000 bytes."""
    for unit in _UNITS[:-1]:
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 99.95 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} {_UNITS[-1]}"


def print_inspection(found: InspectResult) -> None:
    """Print the result of `inspect`: facts, bytes by purpose, entries by layer and by kind of module."""
    total, entries = sum(found.nbytes.values()), max(found.entries, 1)
    whole = " without modules_to_save" if found.nbytes["modules_to_save"] else ""
    share = f", 1 in {found.eligible / entries:,.0f} of {found.eligible:,}" if found.eligible else ""
    print_facts(
        [
            ("adapter", found.source),
            ("entries", f"{found.entries:,} in {found.tensors} tensors{share}"),
            ("bytes", f"{format_size(total)}, {found.bytes_per_entry:.2f} an entry{whole}"),
            ("values", _counted(found.values)),
            ("indices", _counted(found.codecs)),
            *((key, _shorten(value)) for key, value in found.origin.items() if value is not None),
            ("fingerprint", _shorten(found.fingerprint)),
        ]
    )
    print()
    parts = {part: count for part, count in found.nbytes.items() if count}
    print_table(
        ("bytes of", "bytes", "share", "per entry"),
        [(part, f"{n:,}", f"{n / total:.1%}", f"{n / entries:.2f}") for part, n in parts.items()],
    )
    for what, counts in (("layer", found.by_layer()), ("module", found.by_module())):
        print()
        print_table((what, "entries", "share"), [(name, f"{n:,}", f"{n / entries:.1%}") for name, n in counts.items()])


def print_diff(found: DiffResult, by: str) -> None:
    """Print the result of `diff`, with one row for each layer (`by="layer"`) or tensor (`by="tensor"`)."""
    distances = found.tensors if by == "tensor" else found.by_layer()
    header = (by, "entries", "differ", "mean |d|", "|d|", "|d|/|base|", "angle", "max |d|")
    print_table(header, [_row(each) for each in [*distances, found.total]])
    for what, names in (
        ("only in the base", found.only_in_base),
        ("only in the donor", found.only_in_donor),
        ("not compared", found.not_compared),
    ):
        if names:
            more = ", ..." if len(names) > _MAX_NAMES else ""
            print(f"{what}: {len(names)} ({', '.join(names[:_MAX_NAMES])}{more})")


def _row(each: Distance) -> tuple[str, ...]:
    return (
        each.name,
        f"{each.entries:,}",
        f"{each.differing / max(each.entries, 1):.2%}",
        f"{each.l1_mean:.2e}",
        f"{each.l2:.4g}",
        f"{each.l2_relative:.2e}",
        f"{180 * each.angle:.3g}°",
        f"{each.largest:.2e}",
    )


def _in_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        aligned.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(aligned)


def _print_rich(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number > 0)
    for row in rows:
        table.add_row(*row)
    # Names of tensors and regular expressions may hold brackets, which are no markup.
    Console(markup=False, emoji=False, highlight=False).print(table)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count} tensors)" for name, count in sorted(counts.items())) or "none"


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 3]}..."
