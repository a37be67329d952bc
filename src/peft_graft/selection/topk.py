"""Take an exact top-k over tensors that are seen one at a time, or block by block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch


class SelectionError(ValueError):
    """A budget, a rule or a score from which no mask can be made."""


def refuse_nan(name: str, scores: torch.Tensor) -> None:
    """Refuse scores that cannot be ordered.

    Raises:
        SelectionError: A score is NaN.
    """
    if not scores.numel():
        return
    # The maximum of anything with NaN is NaN. Here and below: numpy takes a fraction of torch's time on the CPU.
    if math.isnan(scores.detach().numpy().max() if _is_plain(scores) else scores.max()):
        raise SelectionError(
            f"scores must not be NaN, got NaN in {name!r}. Check the data, the loss, and the base's values there."
        )


def top_k_mask(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Mark exactly the `k` highest scores, ties going to the lower index.

    Args:
        scores: Real scores, 1-D, without NaN.
        k: How many to mark, in [0, len(scores)].

    Returns:
        Mask, bool, same shape, with exactly `k` True.
    """
    if k >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if k <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.is_cpu and scores.dtype in (torch.float32, torch.float64):
        plain = scores.detach().numpy()
        position = scores.numel() - k  # numpy selects ten times faster than torch sorts
        threshold = np.partition(plain, position)[position]
        mask = torch.from_numpy(plain >= threshold)
    else:
        threshold = torch.topk(scores, k, sorted=False).values.min()
        mask = scores >= threshold
    surplus = len(true_indices(mask)) - k
    if surplus:
        ties = true_indices(scores == float(threshold))
        mask[ties[-surplus:]] = False
    return mask


class TopK:
    """Exact top-k over many tensors that are seen one at a time, ties broken by (tensor name, flat index).

    Memory is O(k) plus the block at hand, whatever the number of tensors and their sizes: while entries come in, up to
    2 k are held, each in 12 bytes plus the bytes of the carried values.

    Args:
        k: Number of entries to keep, >= 1.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.names: list[str] = []
        self._starts: list[int] = []  # the position of each tensor's first entry among all entries seen
        self._seen = 0
        # Scores, positions (increasing), and carried values; of each the first `_held` count. Room is made by
        # doubling: many small tensors that outlive large ones would leave the heap full of holes.
        self._columns: list[torch.Tensor] = []
        self._threshold = -math.inf
        self._held = 0

    @property
    def threshold(self) -> float:
        """The score that an entry must exceed from here on; -inf until more than k have been seen."""
        return self._threshold

    def add(self, name: str, scores: torch.Tensor, *carried: torch.Tensor) -> None:
        """Offer the scores of one tensor, or of the next block of the tensor before.

        Args:
            name: Name of the tensor; increasing, or the same for another block.
            scores: Scores, any shape, without NaN.
            carried: Values to keep beside the scores of the entries kept, each of the same shape.

        Raises:
            SelectionError: The names are out of order, or a score is NaN.
        """
        self.offer(name, scores.numel(), *self.shortlist(name, scores, *carried))

    def shortlist(self, name: str, scores: torch.Tensor, *carried: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Find the entries of a block that may be among the k highest, for `offer`.

        Threads may do so for later blocks while earlier ones are still to be offered.

        Args:
            name: As in `add`.
            scores: As in `add`.
            carried: As in `add`.

        Returns:
            Indices in the block, scores, and carried values of these entries, on the CPU.

        Raises:
            SelectionError: A score is NaN.
        """
        flat = scores.detach().flatten().float()
        refuse_nan(name, flat)
        # Later entries lose ties against those already held, so only strictly better ones matter once k are held.
        keep = None if self._threshold == -math.inf else _above(flat, self._threshold)
        if keep is None or keep.numel() > self.k:
            best = true_indices(top_k_mask(flat if keep is None else flat[keep], self.k))
            keep = best if keep is None else keep[best]
        return (keep.cpu(), flat[keep].cpu(), *(gather(values, keep) for values in carried))

    def offer(self, name: str, count: int, index: torch.Tensor, scores: torch.Tensor, *carried: torch.Tensor) -> None:
        """Take in the shortlist of a block of `count` entries; blocks must come in order, as in `add`."""
        if not self.names or name != self.names[-1]:
            if self.names and name < self.names[-1]:
                raise SelectionError(f"names must be added in increasing order, got {name!r} after {self.names[-1]!r}.")
            self.names.append(name)
            self._starts.append(self._seen)
        self._append(scores, torch.from_numpy(index.numpy() + self._seen), *carried)
        self._seen += count
        if self._held >= 2 * self.k:
            self._shrink()

    def _append(self, *columns: torch.Tensor) -> None:
        if not columns[0].numel():
            return
        if not self._columns:
            self._columns = [column[:0] for column in columns]
        end = self._held + columns[0].numel()
        for number, new in enumerate(columns):
            old = self._columns[number]
            dtype = torch.promote_types(old.dtype, new.dtype)
            if end > old.numel() or dtype != old.dtype:
                self._columns[number] = torch.empty(max(end, min(2 * self._held, 3 * self.k)), dtype=dtype)
                _as_numpy(self._columns[number])[: self._held] = _as_numpy(old[: self._held].to(dtype))
            _as_numpy(self._columns[number])[self._held : end] = _as_numpy(new.to(dtype))
        self._held = end

    def _shrink(self) -> None:
        if self._held <= self.k:
            return
        best = true_indices(top_k_mask(self._columns[0][: self._held], self.k)).numpy()
        for column in map(_as_numpy, self._columns):
            column[: self.k] = column[best]
        self._held = self.k
        self._threshold = float(self._columns[0][: self.k].min())

    def selected(self) -> Iterator[tuple[str, tuple[torch.Tensor, ...]]]:
        """Yield the entries kept, tensor by tensor; tensors without any are left out.

        Yields:
            The name, and (flat indices: int64, increasing; and the carried values, in a dtype that holds all of them).
        """
        self._shrink()
        if not self._held:
            return
        _, positions, *carried = (column[: self._held] for column in self._columns)
        ends = torch.searchsorted(positions, torch.tensor([*self._starts[1:], self._seen])).tolist()
        for name, start, first, last in zip(self.names, self._starts, [0, *ends[:-1]], ends, strict=True):
            if last > first:
                yield name, (positions[first:last] - start, *(values[first:last] for values in carried))

    def indices(self) -> dict[str, torch.Tensor]:
        """Return the kept flat indices per tensor: int64, increasing; tensors without any are left out."""
        return {name: indices for name, (indices, *_) in self.selected()}

    def clear(self) -> None:
        """Free the memory of everything that is held."""
        self._columns, self._held = [], 0


def true_indices(mask: torch.Tensor) -> torch.Tensor:
    """Return the indices at which a 1-D mask is true: int64, increasing."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.is_cpu else mask.nonzero().flatten()


def gather(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the values at flat indices, on the CPU; values and indices may be on different devices."""
    return values.detach().flatten()[index.to(values.device)].cpu()


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate 1-D tensors of one dtype, on the CPU, on one core."""
    return torch.from_numpy(np.concatenate([_as_numpy(part) for part in parts])).view(parts[0].dtype)


def _above(scores: torch.Tensor, threshold: float) -> torch.Tensor:
    if _is_plain(scores):
        return torch.from_numpy(np.flatnonzero(scores.numpy() > threshold))
    return true_indices(scores > threshold)


def _as_numpy(column: torch.Tensor) -> np.ndarray[Any, Any]:
    """View a column as integers of its width, for numpy to copy.

    It does so on one core. torch would wake up all cores, which the threads that read and score are busy on.
    """
    return column.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[column.itemsize]).numpy()


def _is_plain(scores: torch.Tensor) -> bool:
    return scores.is_cpu and scores.dtype == torch.float32


Counts = np.ndarray[Any, np.dtype[np.int64]]


def find_threshold(
    count_all: Callable[[Callable[[torch.Tensor], Counts]], Iterable[Counts]], k: int
) -> tuple[float, int]:
    """Find the k-th highest of more scores than memory holds, in two passes over them.

    Args:
        count_all: Starts a pass: calls the function that it is given on all scores, in blocks of any shape, in threads
            if it likes, and yields the results. The scores are float32, without NaN, and the same in both passes.
        k: Rank of the score to find, >= 1; of fewer scores, the lowest is found.

    Returns:
        The k-th highest score, and how many of those that equal it are among the k highest; 0 if there are no scores.
    """
    above, leading = 0, None
    for shift in (16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for found in count_all(partial(_histogram, shift=shift, leading=leading)):
            counts += found
        downward = counts[::-1].cumsum()
        if leading is None:
            k = min(k, int(downward[-1]))
        if not k:
            return math.inf, 0
        step = int(np.searchsorted(downward, k - above))
        above += int(downward[step] - counts[::-1][step])
        half = counts.size - 1 - step
        leading = half if leading is None else leading << 16 | half
    bits = np.uint32(leading or 0)
    value = bits ^ np.uint32(1 << 31) if bits >> 31 else ~bits
    return float(value.view(np.float32)), k - above


def _histogram(scores: torch.Tensor, shift: int, leading: int | None) -> Counts:
    """Count 16 bits of the scores' keys, from bit `shift` on; only of keys that begin with `leading`, if given."""
    keys = _ordered(scores)
    if leading is not None:
        keys = keys[keys >> 16 == leading]
    return np.bincount(keys >> shift & 0xFFFF, minlength=1 << 16)


def _ordered(scores: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Return integers in the order of the scores; -0 counts as 0."""
    bits = (scores.flatten().cpu() + 0.0).numpy().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits ^ np.uint32(1 << 31))
