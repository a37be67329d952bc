"""Write files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside its own, and rename it when the block ends without an error.

    Args:
        path: The file. An older file of this name is replaced; an error in the block leaves it as it was.

    Yields:
        The temporary path to write to.
    """
    temporary = _temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(target: Path, last: str = "") -> Iterator[Path]:
    """Write a directory under a temporary name beside its own, and rename it when the block ends without an error.

    Args:
        target: The directory. If it exists, the new files are moved into it one by one; files of other names stay. An
            error in the block leaves it as it was.
        last: Name of the file to move after all others into a directory that exists: the one that readers look for.

    Yields:
        The temporary directory to write into.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_beside(target)
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


def check_output_dir(target: Path, overwrite: bool, names: Collection[str] | None = None) -> None:
    """Refuse an output directory that holds files which would be written over, unless told to overwrite them.

    Args:
        target: The directory, which need not exist.
        overwrite: Whether to accept it with such files in it.
        names: Names of the files that would be written; None if the directory must be empty.

    Raises:
        FileExistsError: It holds such a file, and `overwrite` is not set.
        NotADirectoryError: It is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output_dir must be a directory, got the file {str(target)!r}.")
    held = sorted(file.name for file in target.iterdir()) if target.exists() else []
    blocking = [name for name in held if names is None or name in names]
    if blocking and not overwrite:
        constraint = "be empty" if names is None else "hold no adapter yet"
        raise FileExistsError(
            f"output_dir must {constraint}, got {blocking[0]!r} in {str(target)!r}. Set overwrite to replace files of "
            "the same names; others stay."
        )


def _temporary_beside(path: Path) -> Path:
    # In the same directory, because a rename between file systems is neither atomic nor always possible.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
