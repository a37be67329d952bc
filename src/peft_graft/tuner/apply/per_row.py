"""Rows of one batch that run differently: which adapter each has, and the run itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...peft_compat.torch_names import DisableTorchFunctionSubclass

BASE = "__base__"  # PEFT's name for rows without an adapter


class Rows:
    """The adapter of each row of a batch, for modules that see the rows, their beams, or their tokens in that order.

    Args:
        adapter_names: One name per row of the batch.
    """

    def __init__(self, adapter_names: Sequence[str]) -> None:
        self.names = list(adapter_names)
        self._multiples = {1}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note how many beams and tokens a row has: the hook of a model that is about to run.

        Other multiples of the rows say nothing about their order: experts may get all rows once per expert.
        """
        batches = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.dim() > 1]
        counts = [(len(value) // len(self.names), value.shape[1]) for value in batches if self._fits(len(value))]
        self._multiples = {1, *(beams for beams, _ in counts), *(beams * tokens for beams, tokens in counts)}

    def _fits(self, count: int) -> bool:
        return bool(self.names) and count > 0 and count % len(self.names) == 0

    def spread(self, count: int, where: str, known: Callable[[str], bool] = bool) -> list[str]:
        """Give each of `count` rows its adapter.

        Args:
            count: Rows that a module sees.
            where: The module, for the error message.
            known: Whether an adapter does anything in the module; the others become `"__base__"`.

        Raises:
            ValueError: These are not the rows of the batch, their beams or their tokens.
        """
        if not self._fits(count) or count // len(self.names) not in self._multiples:
            raise ValueError(
                f"adapter_names must have one name per row, got {len(self.names)} for {count} rows in {where!r}. "
                "Pass as many names as the batch has rows; leave modules that repeat or drop rows, as experts may, out "
                "with exclude_modules."
            )
        names = [name if known(name) else BASE for name in self.names]
        return [name for name in names for _ in range(count // len(names))]


def run_by_row(
    run: Callable[..., Any],
    rows: Rows,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    where: str,
    known: Callable[[str], bool],
) -> Any:
    """Run a module once per adapter, each on its own rows, and put the rows back in order.

    Args:
        run: Runs the module: `run(adapter_name, *args, **kwargs)`.
        rows: The adapter of each row of the batch.
        args: What the module got; of tensors with one row per row of the batch, each run gets its own rows.
        kwargs: The same by keyword.
        where: The module, for error messages.
        known: Whether an adapter does anything in the module.

    Returns:
        What the module returns: a tensor, or a tuple of tensors.

    Raises:
        ValueError: The module does not see the rows of the batch, their beams or their tokens.
    """
    if not any(known(name) for name in rows.names):
        return run(BASE, *args, **kwargs)
    batch = next(value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor))
    count = len(batch) if batch.dim() else 0
    names = rows.spread(count, where, known)
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
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))
