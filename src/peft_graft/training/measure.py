"""What the data-driven rules need from data: gradients, squared gradients, input norms, and the published procedure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..checkpoints.pairing import stream
from ..selection.topk import SelectionError, top_k_mask
from ..tuner import GraftLayer, GraftModel, ParameterHooks
from ..tuner.backends import collectives
from ..tuner.backends.offloaded import require_gradients
from ..tuner.backends.sharded import require_whole

LossFn = Callable[[nn.Module, Any], torch.Tensor]
PATH_POINTS = 4


def default_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    """Loss that the model computes itself from a batch with labels.

    Args:
        model: A model that takes the batch as keyword arguments and returns an output with `loss`.
        batch: Mapping of tensors, with labels.

    Returns:
        Mean loss of the batch, a scalar.

    Raises:
        ValueError: The model returns no loss.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise ValueError(
            f"batch must make the model return a loss, got keys {sorted(batch)}. "
            "Include labels, or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def batch_size(batch: Any) -> int:
    """Number of examples in a batch: the first dimension of its first tensor."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 1
    values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
    return 1


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def scoring_mode(model: nn.Module, tuner: GraftModel) -> Iterator[None]:
    """Evaluation mode with the grafts off; afterwards every mode and `requires_grad` is as before."""
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


class _Measurer:
    """Run batches through the base and collect evidence for the targeted tensors of one adapter."""

    def __init__(
        self,
        model: nn.Module,
        tuner: GraftModel,
        adapter_name: str,
        batches: list[Any],
        loss_fn: LossFn,
        progress: bool,
    ) -> None:
        self.model, self.tuner, self.adapter_name = model, tuner, adapter_name
        self.batches, self.loss_fn, self.progress = batches, loss_fn, progress
        self.targets = tuner.targets(adapter_name)
        self.parameters = {name: layer.base_parameter(param) for name, (layer, param) in self.targets.items()}
        for parameter in self.parameters.values():
            parameter.grad = None  # what an earlier training has left there

    def _bar(self, what: str, passes: int = 1) -> tqdm:
        return tqdm(total=passes * len(self.batches), desc=what, disable=not self.progress, leave=False)

    def _backward(self, bar: tqdm, sums: dict[str, torch.Tensor], square: bool = False) -> None:
        """Add each batch's gradient, times its size, to the sums; `square`: its square."""
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

    def _zeros(self) -> dict[str, torch.Tensor]:
        parameters = self.parameters.items()
        return {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters}

    def _mean(self, sums: dict[str, torch.Tensor], passes: int = 1) -> dict[str, torch.Tensor]:
        """Divide by the number of examples, of all ranks; each may have its own, or all the same."""
        seen = passes * sum(batch_size(batch) for batch in self.batches)
        examples = int(collectives.total(torch.tensor(seen)))
        return {name: collectives.total(sums[name]).div_(examples) for name in self.parameters}

    def gradient(self) -> dict[str, torch.Tensor]:
        """Mean gradient of the loss at the base."""
        sums = self._zeros()
        with self._bar("gradient at the base") as bar:
            self._backward(bar, sums)
        return self._mean(sums)

    def path_gradient(self) -> dict[str, torch.Tensor]:
        """Gradient averaged over the midpoints of equal steps from base to donor."""
        names = self.tuner.donor_names(self.adapter_name)
        base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        sums = self._zeros()
        with self._bar("gradient along the path", PATH_POINTS) as bar:
            try:
                for point in range(PATH_POINTS):
                    share = (point + 0.5) / PATH_POINTS
                    for name, before, after in stream(base, self.tuner.donors[self.adapter_name], names):
                        delta = after.to(before.device).float() - before.float()
                        self.parameters[name].data.copy_(before.float() + share * delta)
                    self._backward(bar, sums)
            finally:
                for name, value in base.items():
                    self.parameters[name].data.copy_(value)
        return self._mean(sums, PATH_POINTS)

    def squared_gradient(self) -> dict[str, torch.Tensor]:
        """Mean over batches of the squared batch gradient; with batches of one, the diagonal empirical Fisher."""
        sums = self._zeros()
        with self._bar("squared gradient at the base") as bar:
            self._backward(bar, sums, square=True)
        return self._mean(sums)

    def input_norm(self) -> dict[str, torch.Tensor]:
        """Norm, over all examples and positions, of the input that multiplies each entry."""
        squares: dict[str, torch.Tensor] = {}
        hooks = []
        for name, (layer, param) in self.targets.items():
            if isinstance(layer, ParameterHooks):
                raise _no_input(layer, name)

            def hook(
                module: GraftLayer, args: Any, kwargs: Any, output: Any, name: str = name, param: str = param
            ) -> None:
                inputs = [*args, *kwargs.values()][0].detach()
                squares[name] = squares.get(name, 0) + _input_square(module, param, inputs, output, name)

            hooks.append(layer.register_forward_hook(hook, with_kwargs=True))
        try:
            with torch.no_grad(), self._bar("norm of the inputs") as bar:
                for batch in self.batches:
                    self.loss_fn(self.model, send_to_device(batch, next(iter(self.parameters.values())).device))
                    bar.update()
        finally:
            for handle in hooks:
                handle.remove()
        return {name: _total_of(squares.get(name), self.parameters[name]).sqrt() for name in self.targets}

    def sigmoid(
        self, budget: int, steps: int, validation: list[Any], seed: int, lr: float = 1e7
    ) -> dict[str, torch.Tensor]:
        """The published procedure (Panigrahi et al. 2023, section 2.2): one step per pass, best mask by validation.

        mask = b + (1 - 2b) * sigmoid(S - 10), b the top-|delta| patch, S ~ U[0, 1); S falls by
        lr * mean(g * delta) * (1 - 2b) * sigmoid'(S - 10). The rounded mask is the exact top-`budget` of the soft one.
        """
        names = self.tuner.donor_names(self.adapter_name)
        order = sorted(self.parameters)
        sizes = [self.parameters[name].numel() for name in order]
        base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        deltas = {
            name: after.to(before.device).float() - before.float()
            for name, before, after in stream(base, self.tuner.donors[self.adapter_name], names)
        }
        flat = torch.cat([deltas[name].flatten() for name in order])
        generator = torch.Generator().manual_seed(seed)
        logits = torch.rand(flat.numel(), generator=generator).to(flat.device)
        start = top_k_mask(flat.abs(), budget).float()
        best, best_loss = start.clone(), float("inf")

        def write(mask: torch.Tensor) -> None:
            for name, part in zip(order, mask.split(sizes), strict=True):
                self.parameters[name].data.copy_(base[name].float() + part.view_as(base[name]) * deltas[name])

        with self._bar("published procedure", steps) as bar:
            try:
                for step in range(steps + 1):
                    slope = torch.sigmoid(logits - 10)
                    soft = start + (1 - 2 * start) * slope
                    rounded = top_k_mask(soft, budget).float()
                    write(rounded)
                    loss = mean_loss(self.model, validation, self.loss_fn)
                    if loss < best_loss:
                        best, best_loss = rounded, loss
                    if step == steps:
                        break
                    write(soft)
                    sums = self._zeros()
                    self._backward(bar, sums)
                    gradients = self._mean(sums)
                    push = torch.cat([gradients[name].flatten() for name in order]) * flat
                    logits -= lr * push * (1 - 2 * start) * slope * (1 - slope)
            finally:
                for name, value in base.items():
                    self.parameters[name].data.copy_(value)
        return {name: part.view_as(base[name]) for name, part in zip(order, best.split(sizes), strict=True)}


def measure(
    model: nn.Module,
    tuner: GraftModel,
    adapter_name: str,
    needs: str,
    batches: list[Any],
    loss_fn: LossFn = default_loss,
    progress: bool = True,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """Measure what a rule needs at the base, on data.

    Args:
        model: The model whose forward gives the loss.
        tuner: The graft model inside of it.
        adapter_name: Name of the adapter.
        needs: `"gradient"`, `"path_gradient"`, `"squared_gradient"`, `"input_norm"` or `"sigmoid"`.
        batches: Batches of examples that the donor was not trained on: scores of its own examples overfit with it.
            Of several ranks each may have its share, or all the same: what is measured is the mean over all of them.
        loss_fn: Mean loss of a batch.
        progress: Show progress bars.
        options: Passed to the procedure (`"sigmoid"`: budget, steps, validation, seed).

    Returns:
        By tensor name, float32, broadcastable to the tensor.

    Raises:
        ValueError: Parameters are sharded, or offloaded where gradients are needed.
    """
    targets = tuner.targets(adapter_name)
    if needs != "input_norm":
        require_gradients({name: layer.holder(param) for name, (layer, param) in targets.items()})
    parameters = {name: layer.base_parameter(param) for name, (layer, param) in targets.items()}
    require_whole(
        parameters,
        "scored on data",
        "Call initialize_graft before accelerator.prepare, on a base loaded without zero.Init.",
    )
    with scoring_mode(model, tuner):
        measurer = _Measurer(model, tuner, adapter_name, batches, loss_fn, progress)
        return getattr(measurer, needs)(**options)


def mean_loss(model: nn.Module, batches: list[Any], loss_fn: LossFn) -> float:
    """Mean loss over all examples of the batches of all ranks, without gradients, in the mode the model is in."""
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with torch.no_grad():
        for batch in batches:
            size = batch_size(batch)
            total += float(loss_fn(model, send_to_device(batch, device))) * size
            count += size
    total, count = collectives.total(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / max(count, 1)


def _total_of(squares: torch.Tensor | None, parameter: torch.Tensor) -> torch.Tensor:
    """Sum over the ranks of what some of them may lack: none of their tokens went to this expert."""
    held = [] if squares is None else list(squares.shape)
    sizes = collectives.extremes([*held, *[0] * (parameter.ndim - len(held))])
    missing = torch.zeros([largest for _, largest in sizes if largest], device=parameter.device)
    return collectives.total(missing if squares is None else squares)


def _input_square(layer: GraftLayer, param: str, inputs: torch.Tensor, output: Any, name: str) -> torch.Tensor:
    module = layer.get_base_layer()
    if isinstance(module, nn.Embedding):
        return torch.bincount(inputs.flatten(), minlength=module.num_embeddings).float()[:, None]
    features = inputs.float()
    if param == "bias" and isinstance(output, torch.Tensor):
        return torch.tensor(output.numel() / layer.base_parameter(param).numel())
    if isinstance(module, nn.Linear):
        return features.reshape(-1, features.shape[-1]).square().sum(0)[None, :]
    if isinstance(module, Conv1D):
        return features.reshape(-1, features.shape[-1]).square().sum(0)[:, None]
    if isinstance(module, nn.Conv2d) and module.groups == 1:
        return features.square().sum((0, 2, 3))[None, :, None, None]
    weight = layer.base_parameter(param).detach().float()
    if weight.ndim == 1 and isinstance(output, torch.Tensor) and output.shape[-1] == weight.numel():
        # A norm: what multiplies the weight is the normalised input, read back from the output.
        bias = getattr(module, "bias", None)
        scaled = output.detach().float() - (0 if bias is None else bias.detach().float())
        safe = torch.where(weight.abs() < 1e-6, torch.ones_like(weight), weight)
        return (scaled / safe).reshape(-1, weight.numel()).square().sum(0)
    raise _no_input(layer, name)


def _no_input(layer: GraftLayer, name: str) -> SelectionError:
    return SelectionError(
        f"selection='wanda' must target linear, convolution, embedding or norm modules, got "
        f"{type(layer.get_base_layer()).__name__} for {name!r}. Exclude it with exclude_modules, or use "
        "selection='fisher'."
    )
