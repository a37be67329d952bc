"""Rows of one batch that run differently: which adapter each has, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

BASE = "__base__"  # PEFT's name for rows without an adapter


def spread(adapter_names: Sequence[str], count: int, where: str) -> list[str]:
    """Give each of `count` rows its adapter.

    Args:
        adapter_names: One name per row of the batch.
        count: Rows that a module sees: a multiple of the batch's.
        where: The module, for the error message.

    Raises:
        ValueError: `count` is not a multiple.
    """
    if not adapter_names or count % len(adapter_names):
        raise ValueError(
            f"adapter_names must have one name per row, got {len(adapter_names)} for {count} rows in {where!r}. "
            "Pass as many names as the batch has rows."
        )
    return [name for name in adapter_names for _ in range(count // len(adapter_names))]


def run_by_row(
    run: Callable[..., Any],
    adapter_names: Sequence[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
) -> Any:
    """Run a module once per adapter, each on its own rows, and put the rows back in order.

    Args:
        run: Runs the module: `run(adapter_name, *args, **kwargs)`.
        adapter_names: One name per row of the batch.
        args: What the module got; of tensors with one row per row of the batch, each run gets its own rows.
        kwargs: The same by keyword.
        where: The module, for error messages.

    Returns:
        What the module returns: a tensor, or a tuple of tensors.

    Raises:
        ValueError: The module does not see a multiple of the batch's rows.
    """
    batch = next(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))
    count = len(batch) if batch.dim() else 0
    names = spread(adapter_names, count, where)
    parts, order = [], []
    for name in sorted(set(names)):
        index = torch.tensor([row for row in range(count) if names[row] == name], device=batch.device)
        if len(index) == count:
            return run(name, *args, **kwargs)

        def own(value: Any, index: torch.Tensor = index) -> Any:
            is_batch = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == count
            return value[index] if is_batch else value

        parts.append(run(name, *map(own, args), **{key: own(value) for key, value in kwargs.items()}))
        order.append(index)
    if not parts:
        raise ValueError(f"adapter_names must have one name per row, got a batch without rows in {where!r}. Pass rows.")
    back = torch.cat(order).argsort()
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))
    return torch.cat(parts)[back]


class OnlyMetadata(torch.Tensor):
    """A parameter of which others may read dtype, device and shape, but not values: these differ by row."""

    _ALLOWED = frozenset(
        getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")
    ) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse everything that looks at values.

        Raises:
            ValueError: Something does.
        """
        if func not in cls._ALLOWED:
            raise ValueError(
                "adapter_names must name adapters that patch modules run row by row, got a patch of a parameter that "
                f"another module reads ({getattr(func, '__name__', func)}). Run one adapter at a time with set_adapter."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
