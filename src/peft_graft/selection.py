"""Which entries of the delta carry the skill: scores per entry, and one exact top-k over all tensors."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Needs = Literal["weights", "gradient", "path_gradient", "squared_gradient", "input_norm", "training"]
Scope = Literal["global", "tensor"]
Granularity = Literal["entry", "tensor", "layer"]


class SelectionError(ValueError):
    """A budget, a rule or a score from which no mask can be made."""


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at to score one tensor.

    Args:
        name: Name of the tensor; seeds `random`, so that a tensor's scores do not depend on the others.
        base: Base values, any shape and float dtype.
        delta: `donor - base`, float32, the same shape.
        measured: What the rule's `needs` asks for, float32, broadcastable to the shape; None for `"weights"`.
        seed: Seed of the rule, any integer.
    """

    name: str
    base: torch.Tensor
    delta: torch.Tensor
    measured: torch.Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules: a name, what it needs, and how it scores.

    Args:
        name: What the user types in `GraftConfig(selection=...)`.
        needs: What must be measured before scoring. `"weights"` is data-free, `"training"` is scored by training.
        score: Scores of one tensor, float32, its shape, higher = keep.
        summary: One line for `--help` and the docs.
    """

    name: str
    needs: Needs
    score: Callable[[Evidence], torch.Tensor]
    summary: str


def _measured(evidence: Evidence) -> torch.Tensor:
    if evidence.measured is None:
        raise SelectionError(
            f"evidence must be measured on data, got None for {evidence.name!r}. Call peft_graft.initialize_graft."
        )
    return evidence.measured


def random(evidence: Evidence) -> torch.Tensor:
    """Score uniformly at random in [0, 1): the floor every other rule must beat."""
    # The CPU generator looks at no more than 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{evidence.seed} {evidence.name}".encode()))
    return torch.rand(evidence.delta.shape, generator=generator).to(evidence.delta.device)


def magnitude(evidence: Evidence) -> torch.Tensor:
    """Score by |delta| (the base patch of Panigrahi et al. 2023, section 2)."""
    return evidence.delta.abs()


def taylor(evidence: Evidence) -> torch.Tensor:
    """Score by |g * delta|, g the mean gradient at the base: the first-order change of the loss.

    Ranked by absolute value: taking only the entries that lower the loss overshoots.
    """
    return (_measured(evidence) * evidence.delta).abs()


def fisher(evidence: Evidence) -> torch.Tensor:
    """Score by E[g^2] * delta^2: the second-order change of the loss under a diagonal empirical Fisher."""
    return _measured(evidence) * evidence.delta.square()


def wanda(evidence: Evidence) -> torch.Tensor:
    """Score by |delta| * ||x||, x the input that multiplies the entry: the change of the layer's output."""
    return evidence.delta.abs() * _measured(evidence)


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("random", "weights", random, "uniformly at random; the floor"),
        Rule("magnitude", "weights", magnitude, "|delta|; data-free"),
        Rule("taylor", "gradient", taylor, "|g * delta| with the gradient at the base"),
        Rule("path_taylor", "path_gradient", taylor, "|g * delta| with the gradient averaged from base to donor"),
        Rule("fisher", "squared_gradient", fisher, "g^2 * delta^2 with the gradient at the base"),
        Rule("wanda", "input_norm", wanda, "|delta| * ||x|| with the input of the layer"),
        Rule("learned", "training", magnitude, "mask logits trained by any Trainer, starting from |delta|"),
        Rule("sigmoid", "training", magnitude, "the published procedure (Panigrahi et al. 2023), for parity"),
    )
}


def get_rule(name: str) -> Rule:
    """Look a rule up by name.

    Raises:
        SelectionError: The name is not in `RULES`.
    """
    if name not in RULES:
        raise SelectionError(f"selection must be one of {sorted(RULES)}, got {name!r}. Choose a rule of the table.")
    return RULES[name]


def resolve_budget(total: int, density: float | None, num_params: int | None) -> int:
    """Turn a density or a count into the exact number of entries: `round(density * total)`.

    Args:
        total: Number of eligible entries.
        density: Share of them, in (0, 1]; None when `num_params` is given.
        num_params: The same as an integer, in [1, total]; None when `density` is given.

    Returns:
        Number of entries to take from the donor, in [1, total].

    Raises:
        SelectionError: Neither or both are given, or the budget would be 0 or above `total`.
    """
    if (density is None) == (num_params is None):
        raise SelectionError(
            f"exactly one of density and num_params must be given, got density={density!r} and "
            f"num_params={num_params!r}. Give one of them."
        )
    if num_params is not None:
        if isinstance(num_params, bool) or not isinstance(num_params, int) or not 1 <= num_params <= total:
            raise SelectionError(
                f"num_params must be an integer in [1, {total}] (the eligible entries), got {num_params!r}. "
                "Lower it or target more modules."
            )
        return num_params
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise SelectionError(f"density must be in (0, 1], got {density!r}. Give the share of entries to graft.")
    budget = round(density * total)
    if budget == 0:
        raise SelectionError(
            f"density must give at least one entry, got {density!r} of {total} eligible entries. "
            f"Raise it to {1 / total:.1e} or more."
        )
    return budget


def no_entry_in_any_tensor(density: float) -> SelectionError:
    """Build the error for a density that rounds to nothing in every single tensor."""
    return SelectionError(
        f"density must give at least one entry in some tensor, got {density!r}. Raise it or use scope='global'."
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
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        position = scores.numel() - k  # numpy selects ten times faster than torch sorts
        threshold = float(np.partition(scores.detach().numpy(), position)[position])
    else:
        threshold = float(torch.topk(scores, k, sorted=False).values.min())
    mask = scores >= threshold
    surplus = int(mask.count_nonzero()) - k
    if surplus:
        ties = (scores == threshold).nonzero().flatten()
        mask[ties[-surplus:]] = False
    return mask


class TopK:
    """Exact top-k over many tensors that are seen one at a time, ties broken by (tensor name, flat index).

    Memory is O(k) plus the tensor at hand, whatever the number of tensors.

    Args:
        k: Number of entries to keep, >= 1.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.names: list[str] = []
        self._scores: list[torch.Tensor] = []
        self._tensors: list[torch.Tensor] = []
        self._indices: list[torch.Tensor] = []
        self._threshold = -math.inf
        self._held = 0

    def add(self, name: str, scores: torch.Tensor) -> None:
        """Offer one tensor's scores; names must come in increasing order.

        Args:
            name: Name of the tensor.
            scores: Scores, any shape, without NaN.

        Raises:
            SelectionError: The names are out of order, or a score is NaN.
        """
        if self.names and name <= self.names[-1]:
            raise SelectionError(f"names must be added in increasing order, got {name!r} after {self.names[-1]!r}.")
        flat = scores.detach().flatten().float()
        _refuse_nan(name, flat)
        self.names.append(name)
        # Later entries lose ties against those already held, so only strictly better ones matter once k are held.
        keep = (flat > self._threshold).nonzero().flatten() if self._held >= self.k else None
        if keep is None or keep.numel() > self.k:
            candidates = flat if keep is None else flat[keep]
            best = top_k_mask(candidates, self.k).nonzero().flatten()
            keep = best if keep is None else keep[best]
        self._scores.append(flat[keep].cpu())
        self._indices.append(keep.cpu())
        self._tensors.append(torch.full((keep.numel(),), len(self.names) - 1, dtype=torch.int32))
        self._held += keep.numel()
        if self._held >= 2 * self.k:
            self._shrink()

    def _shrink(self) -> None:
        scores, tensors, indices = torch.cat(self._scores), torch.cat(self._tensors), torch.cat(self._indices)
        best = top_k_mask(scores, self.k)
        self._scores, self._tensors, self._indices = [scores[best]], [tensors[best]], [indices[best]]
        self._held = int(best.sum())
        if self._held >= self.k:
            self._threshold = float(self._scores[0].min())

    def result(self) -> dict[str, torch.Tensor]:
        """Return the kept flat indices per tensor: int64, increasing; tensors without any are left out."""
        if not self.names:
            return {}
        self._shrink()
        found = {}
        for position in self._tensors[0].unique().tolist():
            found[self.names[position]] = self._indices[0][self._tensors[0] == position].sort().values
        return found


def _refuse_nan(name: str, scores: torch.Tensor) -> None:
    if torch.isnan(scores).any():
        raise SelectionError(f"scores must not be NaN, got NaN in {name!r}. Check the data and the loss.")


def unit_of(name: str, granularity: Granularity) -> str:
    """Name of the unit that a tensor belongs to: itself, or for `"layer"` everything up to the first number.

    `bert.encoder.layer.3.output.dense.weight` is in layer `bert.encoder.layer.3`; a tensor outside of any numbered
    layer is in a unit with its module.
    """
    if granularity == "tensor":
        return name
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name


def _select_units(
    scored: Iterable[tuple[str, torch.Tensor]], budget: int, granularity: Granularity
) -> dict[str, torch.Tensor]:
    """Take whole tensors or layers, by falling mean score, as long as the next one still fits in the budget."""
    sums: dict[str, float] = {}
    members: dict[str, list[tuple[str, int]]] = {}
    for name, scores in scored:
        if not scores.numel():
            continue
        unit = unit_of(name, granularity)
        _refuse_nan(name, scores)
        sums[unit] = sums.get(unit, 0.0) + float(scores.double().sum())
        members.setdefault(unit, []).append((name, scores.numel()))
    sizes = {unit: sum(size for _, size in tensors) for unit, tensors in members.items()}
    taken: dict[str, torch.Tensor] = {}
    left = budget
    for unit in sorted(members, key=lambda unit: (-sums[unit] / sizes[unit], unit)):
        if sizes[unit] <= left:
            left -= sizes[unit]
            taken.update({name: torch.arange(size) for name, size in members[unit]})
    if not taken:
        raise SelectionError(
            f"budget must hold at least one {granularity}, got {budget} entries for units of {min(sizes.values())} or "
            "more. Raise density or num_params, or choose a finer granularity."
        )
    return dict(sorted(taken.items()))


def select(
    scored: Iterable[tuple[str, torch.Tensor]],
    sizes: Mapping[str, int],
    *,
    density: float | None = None,
    num_params: int | None = None,
    scope: Scope = "global",
    granularity: Granularity = "entry",
) -> dict[str, torch.Tensor]:
    """Turn scores into a mask with exactly the budget.

    Args:
        scored: (tensor name, scores) in increasing order of the names; each tensor is looked at once.
        sizes: Number of entries of every eligible tensor.
        density: Share of the eligible entries, in (0, 1].
        num_params: The same as an integer; mutually exclusive with `density`.
        scope: `"global"`, one budget over all tensors, or `"tensor"`, the same density in each (`density` only).
        granularity: `"entry"`, or whole `"tensor"`s or `"layer"`s by falling mean score while they fit the budget.

    Returns:
        Flat indices per tensor: int64, increasing; tensors without any are left out.

    Raises:
        SelectionError: The budget is impossible, or a score is NaN.
    """
    if scope == "tensor":
        if granularity != "entry" or density is None:
            raise SelectionError(
                f"scope='tensor' must come with density and granularity='entry', got density={density!r} and "
                f"granularity={granularity!r}. Use scope='global'."
            )
        resolve_budget(sum(sizes.values()), density, None)
        chosen = {}
        for name, scores in scored:
            best = TopK(max(1, round(density * scores.numel())))
            if round(density * scores.numel()):
                best.add(name, scores)
                chosen.update(best.result())
        if not chosen:
            raise no_entry_in_any_tensor(density)
        return chosen
    budget = resolve_budget(sum(sizes.values()), density, num_params)
    if granularity != "entry":
        return _select_units(scored, budget, granularity)
    best = TopK(budget)
    for name, scores in scored:
        best.add(name, scores)
    return best.result()
