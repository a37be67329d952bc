"""Measure on data what the scored rules look at: gradients, squared gradients, and norms of inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub.utils import tqdm
from torch import nn

from ..checkpoints.pairing import stream
from ..tuner import GraftModel
from ..tuner.backends import collectives
from ..tuner.backends.offloaded import require_gradients
from ..tuner.backends.sharded import require_whole
from .input_norm import input_norm
from .loss import LossFn, batch_size, default_loss, evaluating

PATH_POINTS = 4  # midpoints of as many equal steps from base to donor


@contextmanager
def scoring_mode(model: nn.Module, tuner: GraftModel) -> Iterator[None]:
    """Put a model into evaluation mode with its grafts off; afterwards every mode and `requires_grad` is as before."""
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    enabled = {layer: layer.disable_adapters for layer in tuner._layers()}
    try:
        for parameter in gradients:
            parameter.requires_grad_(False)
        for layer in enabled:
            layer._disable_adapters = True
        with evaluating(model):
            yield
    finally:
        for layer, disabled in enabled.items():
            layer._disable_adapters = disabled
        for parameter, requires_grad in gradients.items():
            parameter.requires_grad_(requires_grad)
            if not requires_grad:
                parameter.grad = None


class Measurer:
    """Run batches through the base, and measure the tensors that one adapter may patch.

    Args:
        model: The model whose forward gives the loss.
        tuner: The graft model inside of it.
        adapter_name: Name of the adapter.
        batches: This rank's batches.
        loss_fn: Mean loss of a batch.
        show_progress_bar: Show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        tuner: GraftModel,
        adapter_name: str,
        batches: list[Any],
        loss_fn: LossFn,
        show_progress_bar: bool,
    ) -> None:
        self.model, self.tuner, self.adapter_name = model, tuner, adapter_name
        self.batches, self.loss_fn, self.show_progress_bar = batches, loss_fn, show_progress_bar
        self.targets = tuner.targets(adapter_name)
        self.parameters = {name: layer.base_parameter(param) for name, (layer, param) in self.targets.items()}
        for parameter in self.parameters.values():
            parameter.grad = None  # an earlier training may have left one

    def progress_bar(self, what: str, passes: int = 1) -> tqdm:
        """Open a progress bar over some passes through the batches."""
        return tqdm(total=passes * len(self.batches), desc=what, disable=not self.show_progress_bar, leave=False)

    def backward(self, bar: tqdm, sums: dict[str, torch.Tensor], square: bool = False) -> None:
        """Add each batch's gradient, times the number of its examples, to sums.

        Args:
            bar: Progress bar to move on.
            sums: By tensor name, float32, from `zeros`; changed in place.
            square: Add the square of the gradient instead.
        """
        names = {parameter: name for name, parameter in self.parameters.items()}
        size = 0

        def add(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad.float(), None  # type: ignore[union-attr]
            sums[names[parameter]].add_(gradient.square() if square else gradient, alpha=size)

        hooks = []
        try:
            for parameter in names:
                parameter.requires_grad_(True)
                hooks.append(parameter.register_post_accumulate_grad_hook(add))
            for batch in self.batches:
                size = batch_size(batch)
                self.loss_fn(self.model, send_to_device(batch, next(iter(names)).device)).backward()
                bar.update()
        finally:
            for handle in hooks:
                handle.remove()

    def zeros(self) -> dict[str, torch.Tensor]:
        """Return zeros in the shape of every parameter, float32, by tensor name."""
        parameters = self.parameters.items()
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters}

    def mean(self, sums: dict[str, torch.Tensor], passes: int = 1) -> dict[str, torch.Tensor]:
        """Divide sums over examples by the number of examples of all ranks; each may have its own, or all the same."""
        seen = passes * sum(batch_size(batch) for batch in self.batches)
        examples = int(collectives.all_reduce_sum(torch.tensor(seen)))
        return {name: collectives.all_reduce_sum(sums[name]).div_(examples) for name in self.parameters}

    @contextmanager
    def own_values(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield copies of the base's values, and write them back in the end."""
        base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            yield base
        finally:
            for name, value in base.items():
                self.parameters[name].data.copy_(value)

    def gradient(self) -> dict[str, torch.Tensor]:
        """Compute the mean gradient of the loss at the base."""
        sums = self.zeros()
        with self.progress_bar("gradient at the base") as bar:
            self.backward(bar, sums)
        return self.mean(sums)

    def path_gradient(self) -> dict[str, torch.Tensor]:
        """Compute the gradient averaged over the midpoints of equal steps from base to donor."""
        names = self.tuner.donor_names(self.adapter_name)
        sums = self.zeros()
        with self.progress_bar("gradient along the path", PATH_POINTS) as bar, self.own_values() as base:
            for point in range(PATH_POINTS):
                share = (point + 0.5) / PATH_POINTS
                for name, before, after in stream(base, self.tuner.donors[self.adapter_name], names):
                    delta = after.to(before.device).float() - before.float()
                    self.parameters[name].data.copy_(before.float() + share * delta)
                self.backward(bar, sums)
        return self.mean(sums, PATH_POINTS)

    def squared_gradient(self) -> dict[str, torch.Tensor]:
        """Compute the mean of the squared batch gradients; with batches of one, the diagonal empirical Fisher."""
        sums = self.zeros()
        with self.progress_bar("squared gradient at the base") as bar:
            self.backward(bar, sums, square=True)
        return self.mean(sums)

    def input_norm(self) -> dict[str, torch.Tensor]:
        """Compute the norm, over all examples and positions, of the input that multiplies each entry."""
        device = next(iter(self.parameters.values())).device

        def forward() -> None:
            with torch.no_grad(), self.progress_bar("norm of the inputs") as bar:
                for batch in self.batches:
                    self.loss_fn(self.model, send_to_device(batch, device))
                    bar.update()

        return input_norm(self.targets, forward)


_MEASUREMENTS: dict[str, Callable[[Measurer], dict[str, torch.Tensor]]] = {
    "gradient": Measurer.gradient,
    "path_gradient": Measurer.path_gradient,
    "squared_gradient": Measurer.squared_gradient,
    "input_norm": Measurer.input_norm,
}


@contextmanager
def measuring(
    model: nn.Module,
    tuner: GraftModel,
    adapter_name: str,
    batches: list[Any],
    loss_fn: LossFn,
    show_progress_bar: bool,
    needs_gradients: bool = True,
) -> Iterator[Measurer]:
    """Yield a `Measurer`, with the model in scoring mode, where the base's parameters allow it.

    Raises:
        ValueError: Parameters are sharded, or offloaded where gradients are needed.
    """
    targets = tuner.targets(adapter_name)
    if needs_gradients:
        require_gradients({name: layer.holder(param) for name, (layer, param) in targets.items()})
    parameters = {name: layer.base_parameter(param) for name, (layer, param) in targets.items()}
    require_whole(
        parameters,
        "scored on data",
        "Call initialize_graft before accelerator.prepare, on a base loaded without zero.Init.",
    )
    with scoring_mode(model, tuner):
        yield Measurer(model, tuner, adapter_name, batches, loss_fn, show_progress_bar)


def measure(
    model: nn.Module,
    tuner: GraftModel,
    adapter_name: str,
    measurement: str,
    batches: list[Any],
    loss_fn: LossFn = default_loss,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """Measure on data what a rule looks at, at the base.

    Args:
        model: The model whose forward gives the loss.
        tuner: The graft model inside of it.
        adapter_name: Name of the adapter.
        measurement: `"gradient"`, `"path_gradient"`, `"squared_gradient"` or `"input_norm"`.
        batches: Batches of examples that the donor was not trained on: scores of its own examples overfit with it.
            Of several ranks each may have its share, or all the same: the result is the mean over all of them.
        loss_fn: Mean loss of a batch.
        show_progress_bar: Show progress bars.

    Returns:
        By tensor name, float32, broadcastable to the tensor.

    Raises:
        SelectionError: The norm of its inputs is not defined for a module.
        ValueError: Parameters are sharded, or offloaded where gradients are needed.
    """
    options = (batches, loss_fn, show_progress_bar, measurement != "input_norm")
    with measuring(model, tuner, adapter_name, *options) as measurer:
        return _MEASUREMENTS[measurement](measurer)
