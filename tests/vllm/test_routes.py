"""Routes follow whatever views a loader takes, and give up where it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from peft_graft.vllm.routes import Routes
from peft_graft.workflows.checkpoint_patch import CheckpointEdit

View = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """A model with one parameter, a view of the checkpoint's tensor copied into a view of it."""

    def __init__(self, view: View, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.view = view
        self.weight = nn.Parameter(torch.zeros(view(torch.zeros(shape)).shape, dtype=torch.bfloat16))

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            self.weight.copy_(self.view(tensor))


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], View]:
    """A shape, and slices, transpositions and splits of dimensions."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    steps: list[tuple[Any, ...]] = []
    now = shape
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["slice", "transpose", "unsqueeze", "select"]))
        if not now:
            break
        dim = draw(st.integers(0, len(now) - 1))
        if kind == "slice":
            start = draw(st.integers(0, now[dim] - 1))
            length = draw(st.integers(1, now[dim] - start))
            steps.append(("narrow", dim, start, length))
        elif kind == "transpose":
            steps.append(("transpose", dim, draw(st.integers(0, len(now) - 1))))
        elif kind == "unsqueeze":
            steps.append(("unsqueeze", dim))
        else:
            steps.append(("select", dim, draw(st.integers(0, now[dim] - 1))))
        now = tuple(getattr(torch.zeros(now), steps[-1][0])(*steps[-1][1:]).shape)

    def view(tensor: torch.Tensor) -> torch.Tensor:
        for name, *args in steps:
            tensor = getattr(tensor, name)(*args)
        return tensor

    return shape, view


@settings(deadline=None, max_examples=200)
@given(views(), st.data())
def test_entries_go_where_loading_puts_them(case: tuple[tuple[int, ...], View], data: st.DataObject) -> None:
    shape, view = case
    before = torch.randn(shape)
    model = Model(view, shape)
    model.load_weights([("x", before)])
    start = model.weight.detach().clone()
    count = before.numel()
    chosen = data.draw(st.none() | st.sets(st.integers(0, count - 1)).map(sorted))
    indices = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    after = before.clone().flatten()
    values = torch.randn(count if indices is None else len(indices))
    after[slice(None) if indices is None else indices] = values
    edit = CheckpointEdit(shape, values, None, indices)
    routes = Routes(model).find({"x": edit})["x"]
    assert routes is not None and torch.equal(model.weight, start)  # asking changes nothing
    with torch.no_grad():
        for route in routes:
            route.write(edit)
    expected = Model(view, shape)
    expected.load_weights([("x", after.view(shape))])
    assert torch.equal(model.weight, expected.weight)


def test_entries_between_those_of_a_block_are_left_out() -> None:
    model = Model(lambda tensor: tensor[1:3, 1], (4, 3))
    edit = CheckpointEdit((4, 3), torch.arange(1.0, 13), None, torch.arange(12))
    with torch.no_grad():
        for route in Routes(model).find({"x": edit})["x"] or []:
            route.write(edit)
    assert model.weight.tolist() == [5, 8]


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor * 2,
        lambda tensor: tensor.t().contiguous(),
        lambda tensor: tensor.half(),
        lambda tensor: tensor[:1].expand(3, 4),
    ],
)
def test_what_is_computed_is_not_followed(view: View) -> None:
    edit = CheckpointEdit((3, 4), torch.ones(12), None)
    assert Routes(Model(view, (3, 4))).find({"x": edit})["x"] is None


def test_a_tensor_of_another_rank_has_no_routes() -> None:
    model = Model(lambda tensor: tensor, (2,))
    model.load_weights = lambda weights: None  # type: ignore[assignment, method-assign]
    assert Routes(model).find({"x": CheckpointEdit((2,), torch.ones(2), None)})["x"] == []


def test_copy_is_itself_again_after_an_error() -> None:
    copy = torch.Tensor.copy_
    model = Model(lambda tensor: tensor, (2,))
    with pytest.raises(AttributeError):
        Routes(model).find({"x": CheckpointEdit((2,), None, None)})  # type: ignore[arg-type]
    model.load_weights = lambda weights: 1 / 0  # type: ignore[assignment, method-assign, return-value]
    with pytest.raises(ZeroDivisionError):
        Routes(model).find({"x": CheckpointEdit((2,), torch.ones(2), None)})
    assert torch.Tensor.copy_ is copy
