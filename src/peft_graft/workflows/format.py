"""Numbers for people to read: plain tables, and sizes in bytes."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KB", "MB", "GB", "TB")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Set rows out in columns.

    Args:
        header: Names of the columns.
        rows: Cells; the first of each row names it and is aligned to the left, the others are numbers.

    Returns:
        Lines of text, without a final newline.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    set_out = []
    for first, *others in lines:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        set_out.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(set_out)


def size(nbytes: float) -> str:
    """Return a number of bytes in the unit that suits it: `13.4 MB`, with 1000 bytes to the KB."""
    for unit in _UNITS[:-1]:
        if nbytes < 999.5:
            return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 99.95 else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} {_UNITS[-1]}"
