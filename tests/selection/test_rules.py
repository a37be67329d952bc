"""Rules, scored by hand; and one exact top-k over all tensors, against a dense sort of everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_graft.selection.rules import (
    RULES,
    Evidence,
    SelectionError,
    TopK,
    get_rule,
    resolve_budget,
    select,
    top_k_mask,
    unit_of,
)

DELTA = torch.tensor([[2.0, -3.0], [0.0, 1.0]])
# Few distinct values, so that ties are everywhere.
SCORES = st.lists(st.integers(-2, 2).map(float), min_size=0, max_size=12)
MODELS = st.lists(SCORES, min_size=1, max_size=5).filter(lambda tensors: sum(map(len, tensors)) > 0)


def evidence(**changes: object) -> Evidence:
    return Evidence(**{"name": "a.weight", "base": torch.zeros(2, 2), "delta": DELTA, **changes})


def named(tensors: list[list[float]]) -> list[tuple[str, torch.Tensor]]:
    return [(f"t{i}", torch.tensor(values)) for i, values in enumerate(tensors)]


def sizes_of(scored: list[tuple[str, torch.Tensor]]) -> dict[str, int]:
    return {name: scores.numel() for name, scores in scored}


def dense_top_k(scored: list[tuple[str, torch.Tensor]], k: int) -> dict[str, list[int]]:
    """The k best of everything, sorted by falling score, then name, then flat index."""
    entries = [(-float(s), name, i) for name, scores in scored for i, s in enumerate(scores.flatten())]
    found: dict[str, list[int]] = {}
    for _, name, i in sorted(entries)[:k]:
        found.setdefault(name, []).append(i)
    return {name: sorted(found[name]) for name in sorted(found)}


def as_lists(chosen: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: index.tolist() for name, index in chosen.items()}


# Rules


def test_magnitude_is_the_absolute_delta() -> None:
    assert RULES["magnitude"].score(evidence()).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("name", ["taylor", "path_taylor"])
def test_taylor_is_the_absolute_product_with_the_gradient(name: str) -> None:
    gradient = torch.tensor([[-1.0, 2.0], [5.0, 0.5]])
    assert RULES[name].score(evidence(measured=gradient)).tolist() == [[2, 6], [0, 0.5]]


def test_fisher_multiplies_the_squared_gradient_by_the_squared_delta() -> None:
    squared = torch.tensor([[1.0, 2.0], [5.0, 0.5]])
    assert RULES["fisher"].score(evidence(measured=squared)).tolist() == [[4, 18], [0, 0.5]]


def test_wanda_multiplies_each_column_by_the_norm_of_its_input() -> None:
    assert RULES["wanda"].score(evidence(measured=torch.tensor([[10.0, 1.0]]))).tolist() == [[20, 3], [0, 1]]


def test_random_depends_on_the_seed_and_the_name_and_on_nothing_else() -> None:
    score = RULES["random"].score
    assert torch.equal(score(evidence(seed=3)), score(evidence(seed=3, delta=-DELTA, base=DELTA)))
    assert not torch.equal(score(evidence(seed=3)), score(evidence(seed=4)))
    assert not torch.equal(score(evidence(seed=3)), score(evidence(seed=3, name="b.weight")))


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**32, 2**70])
def test_random_takes_any_seed_and_is_uniform(seed: int) -> None:
    scores = RULES["random"].score(evidence(seed=seed, delta=torch.zeros(20_000)))
    counts = np.histogram(scores.numpy(), bins=10, range=(0, 1))[0]
    assert counts.sum() == 20_000
    assert counts.min() > 1_800 and counts.max() < 2_200


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_known_by_its_name_and_scores_the_whole_tensor(name: str) -> None:
    rule = get_rule(name)
    assert rule.name == name and rule.summary
    scores = rule.score(evidence(measured=torch.ones(2, 2)))
    assert scores.shape == DELTA.shape and scores.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(n for n, rule in RULES.items() if rule.needs not in ("weights", "training")))
def test_a_data_driven_rule_asks_for_data(name: str) -> None:
    with pytest.raises(SelectionError, match=r"got None for 'a.weight'. Call peft_graft.initialize_graft"):
        RULES[name].score(evidence())


def test_an_unknown_rule_is_refused_with_the_table() -> None:
    with pytest.raises(SelectionError, match=r"selection must be one of \['fisher', .*\], got 'best'"):
        get_rule("best")


# Budgets


@given(total=st.integers(1, 10**9), density=st.floats(1e-12, 1))
def test_a_density_is_rounded_to_the_nearest_count(total: int, density: float) -> None:
    if round(density * total):
        assert resolve_budget(total, density, None) == round(density * total)
    else:
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            resolve_budget(total, density, None)


@pytest.mark.parametrize(("total", "density"), [(7, 0.01), (1_000_003, 1e-7), (3, 0.1)])
def test_the_error_for_a_density_too_low_names_one_that_works(total: int, density: float) -> None:
    with pytest.raises(SelectionError, match=f"got {density} of {total} eligible entries") as error:
        resolve_budget(total, density, None)
    suggested = float(str(error.value).partition("Raise it to ")[2].partition(" ")[0])
    assert resolve_budget(total, suggested, None) == 1


@pytest.mark.parametrize("num_params", [1, 10])
def test_a_count_is_taken_as_it_is(num_params: int) -> None:
    assert resolve_budget(10, None, num_params) == num_params


@pytest.mark.parametrize("num_params", [0, -1, 11, 2.0, True])
def test_an_impossible_count_is_refused(num_params: object) -> None:
    with pytest.raises(SelectionError, match=r"num_params must be an integer in \[1, 10\]"):
        resolve_budget(10, None, num_params)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_an_impossible_density_is_refused(density: object) -> None:
    with pytest.raises(SelectionError, match=r"density must be in \(0, 1\]"):
        resolve_budget(10, density, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(("density", "num_params"), [(None, None), (0.1, 1)])
def test_exactly_one_of_density_and_count_is_given(density: float | None, num_params: int | None) -> None:
    with pytest.raises(SelectionError, match="exactly one of density and num_params must be given"):
        resolve_budget(10, density, num_params)


# Masks


@given(scores=SCORES, k=st.integers(0, 15))
def test_top_k_marks_exactly_k_and_gives_ties_to_the_lower_index(scores: list[float], k: int) -> None:
    mask = top_k_mask(torch.tensor(scores), k)
    assert mask.nonzero().flatten().tolist() == dense_top_k([("a", torch.tensor(scores))], k).get("a", [])


@settings(max_examples=300)
@given(tensors=MODELS, data=st.data())
def test_the_top_k_of_a_stream_is_that_of_a_dense_sort(tensors: list[list[float]], data: st.DataObject) -> None:
    scored = named(tensors)
    total = sum(sizes_of(scored).values())
    k = data.draw(st.integers(1, total))
    assert as_lists(select(scored, sizes_of(scored), num_params=k)) == dense_top_k(scored, k)


def test_the_stream_holds_no_more_than_a_few_times_k() -> None:
    best = TopK(100)
    generator = torch.Generator().manual_seed(0)
    for i in range(50):
        best.add(f"t{i:02}", torch.rand(1_000, generator=generator))
        assert max(column.numel() for column in best._columns) <= 300


def test_infinite_scores_are_ordinary_ones() -> None:
    scored = named([[float("-inf"), 0.0], [float("inf"), float("-inf")]])
    assert as_lists(select(scored, sizes_of(scored), num_params=3)) == {"t0": [0, 1], "t1": [0]}


@given(tensors=MODELS, density=st.floats(0.01, 1))
def test_scope_tensor_takes_the_same_density_in_each(tensors: list[list[float]], density: float) -> None:
    scored = named(tensors)
    wanted = {name: round(density * len(scores)) for name, scores in scored}
    if not any(wanted.values()):
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            select(scored, sizes_of(scored), density=density, scope="tensor")
        return
    chosen = select(scored, sizes_of(scored), density=density, scope="tensor")
    assert as_lists(chosen) == {
        name: dense_top_k([(name, scores)], wanted[name])[name] for name, scores in scored if wanted[name]
    }


@pytest.mark.parametrize("options", [{"num_params": 2}, {"density": 0.5, "granularity": "layer"}])
def test_scope_tensor_needs_a_density_of_entries(options: dict[str, object]) -> None:
    with pytest.raises(SelectionError, match="scope='tensor' must come with density and granularity='entry'"):
        select(named([[1.0, 2.0]]), {"t0": 2}, scope="tensor", **options)


def test_a_density_that_is_enough_in_total_but_in_no_tensor_is_refused() -> None:
    scored = named([[1.0] * 3, [2.0] * 3])
    with pytest.raises(SelectionError, match="at least one entry in some tensor, got 0.1. Raise it or use scope"):
        select(scored, sizes_of(scored), density=0.1, scope="tensor")
    assert as_lists(select(scored, sizes_of(scored), density=0.1)) == {"t1": [0]}


def test_a_nan_score_is_refused_by_name() -> None:
    scored = named([[1.0], [float("nan"), 1.0]])
    for granularity in ("entry", "tensor"):
        with pytest.raises(SelectionError, match="scores must not be NaN, got NaN in 't1'"):
            select(scored, sizes_of(scored), num_params=2, granularity=granularity)


def test_names_must_come_in_order() -> None:
    with pytest.raises(SelectionError, match="increasing order, got 'a' after 'b'"):
        select([("b", torch.ones(1)), ("a", torch.ones(1))], {"a": 1, "b": 1}, num_params=1)


# Units


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("bert.encoder.layer.3.output.dense.weight", "bert.encoder.layer.3"),
        ("model.layers.11.mlp.experts.2.w1.weight", "model.layers.11"),
        ("h.0.attn.c_attn.bias", "h.0"),
        ("bert.embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm"),
        ("0.weight", "0"),
        ("cls_token", "cls_token"),
    ],
)
def test_a_layer_ends_at_the_first_number(name: str, layer: str) -> None:
    assert unit_of(name, "layer") == layer
    assert unit_of(name, "tensor") == name


def test_whole_tensors_are_taken_by_falling_mean_while_they_fit() -> None:
    scored = named([[1.0, 1.0], [9.0, 0.0, 0.0], [2.0], [4.0, 4.0, 4.0, 4.0]])  # means 1, 3, 2, 4
    assert as_lists(select(scored, sizes_of(scored), num_params=6, granularity="tensor")) == {
        "t2": [0],
        "t3": [0, 1, 2, 3],
    }  # t1 does not fit after t3, t2 does


def test_a_layer_is_taken_as_a_whole() -> None:
    scored = [
        ("h.0.a", torch.tensor([5.0, 5.0])),
        ("h.0.b", torch.tensor([0.0])),
        ("h.1.a", torch.tensor([4.0])),
        ("h.1.b", torch.tensor([[4.0], [4.0]])),
        ("norm", torch.zeros(0)),
    ]
    assert as_lists(select(scored, sizes_of(scored), num_params=3, granularity="layer")) == {
        "h.1.a": [0],
        "h.1.b": [0, 1],
    }


def test_units_of_equal_mean_are_taken_by_name() -> None:
    scored = named([[1.0], [1.0], [1.0]])
    assert as_lists(select(scored, sizes_of(scored), num_params=2, granularity="tensor")) == {"t0": [0], "t1": [0]}


def test_a_budget_below_every_unit_is_refused() -> None:
    scored = named([[1.0] * 4, [1.0] * 3])
    with pytest.raises(SelectionError, match="at least one tensor, got 2 entries for units of 3 or more"):
        select(scored, sizes_of(scored), num_params=2, granularity="tensor")
