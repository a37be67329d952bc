"""Write files and directories that appear whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Files by which transformers, diffusers and others recognize a model. A Trainer's arguments lie beside adapters, too.
_MODEL_FILES = (
    *("config.json", "model_index.json", "model*.safetensors", "diffusion_pytorch_model*.safetensors"),
    *("*.bin", "*.h5", "*.msgpack", "*.gguf"),
)
_NO_MODEL_FILES = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin"})
# Signals that end a process where nothing handles them. Not SIGINT, which Python handles, nor those of crashes.
_ENDING = ("SIGTERM", "SIGHUP", "SIGXCPU", "SIGUSR1", "SIGUSR2")


class Terminated(SystemExit):
    """The process is being ended by a signal: its exit code is 128 + the signal's number, as in a shell.

    Args:
        number: Number of the signal.

    Attributes:
        name: Name of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextmanager
def ends_by_exception() -> Iterator[None]:
    """Turn signals that would end the process at once, such as SIGTERM, into an exception, so that files are removed.

    A signal that the program handles or ignores is left alone, and so are all in threads other than the main one.

    Raises:
        Terminated: Such a signal came.
    """
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _ENDING if hasattr(signal, name)):
                if signal.getsignal(number) is signal.SIG_DFL:
                    stack.callback(signal.signal, number, signal.SIG_DFL)
                    signal.signal(number, _terminate)
        yield


def _terminate(number: int, frame: object) -> NoReturn:
    raise Terminated(number)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Write a file under a temporary name beside its own, and rename it when the block ends without an error.

    Args:
        path: The file. An older file of this name is replaced; an error in the block leaves it as it was.

    Yields:
        The temporary path to write to.
    """
    temporary = _temporary_beside(path)
    with ends_by_exception():
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
    _remove_leftovers(target)
    with ends_by_exception(), _locked_directory(target) as temporary:
        yield temporary
        if target.exists():
            for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
                os.replace(file, target / file.name)
        else:
            os.rename(temporary, target)


def check_output_dir(
    target: Path,
    overwrite: bool,
    names: Collection[str] | None = None,
    inputs: Mapping[str, str | os.PathLike[str] | None] | None = None,
    writes_model: bool = False,
) -> None:
    """Refuse an output directory in which files of the user would be lost.

    Args:
        target: The directory, which need not exist.
        overwrite: Whether to accept it with files in it that would be written over. An input or a model never is.
        names: Names of the files that would be written; None if the directory must be empty.
        inputs: What the output is made from, by its name for the error message: directories, files, Hub ids or None.
        writes_model: Whether the output is a model, not an adapter or the like. The two do not go into one directory:
            libraries that load a model take an adapter beside it into account.

    Raises:
        FileExistsError: It is an input, holds a model (or an adapter, if a model is written), or holds such a file and
            `overwrite` is not set.
        NotADirectoryError: It is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"output_dir must be a directory, got the file {str(target)!r}.")
    for role, source in (inputs or {}).items():
        if source is not None and _is_directory_of(target, Path(source)):
            raise FileExistsError(
                f"output_dir must be another directory than those that are read, got {str(target)!r}, which holds the "
                f"{role} {os.fspath(source)!r}. Give a new directory, such as output_dir={str(target) + '-graft'!r}."
            )
    held = sorted(file.name for file in target.iterdir()) if target.exists() else []
    kind, others = ("adapter", {*held} & {"adapter_config.json"}) if writes_model else ("model", _model_files(held))
    if others:
        raise FileExistsError(
            f"output_dir must hold no {kind}, got {min(others)!r} in {str(target)!r}. In one directory with an "
            f"adapter, a model does not load as itself. Give a new one, such as output_dir={str(target) + '-graft'!r}."
        )
    blocking = [name for name in held if names is None or name in names]
    if blocking and not overwrite:
        constraint = "be empty" if names is None else "hold no adapter yet"
        raise FileExistsError(
            f"output_dir must {constraint}, got {blocking[0]!r} in {str(target)!r}. Set overwrite to replace files of "
            "the same names; others stay."
        )


def _is_directory_of(target: Path, source: Path) -> bool:
    """Return whether an input is this directory or a file in it, whatever links lead there."""
    if not target.exists() or not source.exists():
        return False
    return target.samefile(source if source.is_dir() else source.parent)


def _model_files(names: Collection[str]) -> set[str]:
    return {name for name in names if name not in _NO_MODEL_FILES and any(fnmatch(name, each) for each in _MODEL_FILES)}


def _temporary_beside(path: Path) -> Path:
    # In the same directory, because a rename between file systems is neither atomic nor always possible.
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def _locked_directory(target: Path) -> Iterator[Path]:
    """Make a temporary directory beside another, lock it while it is in use, and remove it if it is still there.

    The lock ends with the process, however that ends, and so shows which directories are left over.
    """
    while True:
        temporary = _temporary_beside(target)
        temporary.mkdir()
        try:
            with _lock(temporary) as locked:
                if locked is False or not temporary.exists():
                    continue  # another process has taken it for a leftover before it was locked
                yield temporary
                return
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(directory: Path) -> Iterator[bool | None]:
    """Lock a directory, and yield whether this could be done: False if somebody holds it, None if nobody ever can."""
    if fcntl is None:
        yield None
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:  # held, or a file system without locks
            yield False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
            return
        yield True
    finally:
        os.close(handle)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary directories that processes left beside a directory when they were killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError), _lock(path) as locked:
            if locked:
                shutil.rmtree(path, ignore_errors=True)
