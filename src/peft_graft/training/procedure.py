"""Train a mask by the published procedure (Panigrahi et al. 2023, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..checkpoints.pairing import stream
from ..selection.topk import top_k_mask
from ..tuner import GraftModel
from .loss import LossFn, default_loss, mean_loss
from .measure import Measurer, measuring

_OFFSET = 10.0  # of the logits, so that the soft mask starts close to its base patch


class _FlatModel:
    """The base's parameters as one vector that can be moved towards the donor, entry by entry."""

    def __init__(self, measurer: Measurer, base: dict[str, torch.Tensor]) -> None:
        self.measurer, self.base = measurer, base
        self.order = sorted(base)
        names = measurer.tuner.donor_names(measurer.adapter_name)
        donor = measurer.tuner.donors[measurer.adapter_name]
        self.deltas = {
            name: after.to(before.device).float() - before.float() for name, before, after in stream(base, donor, names)
        }
        self.delta = self.flat(self.deltas)

    def flat(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """Join tensors into one vector."""
        return torch.cat([tensors[name].flatten() for name in self.order])

    def split(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut a vector into tensors."""
        parts = vector.split([self.base[name].numel() for name in self.order])
        return {name: part.view_as(self.base[name]) for name, part in zip(self.order, parts, strict=True)}

    def write(self, mask: torch.Tensor) -> None:
        """Write base + mask * delta into the model; the mask is float, in [0, 1]."""
        for name, part in self.split(mask).items():
            self.measurer.parameters[name].data.copy_(self.base[name].float() + part * self.deltas[name])


def sigmoid_mask(
    model: nn.Module,
    tuner: GraftModel,
    adapter_name: str,
    batches: list[Any],
    *,
    validation: list[Any],
    budget: int,
    steps: int,
    seed: int,
    lr: float = 1e7,
    loss_fn: LossFn = default_loss,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Train a mask with one step per pass over the batches, and keep the best rounded one by validation.

    mask = b + (1 - 2b) * sigmoid(S - 10), b the top-|delta| patch, S ~ U[0, 1); S falls by
    lr * mean(g * delta) * (1 - 2b) * sigmoid'(S - 10). The rounded mask is the exact top-`budget` of the soft one.

    Args:
        model: The model whose forward gives the loss.
        tuner: The graft model inside of it.
        adapter_name: Name of the adapter.
        batches: Batches with labels; of several ranks each may have its share.
        validation: Batches that choose among the rounded masks.
        budget: Number of entries to take from the donor.
        steps: Number of steps.
        seed: Seed of S.
        lr: Learning rate.
        loss_fn: Mean loss of a batch.
        show_progress_bar: Show progress bars.

    Returns:
        By tensor name, float32, the tensor's shape: 1 where the donor's entry is taken, else 0.

    Raises:
        ValueError: Parameters are sharded or offloaded.
    """
    with (
        measuring(model, tuner, adapter_name, batches, loss_fn, show_progress_bar) as measurer,
        measurer.progress_bar("published procedure", steps) as bar,
        measurer.own_values() as base,
    ):
        flat = _FlatModel(measurer, base)
        draw = torch.Generator().manual_seed(seed)
        logits = torch.rand(flat.delta.numel(), generator=draw).to(flat.delta.device)
        start = top_k_mask(flat.delta.abs(), budget).float()
        best, best_loss = start.clone(), float("inf")
        for step in range(steps + 1):
            slope = torch.sigmoid(logits - _OFFSET)
            soft = start + (1 - 2 * start) * slope
            rounded = top_k_mask(soft, budget).float()
            flat.write(rounded)
            loss = mean_loss(model, validation, loss_fn)
            if loss < best_loss:
                best, best_loss = rounded, loss
            if step == steps:
                break
            flat.write(soft)
            sums = measurer.zeros()
            measurer.backward(bar, sums)
            push = flat.flat(measurer.mean(sums)) * flat.delta
            logits -= lr * push * (1 - 2 * start) * slope * (1 - slope)
        return flat.split(best)
