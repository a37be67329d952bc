"""Exact top-k of tensors that come in blocks, with values carried along, and of more scores than memory holds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_graft.selection.topk import Counts, SelectionError, TopK, find_threshold, top_k_mask

# Few different scores, so that there are ties everywhere.
SCORES = st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 1.0, math.inf]), min_size=1, max_size=30)
TENSORS = st.lists(SCORES, min_size=1, max_size=5)


def best_of(tensors: list[list[float]], k: int) -> dict[str, list[int]]:
    """The k highest by a sort of everything: ties go to the earlier tensor, then to the earlier entry."""
    entries = sorted((-score, t, i) for t, scores in enumerate(tensors) for i, score in enumerate(scores))
    found: dict[str, list[int]] = {}
    for _, t, i in sorted(entries[:k], key=lambda entry: entry[1:]):
        found.setdefault(f"t{t}", []).append(i)
    return found


@given(TENSORS, st.integers(1, 100), st.integers(1, 7))
def test_blocks_give_what_whole_tensors_give(tensors: list[list[float]], k: int, size: int) -> None:
    best = TopK(k)
    for t, scores in enumerate(tensors):
        for block in torch.tensor(scores).split(size):
            best.add(f"t{t}", block)
    assert {name: indices.tolist() for name, indices in best.indices().items()} == best_of(tensors, k)


@given(TENSORS, st.integers(1, 20), st.integers(1, 7))
def test_what_is_carried_stays_beside_its_score(tensors: list[list[float]], k: int, size: int) -> None:
    best, numbers = TopK(k), {}
    for t, scores in enumerate(tensors):
        # Of another dtype in every other tensor: what comes back must hold both.
        numbers[f"t{t}"] = torch.arange(len(scores), dtype=torch.bfloat16 if t % 2 else torch.float32) + t
        for block, carried in zip(torch.tensor(scores).split(size), numbers[f"t{t}"].split(size), strict=True):
            best.add(f"t{t}", block, carried, -carried)
    for name, (indices, one, other) in best.selected():
        assert one.tolist() == numbers[name][indices].tolist()
        assert torch.equal(one, -other)


@pytest.mark.parametrize("k", [50, 300])
def test_no_more_than_three_k_are_held(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    best, sizes, empty = TopK(k), [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, **options: (sizes.append(size), empty(size, **options))[1])
    for i in range(40):
        best.add("t", torch.arange(i * 40, i * 40 + 40).float(), torch.zeros(40))
    assert k < max(sizes) <= 3 * k
    assert best.indices()["t"].tolist() == list(range(1600 - k, 1600))


@given(scores=SCORES, k=st.integers(0, 35))
def test_top_k_marks_exactly_k_and_gives_ties_to_the_lower_index(scores: list[float], k: int) -> None:
    mask = top_k_mask(torch.tensor(scores), k)
    assert mask.nonzero().flatten().tolist() == best_of([scores], k).get("t0", [])


def test_nothing_is_held_after_clear() -> None:
    best = TopK(3)
    best.add("t", torch.arange(5.0))
    best.clear()
    assert best.indices() == {}


def test_names_must_not_go_back() -> None:
    best = TopK(1)
    best.add("b", torch.ones(2))
    best.add("b", torch.ones(2))
    with pytest.raises(SelectionError, match="increasing order, got 'a' after 'b'"):
        best.add("a", torch.ones(1))


def test_nan_is_refused_where_it_is_found() -> None:
    with pytest.raises(SelectionError, match="NaN in 't'"):
        TopK(1).add("t", torch.tensor([0.0, float("nan")]))


@given(TENSORS, st.data())
def test_the_threshold_of_two_passes_is_the_kth_highest(tensors: list[list[float]], data: st.DataObject) -> None:
    everything = sorted((score for scores in tensors for score in scores), reverse=True)
    k = data.draw(st.integers(1, len(everything)))
    passes = 0

    def run(count: Callable[[torch.Tensor], Counts]) -> list[Counts]:
        nonlocal passes
        passes += 1
        return [count(torch.tensor(scores)) for scores in tensors]

    threshold, ties = find_threshold(run, k)
    assert passes == 2
    assert threshold == everything[k - 1]
    assert ties == everything[:k].count(threshold)


def test_the_threshold_tells_neighbours_apart() -> None:
    lower, upper = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    scores = torch.stack([lower] * 5 + [upper] * 5)
    assert find_threshold(lambda count: [count(scores)], 5) == (float(upper), 5)
    assert find_threshold(lambda count: [count(scores)], 7) == (float(lower), 2)
    assert find_threshold(lambda count: [count(-scores)], 7) == (-float(upper), 2)
