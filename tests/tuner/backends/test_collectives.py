"""Collectives: the values of a lone process are its own, and only work on data joins a group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grafts import MLP, graft
from models import perturbed
from peft_graft import fit_alpha, initialize_graft
from peft_graft.tuner.backends import collectives


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that a launcher has started this process, and note where it would join the others."""
    made: list[int] = []
    monkeypatch.setattr(collectives, "_state", lambda: made.append(1))
    for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    return made


def test_looking_joins_no_group(states: list[int]) -> None:
    assert collectives.world_size() == 1 and not collectives.joined()
    assert collectives.all_reduce_min_max([3, -4]) == [(3, 3), (-4, -4)]
    assert torch.equal(collectives.all_reduce_sum(torch.arange(3)), torch.arange(3))
    assert states == []


@pytest.mark.parametrize("work", [fit_alpha, initialize_graft])
def test_work_on_data_joins_the_group_of_the_launcher(work: Any, states: list[int]) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3)
    assert states == []
    work(model, [torch.ones(2, 4)], loss_fn=lambda model, batch: model(batch).square().mean(), show_progress_bar=False)
    assert states


def test_a_process_that_nobody_launched_joins_nothing(states: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK")
    collectives.join()
    assert states == []
