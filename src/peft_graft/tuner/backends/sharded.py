"""Sharded bases: parameters of which each rank keeps a part, the DTensors of FSDP2 and the partitions of ZeRO-3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import distributed, nn

from ...peft_compat.deepspeed_names import partition_of

GATHER = (
    "Save with state_dict=accelerator.get_state_dict(model), which every rank calls; it is not needed "
    "after a forward without gradients, or a Trainer with a GraftCallback, because the mask is known then."
)
UNGATHERED = "Run the model as the engine returned it, so that it gathers them."


def is_sharded(parameter: torch.Tensor) -> bool:
    """Return whether this process holds only a part of the values at the moment."""
    return hasattr(parameter, "full_tensor") or _is_partitioned(parameter)


def _is_partitioned(parameter: torch.Tensor) -> bool:
    return is_partitionable(parameter) and parameter.numel() != math.prod(whole_shape(parameter))


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; between two forwards ZeRO-3 leaves a stand-in of shape (0,)."""
    partition = partition_of(parameter)
    return tuple(parameter.shape) if partition is None else partition.shape


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """Return all values of a parameter, detached. Where it is sharded, every rank must call this together.

    ZeRO-3's own way to gather would release what a running module needs, hence a sum in which each rank gives its part.
    """
    held: Any = parameter
    if hasattr(held, "full_tensor"):
        return held.detach().full_tensor()
    partition = partition_of(held)
    if partition is None or not _is_partitioned(held):
        return held.detach()
    group, part = partition.group, partition.part.detach()
    start = distributed.get_rank(group) * part.numel()
    flat = torch.zeros(part.numel() * distributed.get_world_size(group), dtype=part.dtype, device=parameter.device)
    flat[start : start + part.numel()] = part.to(flat.device)
    distributed.all_reduce(flat, group=group)
    return flat[: partition.numel].view(partition.shape)


def own_part(parameter: torch.Tensor) -> torch.Tensor:
    """Return the values of a parameter that this process holds, detached, in the memory that it holds them in."""
    held: Any = parameter
    if hasattr(held, "full_tensor"):
        return held.detach().to_local()
    partition = partition_of(held)
    return held.detach() if partition is None or not _is_partitioned(held) else partition.part.detach()


def own_part_of(parameter: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the part of the whole parameter's values that this process holds; every rank must call this together."""
    held: Any = parameter
    if hasattr(held, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # a slow import that few need

        return distribute_tensor(values.to(held.device, held.dtype), held.device_mesh, held.placements).to_local()
    partition = partition_of(held)
    if partition is None or not _is_partitioned(held):
        return values
    size = partition.part.numel()
    flat = torch.zeros(size * distributed.get_world_size(partition.group), dtype=values.dtype, device=values.device)
    flat[: values.numel()] = values.flatten()
    start = distributed.get_rank(partition.group) * size
    return flat[start : start + size]


def is_partitionable(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has taken over this parameter, be it partitioned or gathered at the moment."""
    return partition_of(parameter) is not None


def frees_parameters(model: nn.Module) -> bool:
    """Return whether an engine frees parameters of a model as soon as their module has run: FSDP, both versions."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # a slow import that few need

    return any(isinstance(module, FSDPModule | FullyShardedDataParallel) for module in model.modules()) or any(
        is_sharded(parameter) for parameter in model.parameters()
    )


def gather_with(module: nn.Module, parameters: list[torch.Tensor]) -> None:
    """Register parameters with ZeRO-3 that it gathers, too, before this module runs, forward and backward."""
    register = import_module("deepspeed").zero.register_external_parameter
    for parameter in parameters:
        register(module, parameter)


def copy_into(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Overwrite a parameter, sharded or not, in place; where it is sharded, every rank must call this together.

    Raises:
        ValueError: ZeRO-3 has partitioned it; its optimizer holds a copy of its own.
    """
    if _is_partitioned(parameter):
        raise ValueError(
            "adapter must be loaded before ZeRO-3 partitions the model, got one that is partitioned already. "
            "Load it before accelerator.prepare, or resume with the engine's own checkpoint."
        )
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # a slow import that few need

        sharded: Any = parameter
        values = distribute_tensor(values.to(sharded.dtype), sharded.device_mesh, sharded.placements)
    with torch.no_grad():
        parameter.copy_(values)


class WholeTensors(Mapping[str, torch.Tensor]):
    """Parameters by name, each read as a whole when it is looked up.

    Args:
        parameters: By name, a function that returns all values of a parameter.
    """

    def __init__(self, parameters: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self.parameters = parameters

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return all values of a parameter."""
        return self.parameters[name]()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.parameters)

    def __len__(self) -> int:
        """Return the number of parameters."""
        return len(self.parameters)


def require_whole(parameters: Mapping[str, torch.Tensor], done: str, remedy: str) -> None:
    """Refuse what needs all values of all parameters at once.

    Args:
        parameters: By name.
        done: What is done with them, as a participle such as "merged".
        remedy: What to do instead, as a sentence.

    Raises:
        ValueError: Some are sharded; the message names the first three.
    """
    sharded = [name for name, parameter in parameters.items() if is_sharded(parameter)]
    if sharded:
        raise ValueError(
            f"parameters must be whole to be {done}, got {len(sharded)} that FSDP or ZeRO-3 has sharded "
            f"({', '.join(sharded[:3])}{', ...' if len(sharded) > 3 else ''}). {remedy}"
        )
