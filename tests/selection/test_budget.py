"""Budgets are exact counts, over everything, per tensor and in whole units; impossible ones are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_graft.selection.budget import Budget, resolve_budget, unit_of
from peft_graft.selection.topk import SelectionError


@given(eligible=st.integers(1, 10**9), density=st.floats(1e-12, 1))
def test_a_density_is_rounded_to_the_nearest_count(eligible: int, density: float) -> None:
    if round(density * eligible):
        assert resolve_budget(eligible, density, None) == round(density * eligible)
    else:
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            resolve_budget(eligible, density, None)


@pytest.mark.parametrize(("eligible", "density"), [(7, 0.01), (1_000_003, 1e-7), (3, 0.1)])
def test_the_error_for_a_density_too_low_names_one_that_works(eligible: int, density: float) -> None:
    with pytest.raises(SelectionError, match=f"got {density} of {eligible} eligible entries") as error:
        resolve_budget(eligible, density, None)
    suggested = float(str(error.value).partition("Raise it to ")[2].partition(" ")[0])
    assert resolve_budget(eligible, suggested, None) == 1


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


def test_no_eligible_entries_are_said_to_be_none() -> None:
    with pytest.raises(SelectionError, match="0.5 of 0 eligible entries. Target modules that hold parameters"):
        resolve_budget(0, 0.5, None)


@given(sizes=st.lists(st.integers(0, 99), min_size=1), density=st.floats(0.01, 1), ratio=st.floats(1, 100))
def test_a_budget_per_tensor_is_its_share_of_each(sizes: list[int], density: float, ratio: float) -> None:
    named = {f"t{i:03}": size for i, size in enumerate(sizes)}
    budget = Budget(density, budget_scope="tensor")
    if not any(round(density * size) for size in sizes):
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            budget.resolve(named)
        return
    assert budget.resolve(named) == {name: round(density * size) for name, size in named.items()}
    assert budget.resolve(named, ratio) == {name: round(min(1, density * ratio) * size) for name, size in named.items()}


def test_candidates_are_a_multiple_of_the_budget_up_to_everything() -> None:
    budget = Budget(num_params=7)
    assert [budget.resolve({"a": 10, "b": 20}, ratio) for ratio in (1, 2.5, 100)] == [7, 18, 30]


def test_a_density_that_is_enough_in_total_but_in_no_tensor_is_refused() -> None:
    with pytest.raises(SelectionError, match="in some tensor, got 0.1. The largest tensor has 3 entries"):
        Budget(0.1, budget_scope="tensor").resolve({"a": 3, "b": 3, "c": 3})
    assert Budget(0.1).resolve({"a": 3, "b": 3, "c": 3}) == 1


@pytest.mark.parametrize("options", [{"num_params": 2}, {"density": 0.5, "granularity": "layer"}])
def test_a_budget_per_tensor_needs_a_density_of_entries(options: dict[str, object]) -> None:
    with pytest.raises(SelectionError, match="budget_scope='tensor' must come with density and granularity='entry'"):
        Budget(budget_scope="tensor", **options).resolve({"a": 2, "b": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"budget_scope": "layer"}, {"granularity": "row"}])
def test_unknown_words_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(SelectionError, match="must be one of"):
        Budget(0.1, **options)  # type: ignore[arg-type]


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
