"""Compute the norm of the input that multiplies each entry of a weight, as the rule `wanda` needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..selection.topk import SelectionError
from ..tuner import GraftLayer, ParameterHooks
from ..tuner.backends import collectives


def input_norm(targets: Mapping[str, tuple[GraftLayer, str]], forward: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Compute ||x|| over all examples and positions, x the input that multiplies each entry.

    Args:
        targets: (layer, parameter) by tensor name.
        forward: Runs this rank's batches through the model, without gradients.

    Returns:
        By tensor name, float32, broadcastable to the tensor; the same on every rank.

    Raises:
        SelectionError: A module multiplies its inputs in another way than these known ones.
    """
    squares: dict[str, torch.Tensor] = {}
    hooks = []
    for name, (layer, param) in targets.items():
        if isinstance(layer, ParameterHooks):
            raise _unknown_module(layer, name)

        def add(module: GraftLayer, args: Any, kwargs: Any, output: Any, name: str = name, param: str = param) -> None:
            inputs = [*args, *kwargs.values()][0].detach()
            squares[name] = squares.get(name, 0) + _input_square(module, param, inputs, output, name)

        hooks.append(layer.register_forward_hook(add, with_kwargs=True))
    try:
        forward()
    finally:
        for handle in hooks:
            handle.remove()
    return {name: _sum_over_ranks(squares.get(name), *targets[name]).sqrt() for name in targets}


def _sum_over_ranks(squares: torch.Tensor | None, layer: GraftLayer, param: str) -> torch.Tensor:
    """Sum the squares of all ranks, of which some may have none: no token of theirs went to this expert."""
    parameter = layer.base_parameter(param)
    held = [] if squares is None else list(squares.shape)
    sizes = collectives.all_reduce_min_max([*held, *[0] * (parameter.ndim - len(held))])
    missing = torch.zeros([largest for _, largest in sizes if largest], device=parameter.device)
    return collectives.all_reduce_sum(missing if squares is None else squares)


def _input_square(layer: GraftLayer, param: str, inputs: torch.Tensor, output: Any, name: str) -> torch.Tensor:
    """Sum the squares of the inputs of one forward, in a shape that is broadcastable to the parameter."""
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
        # In a norm the normalised input multiplies the weight; it is read back from the output.
        bias = getattr(module, "bias", None)
        scaled = output.detach().float() - (0 if bias is None else bias.detach().float())
        safe = torch.where(weight.abs() < 1e-6, torch.ones_like(weight), weight)
        return (scaled / safe).reshape(-1, weight.numel()).square().sum(0)
    raise _unknown_module(layer, name)


def _unknown_module(layer: GraftLayer, name: str) -> SelectionError:
    return SelectionError(
        f"selection='wanda' must target linear, convolution, embedding or norm modules, got "
        f"{type(layer.get_base_layer()).__name__} for {name!r}. Exclude it with exclude_modules, or use "
        "selection='fisher'."
    )
