"""Which entries of the delta carry the skill: scores per entry, and one exact top-k over all tensors."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from .topk import SelectionError, TopK, refuse_nan, top_k_mask

__all__ = [
    "RULES",
    "Evidence",
    "Granularity",
    "Needs",
    "Rule",
    "Scope",
    "SelectionError",
    "TopK",
    "Units",
    "generator_of",
    "get_rule",
    "no_entry_in_any_tensor",
    "resolve_budget",
    "select",
    "top_k_mask",
    "unit_of",
]

Needs = Literal["weights", "gradient", "path_gradient", "squared_gradient", "input_norm", "training"]
Scope = Literal["global", "tensor"]
Granularity = Literal["entry", "tensor", "layer"]


@dataclass(frozen=True)
class Evidence:
    """What a rule may look at to score one tensor.

    Args:
        name: Name of the tensor; seeds `random`, so that a tensor's scores do not depend on the others.
        base: Base values, any shape and float dtype.
        delta: `donor - base`, float32, the same shape.
        measured: What the rule's `needs` asks for, float32, broadcastable to the shape; None for `"weights"`.
        seed: Seed of the rule, any integer.
        generator: Where `random` draws from, for a tensor that is scored piece by piece; by default one of its own.
    """

    name: str
    base: torch.Tensor
    delta: torch.Tensor
    measured: torch.Tensor | None = None
    seed: int = 0
    generator: torch.Generator | None = None


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


def generator_of(name: str, seed: int) -> torch.Generator:
    """Return the random numbers of one tensor, which do not depend on the other tensors."""
    # The CPU generator looks at no more than 32 bits of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def random(evidence: Evidence) -> torch.Tensor:
    """Score uniformly at random in [0, 1): the floor every other rule must beat."""
    generator = evidence.generator or generator_of(evidence.name, evidence.seed)
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


def unit_of(name: str, granularity: Granularity) -> str:
    """Name of the unit that a tensor belongs to: itself, or for `"layer"` everything up to the first number.

    `bert.encoder.layer.3.output.dense.weight` is in layer `bert.encoder.layer.3`; a tensor outside of any numbered
    layer is in a unit with its module.
    """
    if granularity == "tensor":
        return name
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name


class Units:
    """Mean scores of whole tensors or layers, which may come in pieces.

    Args:
        granularity: What a unit is: `"tensor"` or `"layer"`.
    """

    def __init__(self, granularity: Granularity) -> None:
        self.granularity = granularity
        self._sums: dict[str, float] = {}
        self._members: dict[str, dict[str, int]] = {}

    def add(self, name: str, scores: torch.Tensor) -> None:
        """Take in the scores of a tensor, or of a piece of it.

        Raises:
            SelectionError: A score is NaN.
        """
        if not scores.numel():
            return
        refuse_nan(name, scores)
        unit = unit_of(name, self.granularity)
        self._sums[unit] = self._sums.get(unit, 0.0) + float(scores.double().sum())
        members = self._members.setdefault(unit, {})
        members[name] = members.get(name, 0) + scores.numel()

    def take(self, budget: int) -> dict[str, int]:
        """Take units by falling mean score, each as long as it still fits in the budget.

        Returns:
            Number of entries by name of every tensor taken, in order of the names.

        Raises:
            SelectionError: No unit fits.
        """
        sizes = {unit: sum(members.values()) for unit, members in self._members.items()}
        taken: dict[str, int] = {}
        left = budget
        for unit in sorted(sizes, key=lambda unit: (-self._sums[unit] / sizes[unit], unit)):
            if sizes[unit] <= left:
                left -= sizes[unit]
                taken |= self._members[unit]
        if not taken:
            raise SelectionError(
                f"budget must hold at least one {self.granularity}, got {budget} entries for units of "
                f"{min(sizes.values())} or more. Raise density or num_params, or choose a finer granularity."
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
        units = Units(granularity)
        for name, scores in scored:
            units.add(name, scores)
        return {name: torch.arange(size) for name, size in units.take(budget).items()}
    best = TopK(budget)
    for name, scores in scored:
        best.add(name, scores)
    return best.result()
