"""Losses: of any output, over batches of any shape, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from batches import examples, loss_of, whole
from grafts import MLP
from peft_graft.training.loss import batch_size, default_loss, evaluating, mean_loss


def test_the_mean_loss_weighs_examples_alike() -> None:
    base = MLP()
    assert mean_loss(base, examples(), loss_of) == pytest.approx(loss_of(base, whole(examples())).item())


def test_batches_of_any_shape_have_a_size() -> None:
    x, none = torch.zeros(3, 2), torch.zeros(())
    assert [batch_size(b) for b in (x, {"a": 1, "b": x}, (x, x), [x], none, {"a": 1})] == [3, 3, 3, 3, 1, 1]


@pytest.mark.parametrize("give", [dict, lambda **values: type("Output", (), values)], ids=["mapping", "object"])
def test_the_loss_is_found_in_any_output(give: Callable[..., object]) -> None:
    assert default_loss(lambda **batch: give(loss=batch["x"] * 2), {"x": torch.ones(())}) == 2


def test_modes_come_back_even_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
