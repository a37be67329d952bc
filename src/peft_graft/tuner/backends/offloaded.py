"""Parameters that accelerate keeps in memory until their module runs; what it keeps on disk is refused."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, cast

import torch
from torch import nn

from ...peft_compat.accelerate_names import offloading_hook


def own_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that a module itself owns."""
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def real_parameter(module: nn.Module, name: str) -> torch.Tensor:
    """Return a module's parameter, or the tensor with its values where it is offloaded.

    Args:
        module: The module that owns the parameter.
        name: Name of the parameter.

    Returns:
        The tensor; on the meta device only where there are no values yet.
    """
    parameter = cast(torch.Tensor, module._parameters[name])
    hook = offloading_hook(module) if parameter.is_meta else None
    return parameter if hook is None else hook.weights_map[name]


def where_it_runs(module: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Bring a tensor that stands in for a parameter to the device where the module runs."""
    hook = offloading_hook(module)
    return tensor if hook is None else tensor.to(hook.execution_device)


def identity(module: nn.Module, name: str) -> Hashable:
    """Return a key that is equal for parameters that are tied, also while they are offloaded."""
    parameter = module._parameters[name]
    real = real_parameter(module, name)
    return id(parameter) if real is parameter else ("offloaded", real.data_ptr())


def _is_read_anew(module: nn.Module, name: str) -> bool:
    once, again = real_parameter(module, name), real_parameter(module, name)
    return once is not again and once.data_ptr() != again.data_ptr()


def require_memory(model: nn.Module) -> None:
    """Refuse a base with parameters on disk: every forward would read them to patch a copy, and no merge would last.

    Raises:
        ValueError: Some parameters are on disk; the message names the first three.
    """
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    on_disk = [name or "all of it" for name, place in places.items() if place == "disk"]
    if not places:  # offloaded by accelerate's own functions
        owned = [(key, module, name) for key, module in model.named_modules() for name in own_names(module)]
        on_disk = [f"{key}.{name}" for key, module, name in owned if _is_read_anew(module, name)]
    if on_disk:
        raise ValueError(
            f"base must be in memory to be grafted, got parameters on disk: {', '.join(on_disk[:3])}"
            f"{' and more' if on_disk[3:] else ''}. Load it with device_map='cpu' or in a smaller dtype, or graft it "
            "where it fits and save the merged model."
        )


def require_gradients(holders: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Refuse to score offloaded parameters: a forward runs on copies, so that no gradient comes back.

    Args:
        holders: By tensor name, the module that owns the parameter, and the parameter's name there.

    Raises:
        ValueError: Some parameters are offloaded; the message names the first.
    """
    away = [
        name
        for name, (module, param) in holders.items()
        if module._parameters[param] is not real_parameter(module, param)
    ]
    if away:
        raise ValueError(
            f"base must not be offloaded to be scored, got {away[0]!r}{' and more' if away[1:] else ''} offloaded: no "
            "gradient comes back from where it runs. Load it without offloading, or use selection='magnitude'."
        )
