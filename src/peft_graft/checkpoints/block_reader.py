"""Read two checkpoints side by side, block by block, in memory that does not grow with them."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

import torch

from .donor import FLOAT_DTYPES, DonorError, Extent
from .pairing import Block, Span, settle_nonfinite

# Entries of one read, and of one block that is handed out.
READ_ENTRIES = 1 << 21
BLOCK_ENTRIES = 1 << 20
# Reads that are done or under way beyond those that are being worked on, and reads that the kernel is told of ahead:
# enough to keep a disk busy while the results are put together.
_AHEAD = 2
_ADVISED = 64
# Threads that work at most, each with what was read of either side: then memory does not grow with the number of cores.
MAX_WORKERS = 8

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


class PairedReader:
    """Tensors of a base beside those of a donor, both in files.

    Args:
        base: Where each tensor stands: one extent, or several that follow each other in its flat order.
        donor: The same for the donor, with the same names and counts; None where every donor value is zero.
        dtypes: Dtype that the base has when it is loaded, by name; values are cast where the file has another one.

    Attributes:
        sizes: Number of entries by name, in increasing order.
        whole_tensors: False: tensors are handed out in blocks.
        with_unchanged_nan: Names of the tensors seen to have the same NaN or Inf in the base and in the donor.
        on_read: Called with the number of bytes of every read, in the thread that works on them.

    Raises:
        DonorError: A tensor is not of a floating-point dtype.
    """

    whole_tensors = False

    def __init__(
        self,
        base: Mapping[str, Sequence[Extent]],
        donor: Mapping[str, Sequence[Extent]] | None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._sides = [base] if donor is None else [base, donor]
        self._dtypes = dtypes or {}
        self.with_unchanged_nan: set[str] = set()
        self.on_read: Callable[[int], object] = lambda nbytes: None
        for role, side in zip(("base", "donor"), self._sides, strict=False):
            _refuse_dtypes(role, side)
        self.sizes = {name: sum(_count(extent) for extent in base[name]) for name in sorted(base)}

    @property
    def nbytes(self) -> tuple[int, int]:
        """Return the bytes that one pass reads of the base, and of the donor."""
        base, *donor = (
            sum(size * _dtype(side[name]).itemsize for name, size in self.sizes.items()) for side in self._sides
        )
        return base, sum(donor)

    def dtype(self, name: str, donor: bool = False) -> torch.dtype:
        """Return the dtype of a tensor's values in the base as it is loaded, or in the donor."""
        if donor and len(self._sides) == 2:
            return _dtype(self._sides[1][name])
        return self._dtypes.get(name, _dtype(self._sides[0][name]))

    def map(
        self,
        work: Callable[[Block], T],
        names: Iterable[str] | None = None,
        workers: int | None = None,
        block_entries: int | None = None,
    ) -> Iterator[tuple[Span, T]]:
        """Call a function on every block while later ones are being read.

        Args:
            work: Called in another thread, in which each torch operation runs on one core. Its result must not share
                the block's memory, which is used again.
            names: Tensors to read, in increasing order; None for all.
            workers: Number of threads that work; a single one works through the blocks in order. Default: as many as
                torch has, up to 8.
            block_entries: Most entries of a block, at most `READ_ENTRIES`; None for `BLOCK_ENTRIES`.

        Yields:
            For each block, in order: where it stands, and the result of `work`.

        Raises:
            DonorError: A file is shorter than it was.
        """
        workers = workers or min(torch.get_num_threads(), MAX_WORKERS)
        under_way = workers + _AHEAD
        width = max((_dtype(extents).itemsize for side in self._sides for extents in side.values()), default=0)
        reads = [
            (name, start, min(start + READ_ENTRIES, self.sizes[name]))
            for name in (sorted(self.sizes) if names is None else names)
            for start in range(0, self.sizes[name], READ_ENTRIES)
        ]
        with ExitStack() as stack:
            # One thread a side: both disks, or both ends of one, are busy meanwhile.
            readers = [stack.enter_context(_Reader(side, READ_ENTRIES * width, under_way)) for side in self._sides]
            pool = stack.enter_context(worker_pool(workers))

            def submitted() -> Iterator[tuple[str, int, list[Future[torch.Tensor]]]]:
                for number, (name, start, stop) in enumerate(reads):
                    soon = reads[number + _ADVISED] if number + _ADVISED < len(reads) else None
                    yield name, start, [reader.submit(name, start, stop, soon) for reader in readers]

            for results in map_in_order(
                pool, lambda read: self._through(work, block_entries or BLOCK_ENTRIES, *read), submitted(), under_way
            ):
                yield from results

    def delta(self, block: Block) -> torch.Tensor:
        """Compute donor - base of a block, in float32; 0 where both have the same NaN or Inf.

        Raises:
            DonorError: The donor holds NaN or Inf where the base has other values.
        """
        base = block.base.float() if block.base.dtype == torch.float64 else block.base
        # In place, the other operand is widened on the way, which is exact and spares a copy.
        delta = block.donor.to(torch.float32, copy=True).sub_(base)
        return settle_nonfinite(block, delta, self.with_unchanged_nan)

    def _through(
        self,
        work: Callable[[Block], T],
        block_entries: int,
        name: str,
        start: int,
        read: list[Future[torch.Tensor]],
    ) -> list[tuple[Span, T]]:
        base, donor = self._values(name, [future.result() for future in read])
        results = []
        for first in range(0, base.numel(), block_entries):
            end = first + block_entries
            block = Block(name, start + first, base[first:end], donor[first:end])
            results.append((Span(name, block.start, block.base.numel()), work(block)))
        return results

    def _values(self, name: str, read: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        self.on_read(sum(values.nbytes for values in read))
        base = read[0].to(self.dtype(name))
        return base, read[1] if len(read) == 2 else torch.zeros_like(base)


class _Reader:
    """A thread that reads entries of one side's tensors into a ring of buffers."""

    def __init__(self, side: Mapping[str, Sequence[Extent]], nbytes: int, count: int) -> None:
        self._side = side
        self._buffers = [torch.empty(nbytes, dtype=torch.uint8) for _ in range(count)]
        self._turn = 0
        self._files: dict[Path, FileIO] = {}
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *args: object) -> None:
        self._thread.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def submit(self, name: str, start: int, stop: int, soon: tuple[str, int, int] | None) -> Future[torch.Tensor]:
        """Read entries [start, stop) of a tensor, and have the kernel begin with others that will be read soon."""
        buffer = self._buffers[self._turn % len(self._buffers)]
        self._turn += 1
        return self._thread.submit(self._read, self._side[name], start, stop, buffer, soon)

    def _read(
        self,
        extents: Sequence[Extent],
        start: int,
        stop: int,
        buffer: torch.Tensor,
        soon: tuple[str, int, int] | None,
    ) -> torch.Tensor:
        if soon is not None and hasattr(os, "posix_fadvise"):
            for extent, first, last in _overlaps(self._side[soon[0]], *soon[1:]):
                width = _dtype([extent]).itemsize
                offset, length = extent.offset + first * width, (last - first) * width
                with suppress(OSError):  # only advice: some file systems take none
                    os.posix_fadvise(self._open(extent).fileno(), offset, length, os.POSIX_FADV_WILLNEED)
        dtype = _dtype(extents)
        values = buffer[: (stop - start) * dtype.itemsize]
        into, done = memoryview(values.numpy().data), 0
        for extent, first, last in _overlaps(extents, start, stop):
            length = (last - first) * dtype.itemsize
            self._fill(extent, first * dtype.itemsize, into[done : done + length])
            done += length
        return values.view(dtype)

    def _open(self, extent: Extent) -> FileIO:
        file = self._files.get(extent.path)
        if file is None:
            file = self._files[extent.path] = FileIO(extent.path)
        return file

    def _fill(self, extent: Extent, skip: int, into: memoryview) -> None:
        file = self._open(extent)
        file.seek(extent.offset + skip)
        done = 0
        while done < len(into):
            count = file.readinto(into[done:])
            if not count:
                raise DonorError(
                    f"{str(extent.path)!r} must stay as it is while it is read, got its end too early. Run it again."
                )
            done += count


@contextmanager
def worker_pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Start threads in which each torch operation runs on one core; at the end, drop the work that has not begun.

    Blocks are so small that threads within an operation would only wait for each other.

    Args:
        workers: Number of threads.

    Yields:
        The pool. Every other thread, of today or to come, has as many threads for an operation as before.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        # torch has a count for each thread, and a default for those to come; set_num_threads sets both. So workers set
        # their own, and then a thread that ends at once sets the default again.
        default = _in_new_thread(torch.get_num_threads)
        started = threading.Barrier(workers)  # each call waits for all others, so every thread gets one
        are_ready = False
        try:
            for each in [pool.submit(_use_one_core, started) for _ in range(workers)]:
                each.result()
            are_ready = True
        finally:
            started.abort()  # where not all threads could be started, the others end
            if not are_ready:
                pool.shutdown(cancel_futures=True)  # and they set the default until they have ended
            _in_new_thread(lambda: torch.set_num_threads(default))
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_core(started: threading.Barrier) -> None:
    torch.get_num_threads()  # takes the default over, which would otherwise be done, and undo this, at the first use
    torch.set_num_threads(1)
    started.wait()


def _in_new_thread(call: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def map_in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[A], B],
    items: Iterable[A],
    under_way: int,
    size: Callable[[A], int] = lambda item: 0,
    room: int = 0,
) -> Iterator[B]:
    """Call a function on items in threads, and yield the results in the items' order.

    Args:
        pool: The threads.
        work: The function.
        items: Its arguments; taken one by one, each when fewer than `under_way` are left and they leave room for it.
        under_way: How many items may be in work or wait to be used, with the next one.
        size: Room that an item takes.
        room: Room for items in work or waiting, before the next one; a single one may take more.

    Yields:
        The results.
    """
    waiting: deque[tuple[Future[B], int]] = deque()
    used = 0
    for item in items:
        waiting.append((pool.submit(work, item), size(item)))
        used += waiting[-1][1]
        del item  # so that nothing but the work holds on to it while the next one is made
        while len(waiting) == under_way or (len(waiting) > 1 and used > room):
            future, freed = waiting.popleft()
            used -= freed
            yield future.result()
    while waiting:
        yield waiting.popleft()[0].result()


def _overlaps(extents: Sequence[Extent], start: int, stop: int) -> Iterator[tuple[Extent, int, int]]:
    """Yield the extents that hold entries [start, stop) of their sequence, with the first and the end in each."""
    at = 0
    for extent in extents:
        first, last = max(start - at, 0), min(stop - at, _count(extent))
        if first < last:
            yield extent, first, last
        at += _count(extent)


def _count(extent: Extent) -> int:
    return math.prod(extent.shape)


def _dtype(extents: Sequence[Extent]) -> torch.dtype:
    return cast(torch.dtype, extents[0].dtype)


def _refuse_dtypes(role: str, side: Mapping[str, Sequence[Extent]]) -> None:
    for name, extents in sorted(side.items()):
        dtypes = {extent.dtype for extent in extents}
        if len(dtypes) > 1 or not dtypes <= {*FLOAT_DTYPES}:
            raise DonorError(
                f"{role} tensors must be float64, float32, float16 or bfloat16, got "
                f"{', '.join(sorted(map(str, dtypes)))} in {name!r}. "
                "Quantized and integer tensors cannot be grafted: use full-precision weights, or exclude it."
            )
