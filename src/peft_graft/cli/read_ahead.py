"""Read checkpoints into memory while Python imports torch, which takes seconds and leaves the disk idle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from threading import Event, Thread

_STEP = 1 << 26


@contextmanager
def read_ahead(*sources: str) -> Iterator[None]:
    """Have the kernel read local checkpoints into its page cache, all of them at the same rate, up to half the memory.

    Args:
        sources: Directories of safetensors files; anything else is ignored.
    """
    stop = Event()
    thread = Thread(target=_read, args=(sources, stop), daemon=True)
    if hasattr(os, "posix_fadvise"):
        thread.start()
    try:
        yield
    finally:
        stop.set()


def _read(sources: tuple[str, ...], stop: Event) -> None:
    with suppress(OSError):  # the command itself reports files that cannot be read
        _advise([sorted(Path(source).glob("*.safetensors")) for source in sources], stop)


def _advise(files: list[list[Path]], stop: Event) -> None:
    left = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with ExitStack() as stack:
        for side_by_side in zip_longest(*files):
            opened = [stack.enter_context(path.open("rb")) for path in side_by_side if path is not None]
            for start in range(0, max(os.fstat(file.fileno()).st_size for file in opened), _STEP):
                for file in opened:
                    if stop.is_set() or left <= 0:
                        return
                    os.posix_fadvise(file.fileno(), start, _STEP, os.POSIX_FADV_WILLNEED)
                    left -= _STEP
