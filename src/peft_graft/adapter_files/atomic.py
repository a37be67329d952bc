"""Directories that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


def require_room(target: Path, overwrite: bool, names: Collection[str] | None = None) -> None:
    """Refuse to write over files, unless told to.

    Args:
        target: The directory to write into.
        overwrite: Whether it may hold some of these files.
        names: Names of the files; None for any.

    Raises:
        FileExistsError: It holds one.
        NotADirectoryError: It is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output_dir must be a directory, got the file {str(target)!r}. Give another one.")
    held = sorted(file.name for file in target.iterdir()) if target.exists() else []
    in_the_way = [name for name in held if names is None or name in names]
    if in_the_way and not overwrite:
        what = "be empty" if names is None else "hold no adapter yet"
        raise FileExistsError(
            f"output_dir must {what}, got {in_the_way[0]!r} in {str(target)!r}. Give another one, or set overwrite."
        )


@contextmanager
def written_aside(target: Path, last: str = "") -> Iterator[Path]:
    """Let files be written into a directory beside the right one, and take their place when they are whole.

    Args:
        target: The right directory. Files of other names that are in it already stay.
        last: Name of the file that is put in place after all others, where `target` is there already.

    Yields:
        The directory to write into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
                os.replace(file, target / file.name)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
