"""Two checkpoints side by side, read piece by piece ahead of the arithmetic, in memory that does not grow with them."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch

from .donor import FLOAT_DTYPES, DonorError, Extent

# Entries of one read, and of what is handed out.
BLOCK = 1 << 21
PIECE = 1 << 20
# Reads that are done or under way beyond those that are being worked on, and reads that the kernel is told of ahead:
# enough to keep a disk busy while the results are put together.
_AHEAD = 2
_ADVISED = 64
# Threads that work at most, each with a block of either side: then memory does not grow with the number of cores.
MOST_WORKERS = 8

A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")


class Piece(NamedTuple):
    """Some entries of one tensor, in the base and in the donor.

    Attributes:
        name: The tensor's name in the base.
        start: Flat index of the first of them.
        base: The base's values, 1-D.
        donor: The donor's values, of the same shape, in the donor's dtype.
    """

    name: str
    start: int
    base: torch.Tensor
    donor: torch.Tensor


class Where(NamedTuple):
    """What a piece is of: the tensor's name in the base, the flat index of the first entry, and how many there are."""

    name: str
    start: int
    size: int


class Pairs:
    """Tensors of a base beside those of a donor, both in files.

    Args:
        base: Where each tensor stands: one extent, or several that follow each other in its flat order.
        donor: The same for the donor, with the same names and counts; None where every donor value is zero.
        dtypes: Dtype that the base has when it is loaded, by name; values are cast where the file has another one.

    Attributes:
        sizes: Number of entries by name, in increasing order.
        progress: Called with the number of bytes of every read.

    Raises:
        DonorError: A tensor is not of a floating-point dtype.
    """

    def __init__(
        self,
        base: Mapping[str, Sequence[Extent]],
        donor: Mapping[str, Sequence[Extent]] | None,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._sides = [base] if donor is None else [base, donor]
        self._dtypes = dtypes or {}
        self.progress: Callable[[int], object] = lambda count: None
        for role, side in zip(("base", "donor"), self._sides, strict=False):
            _refuse_dtypes(role, side)
        self.sizes = {name: sum(_count(extent) for extent in base[name]) for name in sorted(base)}

    @property
    def nbytes(self) -> tuple[int, int]:
        """How many bytes one pass reads of the base, and of the donor."""
        base, *donor = (
            sum(size * _dtype(side[name]).itemsize for name, size in self.sizes.items()) for side in self._sides
        )
        return base, sum(donor)

    def dtype(self, name: str, donor: bool = False) -> torch.dtype:
        """Return the dtype of a tensor's values in the base as it is loaded, or in the donor."""
        if donor and len(self._sides) == 2:
            return _dtype(self._sides[1][name])
        return self._dtypes.get(name, _dtype(self._sides[0][name]))

    def pieces(self, names: Iterable[str] | None = None) -> Iterator[Piece]:
        """Read tensors side by side.

        Args:
            names: Which ones, in increasing order; None for all.

        Yields:
            The pieces of each tensor in turn, in order. Their memory is used again for later ones.

        Raises:
            DonorError: A file is shorter than it was.
        """
        for _, piece in self.map(lambda piece: piece, names, workers=1):
            yield piece

    def map(
        self, work: Callable[[Piece], T], names: Iterable[str] | None = None, workers: int | None = None
    ) -> Iterator[tuple[Where, T]]:
        """Do something with every piece while later ones are being read.

        Args:
            work: What to do with a piece, in another thread. What it returns must not share the piece's memory.
            names: Which tensors, in increasing order; None for all.
            workers: How many threads work; one works through the pieces in order. Default: as many as torch has, up
                to 8, of which each operation gets one meanwhile.

        Yields:
            For each piece, in order: what it is of, and what `work` returned.

        Raises:
            DonorError: A file is shorter than it was.
        """
        threads = torch.get_num_threads()
        workers = workers or min(threads, MOST_WORKERS)
        under_way = workers + _AHEAD
        width = max((_dtype(extents).itemsize for side in self._sides for extents in side.values()), default=0)
        blocks = [
            (name, start, min(start + BLOCK, self.sizes[name]))
            for name in (sorted(self.sizes) if names is None else names)
            for start in range(0, self.sizes[name], BLOCK)
        ]
        with ExitStack() as stack:
            # One thread a side: both disks, or both ends of one, are busy meanwhile.
            readers = [stack.enter_context(_Reader(side, BLOCK * width, under_way)) for side in self._sides]
            pool = stack.enter_context(pool_of(workers))
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(1)  # pieces are so small that threads within an operation only wait for each other

            def read() -> Iterator[tuple[str, int, list[Future[torch.Tensor]]]]:
                for number, (name, start, stop) in enumerate(blocks):
                    soon = blocks[number + _ADVISED] if number + _ADVISED < len(blocks) else None
                    yield name, start, [reader.submit(name, start, stop, soon) for reader in readers]

            for done in in_order(pool, lambda block: self._through(work, *block), read(), under_way):
                yield from done

    def _through(
        self, work: Callable[[Piece], T], name: str, start: int, read: list[Future[torch.Tensor]]
    ) -> list[tuple[Where, T]]:
        before, after = self._values(name, [future.result() for future in read])
        done = []
        for first in range(0, before.numel(), PIECE):
            piece = Piece(name, start + first, before[first : first + PIECE], after[first : first + PIECE])
            done.append((Where(name, piece.start, piece.base.numel()), work(piece)))
        return done

    def _values(self, name: str, read: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        self.progress(sum(values.nbytes for values in read))
        before = read[0].to(self.dtype(name))
        return before, read[1] if len(read) == 2 else torch.zeros_like(before)


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
        """Read a block, and have the kernel begin with one that will be read soon."""
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
                where, length = extent.offset + first * width, (last - first) * width
                with suppress(OSError):  # only advice: some file systems take none
                    os.posix_fadvise(self._open(extent).fileno(), where, length, os.POSIX_FADV_WILLNEED)
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


def pool_of(workers: int) -> AbstractContextManager[ThreadPoolExecutor]:
    """Return threads that, when they are no longer needed, drop what has not begun."""

    @contextmanager
    def managed() -> Iterator[ThreadPoolExecutor]:
        pool = ThreadPoolExecutor(workers)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    return managed()


def in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[A], B],
    items: Iterable[A],
    under_way: int,
    size: Callable[[A], int] = lambda item: 0,
    room: int = 0,
) -> Iterator[B]:
    """Do work on items in threads, and yield the results in the items' order.

    Args:
        pool: The threads.
        work: What to do.
        items: What to do it on; taken one by one, each when there is place and room for it.
        under_way: How many items may be in work or wait to be used, with the next one.
        size: How much room an item takes.
        room: How much room there is for items in work or waiting, before the next one; a single one may take more.

    Yields:
        What `work` returned.
    """
    waiting: deque[tuple[Future[B], int]] = deque()
    taken = 0
    for item in items:
        waiting.append((pool.submit(work, item), size(item)))
        taken += waiting[-1][1]
        del item  # so that nothing but the work holds on to it while the next one is made
        while len(waiting) == under_way or (len(waiting) > 1 and taken > room):
            future, freed = waiting.popleft()
            taken -= freed
            yield future.result()
    while waiting:
        yield waiting.popleft()[0].result()


def _overlaps(extents: Sequence[Extent], start: int, stop: int) -> Iterator[tuple[Extent, int, int]]:
    """The extents that hold entries [start, stop) of their sequence, with the first and the end of them in each."""
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
