"""What the processes of one run agree on: sums and extremes over all of them. A lone process agrees with itself."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import distributed


def count() -> int:
    """Number of processes that share this run: those that a launcher (accelerate, torchrun) has started together."""
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not joined():
        _state()  # joins the group that the launcher has prepared
    return distributed.get_world_size() if joined() else 1


def joined() -> bool:
    """Whether this process has joined a group; one rank alone is a group too."""
    return distributed.is_available() and distributed.is_initialized()


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all ranks.

    Args:
        tensor: Of the same shape and dtype on every rank. It may be overwritten.

    Returns:
        The sum, on the same device and with the same bits on every rank.
    """
    return _reduced(tensor, distributed.ReduceOp.SUM) if count() > 1 else tensor


def extremes(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Smallest and largest of each number over all ranks.

    Args:
        numbers: As many on every rank, each within 64 bits.

    Returns:
        (smallest, largest) of each.
    """
    if count() == 1:
        return [(number, number) for number in numbers]
    both = _reduced(torch.tensor([*numbers, *(-number for number in numbers)]), distributed.ReduceOp.MAX).tolist()
    largest, smallest = both[: len(numbers)], both[len(numbers) :]
    return [(-low, high) for low, high in zip(smallest, largest, strict=True)]


def _state() -> PartialState:
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu)  # which has no effect after the first time


def _reduced(tensor: torch.Tensor, operation: distributed.ReduceOp.RedOpType) -> torch.Tensor:
    # NCCL and its like reduce what is on their own devices only; a model may still be on the CPU.
    on_cpu = tensor.device.type == "cpu" and distributed.get_backend() not in ("gloo", "mpi")
    there = tensor.to(_state().device) if on_cpu else tensor.contiguous()
    distributed.all_reduce(there, operation)
    return there.to(tensor.device)
