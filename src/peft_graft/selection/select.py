"""Select the entries that a patch takes: one selector for tensors in memory and for files larger than memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

from ..checkpoints.pairing import Block, Span, bits_differ
from .budget import Budget, Units
from .rules import Evidence, Rule, magnitude, tensor_generator
from .topk import Counts, SelectionError, TopK, find_threshold, gather, join, refuse_nan, true_indices

# Of files, up to this many entries are selected in one pass, of which twice as many may be held: then the process takes
# 1.8 GB.
HELD_AT_ONCE = 5 << 22

T = TypeVar("T")
_Columns = tuple[torch.Tensor, ...]
_Carry = Callable[[Block], _Columns]


class Source(Protocol):
    """A base beside a donor: `PairedTensors` in memory, `PairedReader` in files.

    Attributes:
        whole_tensors: Whether a block is a whole tensor, in its shape.
        with_unchanged_nan: Names of the tensors seen to have the same NaN or Inf in the base and in the donor: entries
            that no patch can hold, and none needs.
    """

    whole_tensors: bool
    with_unchanged_nan: set[str]

    @property
    def sizes(self) -> Mapping[str, int]:
        """Number of entries by tensor name, in increasing order."""

    def map(
        self, work: Callable[[Block], T], names: Iterable[str] | None = None, workers: int | None = None
    ) -> Iterator[tuple[Span, T]]:
        """Call a function on every block of the tensors, and yield the results in order."""

    def delta(self, block: Block) -> torch.Tensor:
        """Compute donor - base of a block, in float32; refuse donors with NaN or Inf."""


class Selected(NamedTuple):
    """The entries that are taken from one tensor of the donor.

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


class Selector:
    """Score the entries of a delta and take exactly the budget, ties broken by (tensor name, flat index).

    Only entries whose bits differ are taken: a budget beyond their number takes all of them. Whole tensors or layers in
    which nothing differs are left out.

    A budget of which all entries may be held takes one pass over the source; a larger one takes three: two for the
    threshold, and one to take.

    Args:
        source: The base and the donor, in memory or in files; both give the same entries.
        rule: How to score; None to take every entry whose bits differ, without a budget.
        budget: How much to take; None without a rule.
        measured: The measurement that the rule's `evidence` names, by tensor name: float32, broadcastable to the
            tensor.
        seed: Seed of the rule.
        candidate_ratio: How many times the budget to take, >= 1, for a mask that is trained among them.
        held_at_once: How many entries may be selected in one pass. Default: of files 21 million, of memory all.
        measures_energy: Whether to sum up the squares of all deltas on the way.

    Attributes:
        eligible: Number of entries that the budget is a share of.
        differs: Whether any entry of the donor was seen to differ from the base's; known after the selection.

    Raises:
        SelectionError: The budget is impossible, or the rule cannot score a tensor in blocks.
    """

    def __init__(
        self,
        source: Source,
        rule: Rule | None,
        budget: Budget | None = None,
        *,
        measured: Mapping[str, torch.Tensor] | None = None,
        seed: int = 0,
        candidate_ratio: float = 1.0,
        held_at_once: int | None = None,
        measures_energy: bool = False,
    ) -> None:
        if rule is not None and rule.blocks == "never" and not source.whole_tensors:
            raise SelectionError(
                f"selection must score entries one by one to read files in blocks, got {rule.name!r}, whose scores "
                "depend on the whole tensor. Load both models and use get_peft_model(base, config)."
            )
        self._source, self._rule, self._measured, self._seed = source, rule, measured, seed
        self._budget = budget or Budget()
        self.eligible = sum(source.sizes.values())
        # The budget itself, and the entries to take: more where a mask is trained.
        self._wanted = 0 if rule is None else self._budget.resolve(source.sizes)
        self._taken = 0 if rule is None else self._budget.resolve(source.sizes, candidate_ratio)
        default = self.eligible if source.whole_tensors else HELD_AT_ONCE
        self._held_at_once = default if held_at_once is None else held_at_once
        self._workers = 1 if rule is not None and rule.blocks == "in_order" else None
        self._generator: torch.Generator | None = None
        self._dtypes: dict[str, tuple[torch.dtype, torch.dtype]] = {}
        self.differs = False
        self._energies: dict[tuple[str, int], float] | None = {} if measures_energy else None

    @property
    def energy(self) -> float:
        """Return ||delta||^2 over all eligible entries; known after a selection that measures it."""
        return math.fsum((self._energies or {}).values())

    @property
    def wanted(self) -> int:
        """Return the budget without the candidate ratio: how many entries it takes if as many differ; 0 without one."""
        return self._wanted if isinstance(self._wanted, int) else sum(self._wanted.values())

    @property
    def passes(self) -> int:
        """Return the number of passes over the source, at most."""
        if self._rule is None:
            return 1
        if self._budget.granularity != "entry":
            return 2
        return 3 if any(self._way(pool) == "threshold" for pool in self._pools()) else 1

    def budget_of(self, chosen: Mapping[str, torch.Tensor]) -> int | dict[str, int]:
        """Return the budget without the candidate ratio: one number, or for `budget_scope="tensor"` one per tensor.

        Args:
            chosen: The candidates, as `indices` returns them; the budget is at most their number.
        """
        counts = {name: indices.numel() for name, indices in chosen.items()}
        if isinstance(self._wanted, int):
            return min(self._wanted, sum(counts.values()))
        return {name: min(self._wanted[name], count) for name, count in counts.items()}

    def indices(self) -> dict[str, torch.Tensor]:
        """Return the selected flat indices by tensor name: int64, increasing; tensors without any are left out.

        Raises:
            DonorError: The donor holds NaN or Inf.
            SelectionError: Nothing fits the budget, a score is NaN, or the rule's scores have another shape.
        """
        if self._rule is not None and self._budget.granularity != "entry":
            units = self._whole_units()
            if self._source.with_unchanged_nan.isdisjoint(units):
                return {name: torch.arange(size) for name, size in units.items()}
            return {name: indices for name, (indices,) in self._where(units, _every_entry, lambda block: ())}
        return {name: indices for name, (indices, *_) in self._select(lambda block: ())}

    def entries(self) -> Iterator[Selected]:
        """Yield the selected entries with both sides' values, tensor by tensor, in order of the names.

        Raises:
            DonorError: The donor holds NaN or Inf.
            SelectionError: Nothing fits the budget, a score is NaN, or the rule's scores have another shape.
        """

        def both_sides(block: Block) -> _Columns:
            self._dtypes[block.name] = block.donor.dtype, block.base.dtype
            return block.donor, block.base

        for name, (indices, donor, base) in self._select(both_sides):
            donor_dtype, base_dtype = self._dtypes[name]
            yield Selected(name, indices, donor.to(donor_dtype), base.to(base_dtype))

    def _select(self, carry: _Carry) -> Iterator[tuple[str, _Columns]]:
        """Yield indices and carried values by tensor name, whatever the granularity and the size of the budget."""
        if self._rule is None:
            yield from self._where(self._source.sizes, self._differing, carry)
        elif self._budget.granularity != "entry":
            yield from self._where(self._whole_units(), _every_entry, carry)
        else:
            for way, pools in groupby(self._pools(), key=self._way):
                if way == "all":
                    yield from self._where([name for names, _ in pools for name in names], self._all, carry)
                elif way == "one pass":
                    yield from self._in_one_pass(list(pools), carry)
                else:
                    for names, count in pools:
                        yield from self._by_threshold(names, count, carry)

    def _pools(self) -> list[tuple[list[str], int]]:
        """Return names of tensors whose entries compete with each other, and how many of these entries to take."""
        if isinstance(self._taken, int):
            return [(list(self._source.sizes), self._taken)]
        return [([name], count) for name, count in self._taken.items() if count]

    def _way(self, pool: tuple[list[str], int]) -> str:
        names, count = pool
        if count == sum(self._source.sizes[name] for name in names):
            return "all"
        return "one pass" if count <= self._held_at_once else "threshold"

    def _in_one_pass(self, pools: list[tuple[list[str], int]], carry: _Carry) -> Iterator[tuple[str, _Columns]]:
        best_of = {name: best for names, count in pools for best in [TopK(count)] for name in names}

        def shortlist(block: Block) -> _Columns:
            best = best_of[block.name]
            near = self._near(block, best.threshold)
            if near is not None:
                block = block._replace(base=block.base[near], donor=block.donor[near])
            scores, carried = self._scores(block).flatten(), carry(block)
            # Without a difference |delta| is 0, which the threshold rules out.
            if not (self._rule is not None and self._rule.score is magnitude and best.threshold > 0):
                refuse_nan(block.name, scores)
                changed = true_indices(_changed(block))
                if changed.numel() < scores.numel():
                    scores, carried = scores[changed], tuple(gather(values, changed) for values in carried)
                    near = changed.cpu() if near is None else near[changed]
            index, *found = best.shortlist(block.name, scores, *carried)
            return index if near is None else near[index], *found

        found = self._map(shortlist, list(best_of), self._workers)
        for best, group in groupby(found, key=lambda each: best_of[each[0].name]):
            for span, columns in group:
                best.offer(span.name, span.size, *columns)
            yield from best.selected()
            best.clear()

    def _by_threshold(self, names: list[str], count: int, carry: _Carry) -> Iterator[tuple[str, _Columns]]:
        def count_all(histogram: Callable[[torch.Tensor], Counts]) -> Iterator[Counts]:
            def count_block(block: Block) -> Counts:
                return histogram(self._scores_without_nan(block).flatten()[_changed(block)])

            return (counts for _, counts in self._map(count_block, names, self._workers))

        threshold, ties = find_threshold(count_all, count)

        def above(block: Block) -> torch.Tensor:
            nonlocal ties
            scores, changed = self._scores(block).flatten(), _changed(block)
            mask = (scores > threshold) & changed
            if ties:
                equal = true_indices((scores == threshold) & changed)[:ties]
                mask[equal] = True
                ties -= len(equal)
            return mask

        yield from self._where(names, above, carry, workers=1)  # ties go to the first

    def _whole_units(self) -> dict[str, int]:
        units = Units(self._budget.granularity)

        def sum_of(block: Block) -> tuple[float, bool]:
            return float(self._scores_without_nan(block).double().sum()), bool(_changed(block).any())

        for span, (sum_of_scores, differs) in self._map(sum_of, workers=self._workers):
            units.add(span.name, sum_of_scores, span.size, differs)
        return units.select(sum(count for _, count in self._pools()))

    def _where(
        self,
        names: Iterable[str],
        mask_of: Callable[[Block], torch.Tensor],
        carry: _Carry,
        workers: int | None = None,
    ) -> Iterator[tuple[str, _Columns]]:
        """Take the entries of a mask, holding those of one tensor at a time."""

        def take(block: Block) -> _Columns:
            mask = mask_of(block).flatten()
            if block.name in self._source.with_unchanged_nan:
                mask = mask.cpu() & block.donor.flatten().isfinite()
            index = true_indices(mask).cpu()
            return index + block.start, *(gather(values, index) for values in carry(block))

        found = self._map(take, names, workers)
        for name, group in groupby(found, key=lambda each: each[0].name):
            parts = [columns for _, columns in group if columns[0].numel()]
            if parts:
                yield name, tuple(map(join, zip(*parts, strict=True)))

    def _map(
        self, work: Callable[[Block], T], names: Iterable[str] | None = None, workers: int | None = None
    ) -> Iterator[tuple[Span, T]]:
        """Call a function on every block of the source, and measure the energy on the way, once for each block."""
        energies = self._energies
        if energies is None:
            return self._source.map(work, names, workers)

        def measured(block: Block) -> T:
            if (block.name, block.start) not in energies:
                norm = torch.linalg.vector_norm(self._source.delta(block), dtype=torch.float64)
                energies[block.name, block.start] = float(norm) ** 2
            return work(block)

        return self._source.map(measured, names, workers)

    def _delta(self, block: Block) -> torch.Tensor:
        delta = self._source.delta(block)
        if not self.differs and delta.any():
            self.differs = True
        return delta

    def _scores(self, block: Block) -> torch.Tensor:
        """Score a block; float32, of its shape."""
        rule, delta = self._rule, self._delta(block)
        if rule is None:
            return delta
        if rule.blocks == "in_order" and block.start == 0:
            self._generator = tensor_generator(block.name, self._seed)
        measured = None if self._measured is None else self._measured[block.name]
        scores = rule.score(Evidence(block.name, block.base, delta, measured, self._seed, self._generator))
        if scores.shape != delta.shape:
            raise SelectionError(
                f"scores must have one value for each entry, got shape {tuple(scores.shape)} for {tuple(delta.shape)} "
                f"in {block.name!r} from the rule {rule.name!r}. A rule neither sums over entries nor leaves any out."
            )
        scores = scores.detach().float()
        if block.name not in self._source.with_unchanged_nan:
            return scores
        last = -math.inf if self._budget.granularity == "entry" else 0.0
        return scores.masked_fill(~block.donor.isfinite().to(scores.device), last)

    def _scores_without_nan(self, block: Block) -> torch.Tensor:
        scores = self._scores(block)
        refuse_nan(block.name, scores)
        return scores

    def _near(self, block: Block, threshold: float) -> torch.Tensor | None:
        """Return where |delta|, rounded to the files' 16 bits, reaches the threshold rounded alike; None if unknown.

        Rounding keeps the order, so this misses nothing, at half the cost of looking at every delta in float32.
        """
        dtype = block.base.dtype
        if self._rule is None or self._rule.score is not magnitude or self._source.whole_tensors:
            return None
        if dtype.itemsize != 2 or dtype != block.donor.dtype or threshold == -math.inf:
            return None
        bits = torch.sub(block.donor, block.base).view(torch.int16).numpy()
        np.bitwise_and(bits, 0x7FFF, out=bits)
        if bits.max(initial=0) >= int(torch.tensor(math.inf, dtype=dtype).view(torch.int16)):
            return None  # not finite: a look in float32 tells what it is
        return torch.from_numpy(np.flatnonzero(bits >= int(torch.tensor(threshold).to(dtype).view(torch.int16))))

    def _differing(self, block: Block) -> torch.Tensor:
        self._delta(block)
        return _changed(block)

    def _all(self, block: Block) -> torch.Tensor:
        self._scores_without_nan(block)
        return _changed(block)


def _changed(block: Block) -> torch.Tensor:
    """Mark the entries of a block whose bits differ; bool, 1-D, on the base's device."""
    return bits_differ(block.base, block.donor.to(block.base.device)).flatten()


def _every_entry(block: Block) -> torch.Tensor:
    return torch.ones(block.base.shape, dtype=torch.bool)
