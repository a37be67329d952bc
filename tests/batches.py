"""What the tests of training share: labelled batches, losses, and a gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from grafts import graft
from peft_graft.training.measure import measure

Batch = dict[str, torch.Tensor]


def examples(sizes: tuple[int, ...] = (4, 1, 3), outputs: int = 3) -> list[Batch]:
    """Batches of unequal sizes: a mean of batch means would not be the mean over examples."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(size, 4, generator=generator), "y": torch.randint(outputs, (size,), generator=generator)}
        for size in sizes
    ]


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return cross_entropy(model(batch["x"]), batch["y"])


def whole(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def gradient(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model)
    loss_of(model, batch).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def regression(count: int = 3, seed: int = 0) -> list[Batch]:
    """Batches with real targets."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"x": torch.randn(4, 4, generator=generator), "y": torch.randn(4, 3, generator=generator)} for _ in range(count)
    ]


def squared_error(model: nn.Module, batch: Batch) -> torch.Tensor:
    return mse_loss(model(batch["x"]), batch["y"])


def quietly(model: nn.Module, measurement: str, batches: list[Any], loss_fn: Callable[..., Any] = loss_of) -> Any:
    """Measure without a progress bar."""
    return measure(model, model.base_model, "default", measurement, batches, loss_fn, show_progress_bar=False)


def measured(base: nn.Module, donor: nn.Module, measurement: str, batches: list[Batch]) -> dict[str, torch.Tensor]:
    return quietly(graft(base, donor, density=0.5, selection="fisher"), measurement, batches)


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-7), name
