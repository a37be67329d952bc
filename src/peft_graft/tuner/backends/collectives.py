"""Sums and extremes over the processes of one run. For a process that runs alone they are its own values."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed


def join() -> None:
    """Join the process group that a launcher (accelerate, torchrun) has prepared, if there is one.

    Called where work on several ranks begins, and nowhere else: joining waits for all the other processes.
    """
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not joined():
        _state()


def joined() -> bool:
    """Return whether this process is in a process group; one rank alone is a group too."""
    return distributed.is_available() and distributed.is_initialized()


def world_size() -> int:
    """Return the number of processes in the process group, 1 outside of one."""
    return distributed.get_world_size() if joined() else 1


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all ranks.

    Args:
        tensor: Of the same shape and dtype on every rank. It may be overwritten.

    Returns:
        The sum, on the same device and with the same bits on every rank.
    """
    return _all_reduce(tensor, distributed.ReduceOp.SUM) if world_size() > 1 else tensor


def all_reduce_min_max(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Find the smallest and the largest of each number over all ranks.

    Args:
        numbers: As many on every rank, each within 64 bits.

    Returns:
        (smallest, largest) of each.
    """
    if world_size() == 1:
        return [(number, number) for number in numbers]
    both = _all_reduce(torch.tensor([*numbers, *(-number for number in numbers)]), distributed.ReduceOp.MAX).tolist()
    largest, smallest = both[: len(numbers)], both[len(numbers) :]
    return [(-low, high) for low, high in zip(smallest, largest, strict=True)]


def all_gather_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Join tensors of all ranks along their first dimension, in which they may differ.

    Args:
        tensor: Of the same dtype and the same other dimensions on every rank.

    Returns:
        The rows of all ranks in order, on the same device, the same on every rank.
    """
    if world_size() == 1:
        return tensor
    sizes = torch.zeros(world_size(), dtype=torch.int64)
    sizes[distributed.get_rank()] = tensor.shape[0]
    sizes = all_reduce_sum(sizes)
    there = tensor.to(_device_of(tensor)).contiguous()
    padded = there.new_zeros((int(sizes.max()), *there.shape[1:]))
    padded[: there.shape[0]] = there
    found = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(found, padded)
    return torch.cat([each[:size] for each, size in zip(found, sizes.tolist(), strict=True)]).to(tensor.device)


def _state() -> PartialState:
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)  # which has no effect after the first time


def _all_reduce(tensor: torch.Tensor, operation: distributed.ReduceOp.RedOpType) -> torch.Tensor:
    there = tensor.to(_device_of(tensor)).contiguous()
    distributed.all_reduce(there, operation)
    return there.to(tensor.device)


def _device_of(tensor: torch.Tensor) -> torch.device:
    """Return where a tensor can be reduced: NCCL and its like take what is on their own devices only."""
    on_cpu = tensor.device.type == "cpu" and distributed.get_backend() not in ("gloo", "mpi")
    return _state().device if on_cpu else tensor.device
