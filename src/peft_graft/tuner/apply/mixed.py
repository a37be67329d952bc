"""Different adapters for the rows of one batch: `model(**batch, adapter_names=["a", "b", "__base__"])`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layer import GraftLayer
from .per_row import BASE, Rows


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
    """A hook that acts in one thread only."""
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
    """Whether the layer's parameters act on the batch as a whole, so that its rows cannot have different ones."""
    module = layer.get_base_layer()
    if isinstance(module, nn.Embedding):  # of positions: their indices may be the same for all rows
        return entrance is not None and entrance not in (layer, module)
    return not layer.has_rows or isinstance(module, nn.MultiheadAttention)
