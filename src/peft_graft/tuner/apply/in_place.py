"""Write a patch into a parameter's own storage while something runs: O(patch), where a patched copy is O(parameter)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn


class _Cover:
    """A patch that is on a parameter right now, and what it covers."""

    def __init__(self, owner: Hashable, data: torch.Tensor, indices: torch.Tensor, before: torch.Tensor) -> None:
        self.owner, self.data, self.indices, self.before = owner, data, indices, before  # nobody else gets its address
        self.users = 0


_covers: dict[int, _Cover] = {}  # by address: tied parameters share one
_lock = threading.RLock()


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


@torch.compiler.disable
def uncompiled(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run something as it is, in the middle of what is compiled."""
    return run(*args, **kwargs)


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


def overwrite(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write values, [k], at these flat indices, int64 [k], unseen by autograd; return what was there."""
    data = parameter.data
    if not data.is_contiguous():
        before = data.take(indices)
        data.put_(indices, values)
        return before
    flat = data.view(-1)
    before = flat.index_select(0, indices)
    flat.index_copy_(0, indices, values)
    return before


def own_entries(parameter: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The parameter's own values at these flat indices, also while a patch is written into it."""
    flat = parameter.detach().reshape(-1)
    if is_traced():
        return flat[indices]
    with _lock:
        cover, entries = _covers.get(parameter.data_ptr()), flat[indices]
    return entries if cover is None else restored(entries, indices, cover.indices, cover.before)


def any_held() -> bool:
    """Whether any parameter has a patch written into it right now."""
    return bool(_covers)


def is_held(parameter: torch.Tensor) -> bool:
    """Whether a patch is written into the parameter right now."""
    return bool(_covers) and parameter.data_ptr() in _covers


def own_copy(parameter: torch.Tensor) -> torch.Tensor | None:
    """A copy of the parameter with its own bits, while a patch is written into it; else None."""
    if not _covers or is_traced():
        return None
    with _lock:
        cover = _covers.get(parameter.data_ptr())
        if cover is None or not cover.indices.numel():  # which only keeps others from writing
            return None
        return _put(parameter.detach(), cover.indices, cover.before)


def restore_copy(copied: torch.Tensor, parameter: torch.Tensor) -> None:
    """Give a copy that was made of a parameter the parameter's own bits, whatever was written into it."""
    cover = _covers.get(parameter.data_ptr()) if _covers else None
    if cover is not None and cover.indices.numel():
        overwrite(copied, cover.indices, cover.before)


def undisturbed() -> AbstractContextManager[Any]:
    """Let no patch be written or taken off for a while, except by this thread."""
    return _lock


def patched_copy(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy of the parameter with these values at these flat indices; gradients reach the values."""
    if is_traced():
        return _put(parameter, indices, values)
    with _lock:
        own = own_copy(parameter)
        return _put(parameter if own is None else own, indices, values)


def _put(tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        return tensor.put(indices, values)  # keeps the order in memory
    return tensor.view(-1).index_put((indices,), values).view(tensor.shape)


_NOTHING = torch.empty(0, dtype=torch.int64), torch.empty(0)


def nothing() -> tuple[torch.Tensor, torch.Tensor]:
    """A patch of no entries, which keeps others from writing theirs meanwhile."""
    return _NOTHING


class Hold:
    """A call that runs with a patch on a parameter.

    Several may share one patch, one inside the other or in several threads: the first writes it, the last takes it
    off. Who comes with another patch in the meantime, or to a parameter that must not be touched, works on a copy.
    A thread that reads the parameter without asking here, as another model that shares it may, sees the patch.

    Args:
        parameter: The parameter.
        owner: Equal for calls that write the same values, () for nothing; None for a patch of this call alone.
    """

    def __init__(self, parameter: torch.Tensor, owner: Hashable = None) -> None:
        self.parameter, self.owner = parameter, owner
        self._cover: _Cover | None = None

    def write(self, patch: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor | None:
        """Write the patch.

        Args:
            patch: Returns flat indices, int64 [k], increasing, and what to write there, [k], in the parameter's dtype.
                Not called where the patch is there already.

        Returns:
            A patched copy, where the parameter itself cannot have the patch; else None.
        """
        if can_write(self.parameter):
            key = self.parameter.data_ptr()
            with _lock:
                cover = _covers.get(key)
                if cover is None:
                    indices, values = patch()
                    before = overwrite(self.parameter, indices, values.detach()) if indices.numel() else values
                    self._cover = _covers[key] = _Cover(self.owner, self.parameter.data, indices, before)
                elif self.owner is not None and cover.owner == self.owner:
                    self._cover = cover
                if self._cover is not None:
                    self._cover.users += 1
                    return None
        indices, values = patch()
        return patched_copy(self.parameter.detach(), indices, values) if indices.numel() else own_copy(self.parameter)

    def erase(self) -> None:
        """Put the parameter's own bits back, unless others still need the patch."""
        if self._cover is None:
            return
        with _lock:
            self._cover.users -= 1
            if not self._cover.users:
                data, moved = self._cover.data, self.parameter.data
                del _covers[data.data_ptr()]
                # The model may have been moved or cast meanwhile, as by a hook at its first forward.
                for each in [data] if moved.data_ptr() == data.data_ptr() else [data, moved]:
                    if self._cover.indices.numel():
                        overwrite(each, self._cover.indices.to(each.device), self._cover.before.to(each))
        self._cover = None


@contextmanager
def written(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> Iterator[torch.Tensor]:
    """The parameter, or a copy of it, with a patch for a while (see `Hold`)."""
    hold = Hold(parameter)
    other = hold.write(lambda: (indices, values))
    try:
        yield parameter if other is None else other
    finally:
        hold.erase()
