"""Write a patch into a parameter's own storage while something runs: O(patch), where a patched copy is O(parameter)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class _Hold:
    """A patch that is on a parameter right now, and what it covers."""

    def __init__(self, owner: Hashable, indices: torch.Tensor, before: torch.Tensor) -> None:
        self.owner, self.indices, self.before = owner, indices, before
        self.users = 1


_holds: dict[int, _Hold] = {}  # by address: tied parameters and views of one storage share a hold
_lock = threading.Lock()


def is_traced() -> bool:
    """Whether the calls are recorded for a compiler, which is to see functions and no side effects."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def can_write(parameter: torch.Tensor) -> bool:
    """Whether nobody else can notice that the parameter is overwritten for a while.

    Not where autograd or autocast may keep its values, where other processes share its memory, and where it is sharded
    or holds no values.
    """
    return (
        type(parameter) in (nn.Parameter, torch.Tensor)
        and not parameter.requires_grad
        and not parameter.is_meta
        and parameter.is_contiguous()
        and not (parameter.device.type == "cpu" and parameter.untyped_storage().is_shared())
        and (torch.is_inference_mode_enabled() or not parameter.is_inference())
    )


def restored(entries: torch.Tensor, at: torch.Tensor, indices: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Replace entries by what they were before a patch.

    Args:
        entries: Values at `at`, float [n].
        at: Flat indices, int64 [n].
        indices: Flat indices of the patch, int64 [k], increasing.
        before: What the patch covers, float [k].

    Returns:
        Values at `at` without the patch, float [n].
    """
    if not indices.numel():
        return entries
    where = torch.searchsorted(indices, at).clamp_(max=indices.numel() - 1)
    return torch.where(indices[where] == at, before[where].to(entries), entries)


def own_entries(parameter: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The parameter's own values at these flat indices, also while a patch is written into it."""
    entries = parameter.detach().reshape(-1)[indices]
    hold = _hold_on(parameter)
    return entries if hold is None else restored(entries, indices, hold.indices, hold.before)


def is_held(parameter: torch.Tensor) -> bool:
    """Whether a patch is written into the parameter right now."""
    return _hold_on(parameter) is not None


def own_copy(parameter: torch.Tensor) -> torch.Tensor | None:
    """A copy of the parameter with its own bits, while a patch is written into it; else None."""
    hold = _hold_on(parameter)
    if hold is None:
        return None
    return parameter.detach().reshape(-1).index_put((hold.indices,), hold.before).view(parameter.shape)


def patched_copy(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of the parameter with these values at these flat indices; gradients reach the values."""
    own = own_copy(parameter)
    flat = (parameter if own is None else own).reshape(-1)
    return flat.index_put((indices,), values).view(parameter.shape)


@contextmanager
def written(
    parameter: torch.Tensor, patch: Callable[[], tuple[torch.Tensor, torch.Tensor]], owner: Hashable = None
) -> Iterator[torch.Tensor]:
    """Write a patch into the parameter, and its own bits back afterwards.

    Several calls may share one patch, one inside the other or in several threads: the first writes it, the last takes
    it off. Who comes with another patch in the meantime, or to a parameter that must not be touched, works on a copy.

    Args:
        parameter: The parameter.
        patch: Returns flat indices, int64 [k], increasing, and what to write there, [k], in the parameter's dtype. Not
            called where the patch is there already.
        owner: Equal for calls that write the same; None for a patch of this call alone.

    Yields:
        The parameter, or a copy of it, with the patch.
    """
    hold, ours = None, False
    if can_write(parameter):
        key, flat = parameter.data_ptr(), parameter.data.view(-1)
        with _lock:
            hold = _holds.get(key)
            ours = hold is None or (owner is not None and hold.owner == owner)
            if hold is None:
                indices, values = patch()
                hold = _Hold(owner, indices, flat.index_select(0, indices))
                flat.index_copy_(0, indices, values.detach())
                _holds[key] = hold
            elif ours:
                hold.users += 1
    if hold is None or not ours:
        yield patched_copy(parameter.detach(), *patch())
        return
    try:
        yield parameter
    finally:
        with _lock:
            hold.users -= 1
            if not hold.users:
                flat.index_copy_(0, hold.indices, hold.before)
                del _holds[key]


def _hold_on(parameter: torch.Tensor) -> _Hold | None:
    return _holds.get(parameter.data_ptr()) if _holds and not is_traced() else None
