"""Count exactly how many entries a density or a number allows, over everything, per tensor, or in whole units."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .topk import SelectionError

SCOPES = ("global", "tensor")
GRANULARITIES = ("entry", "tensor", "layer")


@dataclass(frozen=True)
class Budget:
    """The budget: how much to take from the donor, before anything is known about the tensors.

    Args:
        density: Share of the eligible entries, in (0, 1]; None where `num_params` is given.
        num_params: The same as an integer, >= 1.
        budget_scope: `"global"`, one budget over all tensors, or `"tensor"`, the same density in each (needs a density,
            and entries as granularity).
        granularity: `"entry"`, or whole `"tensor"`s or `"layer"`s by falling mean score while they fit the budget.

    Raises:
        SelectionError: The scope or the granularity is none of these.
    """

    density: float | None = None
    num_params: int | None = None
    budget_scope: str = "global"
    granularity: str = "entry"

    def __post_init__(self) -> None:
        """Refuse what `resolve` would take for something else."""
        for name, allowed in (("budget_scope", SCOPES), ("granularity", GRANULARITIES)):
            if getattr(self, name) not in allowed:
                raise SelectionError(f"{name} must be one of {list(allowed)}, got {getattr(self, name)!r}.")

    def resolve(self, sizes: Mapping[str, int], ratio: float = 1.0) -> int | dict[str, int]:
        """Return the exact number of entries to take.

        Args:
            sizes: Number of entries of every eligible tensor, by name.
            ratio: Factor on the budget, >= 1, capped at all entries: a mask that is trained chooses from more
                candidates than it may take.

        Returns:
            One number, or for `budget_scope="tensor"` one per tensor, 0 included.

        Raises:
            SelectionError: The budget is impossible.
        """
        eligible = sum(sizes.values())
        count = resolve_budget(eligible, self.density, self.num_params)
        if self.budget_scope == "global":
            return min(eligible, round(ratio * count))
        if self.density is None or self.granularity != "entry":
            raise SelectionError(
                f"budget_scope='tensor' must come with density and granularity='entry', got density={self.density!r} "
                f"and granularity={self.granularity!r}. Use budget_scope='global'."
            )
        if not any(round(self.density * size) for size in sizes.values()):
            raise SelectionError(
                f"density must give at least one entry in some tensor, got {self.density!r}. The largest tensor has "
                f"{max(sizes.values()):,} entries: raise it, or use budget_scope='global'."
            )
        density = min(1.0, self.density * ratio)
        return {name: round(density * size) for name, size in sorted(sizes.items())}


def capped_note(budget: Budget, wanted: int, taken: int, eligible: int) -> str | None:
    """Say that fewer entries differ than a budget could take; None where it takes as many as it may.

    Args:
        budget: The budget.
        wanted: Number of entries that it allows.
        taken: Number of entries taken.
        eligible: Number of entries that the budget is a share of, >= 1.
    """
    if taken >= wanted or budget.granularity != "entry":
        return None
    where = " within the budgets of their tensors" if budget.budget_scope == "tensor" else ""
    return (
        f"budget is capped at {taken:,} of {wanted:,} entries: only {taken / eligible:.3g} of the {eligible:,} "
        f"eligible entries differ{where}. For a smaller patch, give a density (--density) below that."
    )


def resolve_budget(eligible: int, density: float | None, num_params: int | None) -> int:
    """Turn a density or a count into the exact number of entries: `round(density * eligible)`.

    Args:
        eligible: Number of eligible entries.
        density: Share of them, in (0, 1]; None when `num_params` is given.
        num_params: The same as an integer, in [1, eligible]; None when `density` is given.

    Returns:
        Number of entries to take from the donor, in [1, eligible].

    Raises:
        SelectionError: Neither or both are given, or the budget would be 0 or above `eligible`.
    """
    if (density is None) == (num_params is None):
        raise SelectionError(
            f"exactly one of density and num_params must be given, got density={density!r} and "
            f"num_params={num_params!r}. Give one of them."
        )
    if num_params is not None:
        if isinstance(num_params, bool) or not isinstance(num_params, int) or not 1 <= num_params <= eligible:
            raise SelectionError(
                f"num_params must be an integer in [1, {eligible}] (the eligible entries), got {num_params!r}. "
                "Lower it or target more modules."
            )
        return num_params
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise SelectionError(f"density must be in (0, 1], got {density!r}. Give the share of entries to graft.")
    budget = round(density * eligible)
    if budget == 0:
        remedy = f"Raise it to {1 / eligible:.1e} or more." if eligible else "Target modules that hold parameters."
        raise SelectionError(
            f"density must give at least one entry, got {density!r} of {eligible} eligible entries. {remedy}"
        )
    return budget


def unit_of(name: str, granularity: str) -> str:
    """Return the name of the unit that a tensor belongs to.

    For `"tensor"` that is the tensor itself, for `"layer"` everything up to the first number:
    `bert.encoder.layer.3.output.dense.weight` is in layer `bert.encoder.layer.3`. A tensor outside of any numbered
    layer is in a unit with its module.
    """
    if granularity == "tensor":
        return name
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name.rpartition(".")[0] or name


class Units:
    """Mean scores of whole tensors or layers, which may come in blocks.

    Args:
        granularity: The unit: `"tensor"` or `"layer"`.
    """

    def __init__(self, granularity: str) -> None:
        self.granularity = granularity
        self._sums: dict[str, float] = {}
        self._members: dict[str, dict[str, int]] = {}
        self._differing: set[str] = set()

    def add(self, name: str, sum_of_scores: float, count: int, differs: bool = True) -> None:
        """Take in the scores of a tensor, or of a block of it.

        Args:
            name: Name of the tensor.
            sum_of_scores: Sum of the scores.
            count: Their number, >= 1.
            differs: Whether any of the entries differs between base and donor.
        """
        unit = unit_of(name, self.granularity)
        if differs:
            self._differing.add(unit)
        self._sums[unit] = self._sums.get(unit, 0.0) + sum_of_scores
        members = self._members.setdefault(unit, {})
        members[name] = members.get(name, 0) + count

    def select(self, budget: int) -> dict[str, int]:
        """Select units by falling mean score, each as long as it still fits in the budget.

        Returns:
            Number of entries by name of every selected tensor, in order of the names. None if nothing differs.

        Raises:
            SelectionError: No unit fits.
        """
        sizes = {unit: sum(self._members[unit].values()) for unit in self._differing}
        selected: dict[str, int] = {}
        left = budget
        for unit in sorted(sizes, key=lambda unit: (-self._sums[unit] / sizes[unit], unit)):
            if sizes[unit] <= left:
                left -= sizes[unit]
                selected |= self._members[unit]
        if not selected and sizes:
            raise SelectionError(
                f"budget must hold at least one {self.granularity}, got {budget} entries for units of "
                f"{min(sizes.values())} or more. Raise density or num_params, or choose a finer granularity."
            )
        return dict(sorted(selected.items()))
