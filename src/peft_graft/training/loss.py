"""Compute the loss of a model on batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from ..tuner.backends import collectives

LossFn = Callable[[nn.Module, Any], torch.Tensor]


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the loss that the model computes itself from a batch with labels.

    Args:
        model: A model that takes the batch as keyword arguments and returns an output with `loss`.
        batch: Mapping of tensors, with labels.

    Returns:
        Mean loss of the batch, a scalar.

    Raises:
        ValueError: The model returns no loss.
    """
    return loss_of(model(**batch), batch)


def loss_of(output: Any, batch: Any) -> torch.Tensor:
    """Return the loss in a model's output.

    Args:
        output: With a `loss`.
        batch: The batch that it is for, for the message.

    Raises:
        ValueError: There is no loss.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"batch must make the model return a loss, got keys {sorted(batch)}. "
            "Include labels, pass loss_fn=lambda model, batch: ..., or use objective='donor', which needs none."
        )
    return loss


def batch_size(batch: Any) -> int:
    """Return the number of examples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
    return 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def mean_loss(model: nn.Module, batches: list[Any], loss_fn: LossFn) -> float:
    """Compute the mean loss over all examples of the batches of all ranks, without gradients.

    Args:
        model: The model, in the mode that it is in.
        batches: This rank's batches.
        loss_fn: Mean loss of a batch.

    Returns:
        The mean, the same on every rank; 0 where no rank has a batch.
    """
    loss_sum, examples = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            size = batch_size(batch)
            loss_sum += float(loss_fn(model, send_to_device(batch, device))) * size
            examples += size
    sums = collectives.all_reduce_sum(torch.tensor([loss_sum, examples], dtype=torch.float64))
    return float(sums[0] / sums[1].clamp(min=1))
