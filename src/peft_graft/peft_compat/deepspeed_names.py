"""Private names of DeepSpeed: what ZeRO-3 keeps of a parameter that it has partitioned. It need not be installed."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Partition(NamedTuple):
    """A parameter as ZeRO-3 partitions it.

    Attributes:
        part: The values that this rank keeps, flat; the last rank's may be padded.
        shape: Shape of the whole parameter.
        numel: Number of its values.
        group: The processes that share it.
    """

    part: torch.Tensor
    shape: tuple[int, ...]
    numel: int
    group: Any


def partition_of(parameter: Any) -> Partition | None:
    """Return what ZeRO-3 keeps of a parameter, gathered at the moment or not; None where it has not taken it over."""
    if not hasattr(parameter, "ds_tensor"):
        return None
    return Partition(parameter.ds_tensor, tuple(parameter.ds_shape), parameter.ds_numel, parameter.ds_process_group)
