"""Run the rows of one batch with different adapters: `model(**batch, adapter_names=["a", "b", "__base__"])`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ...peft_compat.torch_names import DisableTorchFunctionSubclass

if TYPE_CHECKING:
    from ..layer import GraftLayer

BASE = "__base__"  # PEFT's name for rows without an adapter


class Rows:
    """The adapter of each row of a batch. Modules may see the rows, their beams, or their tokens, in that order.

    Args:
        adapter_names: One name per row of the batch.
    """

    def __init__(self, adapter_names: Sequence[str]) -> None:
        self.names = list(adapter_names)
        self._multiples = {1}

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note how many beams and tokens a row has; a forward pre-hook of the model.

        Other multiples of the rows say nothing about their order: experts may get all rows once per expert.
        """
        batches = [value for value in [*args, *kwargs.values()] if isinstance(value, torch.Tensor) and value.dim() > 1]
        counts = [(len(value) // len(self.names), value.shape[1]) for value in batches if self._fits(len(value))]
        self._multiples = {1, *(beams for beams, _ in counts), *(beams * tokens for beams, tokens in counts)}

    def _fits(self, count: int) -> bool:
        return bool(self.names) and count > 0 and count % len(self.names) == 0

    def spread(self, count: int, where: str, known: Callable[[str], bool] = bool) -> list[str]:
        """Return the adapter of each of `count` rows.

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
    """A parameter whose dtype, device and shape can be read, but not its values, because these differ by row."""

    _ALLOWED = frozenset(
        getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")
    ) | {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point}

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Refuse operations that look at values.

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


@contextmanager
def rows_of(model: nn.Module, layers: Sequence[GraftLayer], adapter_names: Sequence[str]) -> Iterator[None]:
    """Let every grafted layer, and every module that PEFT saves whole, run each row with the adapter it names.

    Other threads may run the same model meanwhile, with other rows or none.

    Args:
        model: The model that holds the adapters, in evaluation mode.
        layers: Its grafted layers.
        adapter_names: One name per row of the batch; `"__base__"` for none. Where a module sees the beams or the
            tokens of the rows, laid out one after the other, each name stands for those in its place.

    Raises:
        ValueError: Training mode, a name that is no adapter, merged adapters, or a patch of parameters that are not
            applied row by row; all offenders at once.
    """
    problems = list(_problems(model, layers, sorted({*adapter_names} - {BASE})))
    if problems:
        raise ValueError(" ".join(problems))
    rows, thread = Rows(adapter_names), threading.get_ident()
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(_in(thread, rows.see), with_kwargs=True).remove)
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handle = module.register_forward_pre_hook(_in(thread, _names_for(rows)), with_kwargs=True)
                undo.callback(handle.remove)
        for layer in layers:
            undo.callback(_put_back, layer.rows_by_thread, thread, layer.rows)
            layer.rows_by_thread[thread] = rows
        yield


def _put_back(held: dict[int, Rows], thread: int, rows: Rows | None) -> None:
    del held[thread]
    if rows is not None:
        held[thread] = rows


def _in(thread: int, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that acts in one thread only."""
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def _names_for(rows: Rows) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "adapter_names": rows.spread(len(args[0]), type(module).__name__)}

    return hook


def _problems(model: nn.Module, layers: Sequence[GraftLayer], names: Sequence[str]) -> Iterator[str]:
    if model.training:
        yield "adapter_names must be given in evaluation mode, got a model in training mode. Call model.eval()."
    known = {name for layer in layers for name in layer.states}
    if unknown := [name for name in names if name not in known]:
        yield (
            f"adapter_names must name loaded adapters or {BASE!r}, got {unknown}. "
            f"Load them with load_adapter; loaded are {sorted(known)}."
        )
    if any(layer.merged for layer in layers):
        yield "adapter_names must be given to an unmerged model, got merged adapters. Call unmerge_adapter()."
    get_inputs = getattr(model, "get_input_embeddings", None)
    entrance = get_inputs() if callable(get_inputs) else None
    shared = [
        layer.tensor_name(param)
        for layer in layers
        for param in layer.keys
        if _is_shared(layer, entrance) and any(layer.has_entries(name, param) for name in names)
    ]
    if shared:
        yield (
            f"adapter_names must name adapters that patch modules run row by row, got patches of {shared}. "
            "Run one adapter at a time with set_adapter, or leave these out with exclude_modules."
        )


def _is_shared(layer: GraftLayer, entrance: nn.Module | None) -> bool:
    """Return whether the layer's parameters act on the batch as a whole, so that all rows share them."""
    module = layer.get_base_layer()
    if isinstance(module, nn.Embedding):  # of positions: their indices may be the same for all rows
        return entrance is not None and entrance not in (layer, module)
    return not layer.has_rows or isinstance(module, nn.MultiheadAttention)
