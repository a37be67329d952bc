"""The registry of combinations: what `combination_type` may be, and how an entry is made of several patches."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from .arithmetic import masked_sum

# (weighted deltas float64 [K, n], taken bool [K, n]) -> bool [K, n]
Votes = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True)
class Combination:
    """A row of `COMBINATIONS`: which patches vote on an entry, and how their deltas are reduced to one.

    With the weighted deltas d_i = w_i * (v_i - base), an entry becomes base + the sum or the mean of the d_i that vote.
    An entry without a vote is left out of the stitched patch.

    Args:
        name: The value of `combination_type`.
        votes: Function (deltas float64 [K, n], taken bool [K, n]) -> bool [K, n]. It is given the weighted deltas of K
            patches at n entries, 0 where a patch does not take the entry, and which entries each patch takes; it
            returns which of the takers vote.
        reduce: "sum" or "mean" of the deltas that vote.
        summary: One line for `--help` and the docs.
    """

    name: str
    votes: Votes
    reduce: Reduce
    summary: str

    def cast_votes(self, deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
        """Call `votes`, and check its result.

        Args:
            deltas: Weighted deltas, float64 [K, n]; 0 where the patch does not take the entry.
            taken: Whether a patch takes an entry, bool [K, n].

        Returns:
            The votes, bool [K, n].

        Raises:
            ValueError: The result has another dtype or shape, or votes for entries that a patch does not take.
        """
        votes = self.votes(deltas, taken)
        if not isinstance(votes, torch.Tensor) or votes.dtype != torch.bool or votes.shape != taken.shape:
            got = f"{votes.dtype} of shape {tuple(votes.shape)}" if isinstance(votes, torch.Tensor) else repr(votes)
            raise ValueError(
                f"votes of combination_type {self.name!r} must be a bool tensor of shape {tuple(taken.shape)}, got "
                f"{got}. Start from its second argument, which has this dtype and shape."
            )
        if bool((votes & ~taken).any()):
            raise ValueError(
                f"votes of combination_type {self.name!r} must come from patches that take the entry, got "
                f"{int((votes & ~taken).sum())} others. Return `taken & ...`."
            )
        return votes


COMBINATIONS: dict[str, Combination] = {}


def register_combination(name: str, summary: str, *, reduce: Reduce = "mean") -> Callable[[Votes], Votes]:
    """Add a way to combine patches to `COMBINATIONS`, as a decorator of the function that casts the votes.

    Afterwards `GraftModel.add_weighted_adapter(..., combination_type=name)` and `stitch` accept the name:

        @register_combination("agreeing", "base + the mean of the weighted deltas, where all have one sign")
        def agreeing_votes(deltas, taken):
            positive, negative = ((deltas * side > 0) & taken for side in (1, -1))
            return taken & ~(positive.any(0) & negative.any(0))

    Args:
        name: Name of the combination: lower-case letters, digits and underscores.
        summary: One line that says what an entry becomes.
        reduce: Whether the deltas that vote are added up ("sum") or averaged ("mean").

    Returns:
        A decorator, which takes the function (see `Combination.votes`) and returns it as it is.

    Raises:
        ValueError: The name is taken or malformed, the summary is empty, or `reduce` is unknown.
        TypeError: What is decorated cannot be called.
    """
    problems = []
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        problems.append(f"name must be lower-case letters, digits and underscores, got {name!r}.")
    elif name in COMBINATIONS:
        problems.append(f"name must be new, got {name!r}. Registered are {sorted(COMBINATIONS)}.")
    if not isinstance(summary, str) or len(summary.strip().splitlines()) != 1:
        problems.append(f"summary must say in one line what an entry becomes, got {summary!r}.")
    if reduce not in get_args(Reduce):
        problems.append(f"reduce must be one of {list(get_args(Reduce))}, got {reduce!r}.")
    if problems:
        raise ValueError(" ".join(problems))

    def register(votes: Votes) -> Votes:
        if not callable(votes):
            raise TypeError(f"votes of combination_type {name!r} must be a function, got {votes!r}.")
        COMBINATIONS[name] = Combination(name, votes, reduce, summary)
        return votes

    return register


@register_combination("mean", "base + the mean of the weighted deltas, as of several active grafts", reduce="mean")
@register_combination("linear", "base + the sum of the weighted deltas", reduce="sum")
def union_votes(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let every patch vote on the entries that it takes."""
    return taken


@register_combination("disjoint", "only entries that a single patch takes; conflicts stay the base's", reduce="sum")
def disjoint_votes(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let a patch vote on the entries that no other patch takes."""
    return taken & (taken.sum(0) == 1)


@register_combination("ties", "base + the mean of the weighted deltas that have the elected sign", reduce="mean")
def sign_election(deltas: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Let the patches vote whose delta has the sign of the sum of all deltas.

    With the mean that follows, these are "elect" and "disjoint merge" of TIES-merging (Yadav et al. 2023, arXiv
    2306.01708, Algorithm 1) with lambda = 1; its first step, "trim", is the selection that made the masks. Where the
    sum is exactly 0, no delta is chosen over its opposite.
    """
    return taken & (deltas.sign() == masked_sum(deltas, taken).sign())
