"""Which entries of two checkpoints are taken, found piece by piece: the selection of files larger than memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple, cast

import numpy as np
import torch

from ..checkpoints.block_reader import Pairs, Piece
from ..checkpoints.pairing import DonorError, count_nonfinite
from .rules import RULES, Evidence, Granularity, Rule, Units, generator_of, no_entry_in_any_tensor, resolve_budget
from .topk import TopK, find_threshold, places

# Up to this many entries are chosen in one pass, of which twice as many may be held: then the process takes 1.8 GB.
HELD_AT_ONCE = 5 << 22


class Taken(NamedTuple):
    """The entries taken from one tensor of the donor.

    Attributes:
        name: The tensor's name in the base.
        indices: Flat indices, int64 [n], increasing.
        donor: The donor's values there, float [n], in the donor's dtype.
        base: The base's values there, float [n], in the base's dtype.
    """

    name: str
    indices: torch.Tensor
    donor: torch.Tensor
    base: torch.Tensor


class Sieve:
    """Choose entries by a data-free rule, exactly as `selection.select` does, without holding a tensor as a whole.

    A budget that fits in memory takes one pass over the files, a larger one three: two for the threshold, one to take.

    Args:
        pairs: The files.
        rule: A rule that needs nothing but weights; None to take every entry whose bits differ.
        density: As in `select`.
        num_params: As in `select`.
        scope: As in `select`.
        granularity: As in `select`.
        seed: Seed of the rule.
        held: How many entries may be chosen in one pass.

    Attributes:
        differs: Whether any entry was seen that differs; known once the entries have been taken.

    Raises:
        SelectionError: The budget is impossible.
    """

    def __init__(
        self,
        pairs: Pairs,
        rule: Rule | None,
        *,
        density: float | None = None,
        num_params: int | None = None,
        scope: str = "global",
        granularity: str = "entry",
        seed: int = 0,
        held: int = HELD_AT_ONCE,
    ) -> None:
        self._pairs, self._rule, self._seed, self._held = pairs, rule, seed, held
        self._density, self._scope, self._granularity = density, scope, granularity
        self.total = sum(pairs.sizes.values())
        self._budget = 0 if rule is None else resolve_budget(self.total, density, num_params)
        self._generator: torch.Generator | None = None
        self.differs = False

    @property
    def passes(self) -> int:
        """How often the files are read, at most."""
        if self._granularity != "entry":
            return 2
        if self._rule is None:
            return 1
        sizes = self._pairs.sizes
        budgets = [(self._count(name), size) for name, size in sizes.items()] if self._scope == "tensor" else []
        return 3 if any(self._held < k < size for k, size in budgets or [(self._budget, self.total)]) else 1

    def taken(self) -> Iterator[Taken]:
        """Yield what is taken, tensor by tensor, in order of the names.

        Raises:
            DonorError: The donor holds NaN or Inf.
            SelectionError: Nothing fits the budget, or a score is NaN.
        """
        if self._rule is None:
            yield from self._where(self._pairs.sizes, self._differing)
        elif self._granularity != "entry":
            units = Units(cast(Granularity, self._granularity))
            for where, scores in self._pairs.map(self._scores, workers=self._workers):
                units.add(where.name, scores)
            yield from self._where(units.take(self._budget), self._everything)
        elif self._scope == "tensor":
            counts = {name: count for name in self._pairs.sizes if (count := self._count(name))}
            if not counts:
                raise no_entry_in_any_tensor(self._density or 0.0)
            for name, count in counts.items():
                yield from self._best([name], count)
        else:
            yield from self._best(list(self._pairs.sizes), self._budget)

    def _count(self, name: str) -> int:
        return round((self._density or 0.0) * self._pairs.sizes[name])

    def _best(self, names: Sequence[str], k: int) -> Iterator[Taken]:
        if k == sum(self._pairs.sizes[name] for name in names):
            yield from self._where(names, self._everything)
            return
        if k <= self._held:
            best = TopK(k)

            def sift(piece: Piece) -> tuple[torch.Tensor, ...]:
                near = self._near(piece, best.threshold)
                if near is None:
                    return best.sift(piece.name, self._scores(piece), piece.donor, piece.base)
                few = piece._replace(base=piece.base[near], donor=piece.donor[near])
                where, *found = best.sift(few.name, self._scores(few), few.donor, few.base)
                return near[where], *found

            for where, found in self._pairs.map(sift, names, self._workers):
                best.offer(where.name, where.size, *found)
            for name, (indices, donor, base) in best.taken():
                yield Taken(name, indices, donor.to(self._pairs.dtype(name, donor=True)), base.to(self._dtype(name)))
            return
        passes = lambda: (scores for _, scores in self._pairs.map(self._scores, names, self._workers))  # noqa: E731
        threshold, ties = find_threshold(passes, k)

        def above(piece: Piece) -> torch.Tensor:
            nonlocal ties
            scores = self._scores(piece)
            mask = scores > threshold
            if ties:
                equal = places(scores == threshold)[:ties]
                mask[equal] = True
                ties -= len(equal)
            return mask

        yield from self._where(names, above, workers=1)  # ties go to the first

    def _dtype(self, name: str) -> torch.dtype:
        return self._pairs.dtype(name)

    @property
    def _workers(self) -> int | None:
        """How many threads score: one where random numbers must be drawn in order."""
        return 1 if self._rule is not None and self._rule.name == "random" else None

    def _scores(self, piece: Piece) -> torch.Tensor:
        delta = self._delta(piece)
        if self._rule is None:
            return delta
        if piece.start == 0:
            self._generator = generator_of(piece.name, self._seed)
        return self._rule.score(Evidence(piece.name, piece.base, delta, None, self._seed, self._generator))

    def _near(self, piece: Piece, threshold: float) -> torch.Tensor | None:
        """Where |delta|, rounded to the files' 16 bits, reaches the threshold rounded alike; None if that is unknown.

        Rounding keeps the order, so this misses nothing, at half the cost of looking at every delta in float32.
        """
        dtype = piece.base.dtype
        if self._rule is not RULES["magnitude"] or dtype.itemsize != 2 or dtype != piece.donor.dtype:
            return None
        if threshold == -math.inf:
            return None
        bits = torch.sub(piece.donor, piece.base).view(torch.int16).numpy()
        np.bitwise_and(bits, 0x7FFF, out=bits)
        if bits.max(initial=0) >= int(torch.tensor(math.inf, dtype=dtype).view(torch.int16)):
            return None  # not finite: a look in float32 tells what it is
        return torch.from_numpy(np.flatnonzero(bits >= int(torch.tensor(threshold).to(dtype).view(torch.int16))))

    def _differing(self, piece: Piece) -> torch.Tensor:
        self._delta(piece)
        return bits_differ(piece.base, piece.donor)

    def _everything(self, piece: Piece) -> torch.Tensor:
        return torch.ones_like(self._delta(piece), dtype=torch.bool)

    def _delta(self, piece: Piece) -> torch.Tensor:
        before = piece.base.float() if piece.base.dtype == torch.float64 else piece.base
        # In place, the other operand is widened on the way, which is exact and spares a copy.
        delta = piece.donor.to(torch.float32, copy=True).sub_(before)
        if not self.differs and delta.any():
            self.differs = True
        # A finite delta has finite ends, so one sum settles the usual case.
        if not math.isfinite(delta.sum()) and (bad := count_nonfinite(piece.donor)):
            raise DonorError(
                f"donor tensors must be finite, got {bad:,} NaN or Inf in {piece.name!r}. "
                "Its training has probably diverged: use an earlier checkpoint."
            )
        return delta

    def _where(
        self, names: Iterable[str], mask_of: Callable[[Piece], torch.Tensor], workers: int | None = None
    ) -> Iterator[Taken]:
        """Take what a mask says, holding what is taken of one tensor at a time."""

        def take(piece: Piece) -> tuple[torch.Tensor, ...]:
            index = places(mask_of(piece))
            return index + piece.start, piece.donor[index], piece.base[index]

        for name, group in groupby(self._pairs.map(take, names, workers), key=lambda found: found[0].name):
            taken = [part for _, part in group if part[0].numel()]
            if taken:
                yield Taken(name, *map(torch.cat, zip(*taken, strict=True)))


def bits_differ(base: torch.Tensor, donor: torch.Tensor) -> torch.Tensor:
    """Mark the entries of two floating-point tensors that differ, also in the sign of a zero; bool, of their shape."""
    wide = torch.promote_types(base.dtype, donor.dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wide.itemsize]
    return base.to(wide).view(integer) != donor.to(wide).view(integer)
