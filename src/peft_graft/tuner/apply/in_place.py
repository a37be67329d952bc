"""Write a patch into a parameter's own storage for a while: O(patch), where a patched copy is O(parameter).

Who runs on a patch holds a `PatchLease` on the parameters. The first lease writes the patch, the last one restores the
base's bits, and leases with the same patch share it, also between threads. A parameter that has another patch on it is
left alone; its user works on a patched copy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn


class ResolvedTensor(NamedTuple):
    """The entries of one parameter, ready to be written.

    Attributes:
        key: Equal for the same entries; None for entries that nobody else shares.
        indices: Flat indices, int64 [n], increasing.
        values: The values to write, [n], in the parameter's dtype.
        expected: The base's values that `values` were computed from, [n]; None where they do not depend on the base.
    """

    key: Hashable
    indices: torch.Tensor
    values: torch.Tensor
    expected: torch.Tensor | None = None


# A patch of no entries: it keeps others from writing theirs while a module runs on the base's own bits.
NOTHING = ResolvedTensor((), torch.empty(0, dtype=torch.int64), torch.empty(0))


class AppliedPatch:
    """A patch that is on a parameter right now, with the base's values that it covers."""

    __slots__ = ("address", "before", "flat", "lock", "parameter", "patch", "users")

    def __init__(self, parameter: torch.Tensor, address: int, patch: ResolvedTensor) -> None:
        data = parameter.data
        # Holding the data keeps its address taken. Without a patch, the layout does not matter.
        self.flat = data if patch is NOTHING else data.view(-1)
        self.parameter, self.address, self.patch = parameter, address, patch
        self.before: torch.Tensor | None = None  # the base's values at the indices, [n]
        self.users: set[int] = set()  # ids of leases, so that a lease can be collected
        self.lock = threading.RLock()  # reentrant, because a lease may be collected while its thread is in here

    def write(self) -> bool:
        """Write the patch; return False, and write nothing, where the base is not as the patch expects it."""
        _, indices, values, expected = self.patch
        if self.patch is not NOTHING:
            before = self.flat.index_select(0, indices)
            if expected is not None and not torch.equal(before, expected):
                return False
            self.before = before  # before the write, so that an interrupt in between does no harm
            _put_flat(self.flat, indices, values)
        return True

    def restore(self) -> None:
        """Put the base's bits back; also into the parameter's new storage, if a hook has moved the model meanwhile."""
        if self.before is None:
            return
        _put_flat(self.flat, self.patch.indices, self.before)
        if self.parameter.data_ptr() != self.address:
            moved = self.parameter.data
            overwrite(moved, self.patch.indices.to(moved.device), self.before.to(moved))


def _put_flat(flat: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> None:
    if flat.dtype is torch.float32:
        flat.scatter_(0, indices, values)  # half the time of `index_copy_`; for 16 bits, its time is quadratic
    else:
        flat.index_copy_(0, indices, values)


_applied: dict[int, AppliedPatch] = {}  # by address, so that tied parameters share one


class PatchLease:
    """The right to run on parameters, each with one patch on it, until `release`.

    Releasing twice does nothing, and a lease that nobody holds any more is released: an interrupt may come anywhere.
    """

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held: list[AppliedPatch] = []

    def __bool__(self) -> bool:
        """Return whether any parameter has been acquired, and not released yet."""
        return bool(self._held)

    def acquire(self, parameter: torch.Tensor, patch: ResolvedTensor) -> bool:
        """Write a patch into a parameter, or join those who run on the same.

        Args:
            parameter: The parameter.
            patch: What to write.

        Returns:
            Whether the parameter has the patch now. False where others run on another one, and where the base has
            changed since the patch was resolved.
        """
        address = parameter.data_ptr()
        while True:
            applied = _applied.get(address)
            if applied is None:
                written = self._write(AppliedPatch(parameter, address, patch))
                if written is not None:
                    return written
            elif patch.key is None or applied.patch.key != patch.key:
                return False
            elif self._join(applied):
                return True

    def join(self, parameter: torch.Tensor) -> AppliedPatch:
        """Keep a parameter as it is for a while, whatever patch is on it."""
        address = parameter.data_ptr()
        while True:
            applied = _applied.get(address)
            if applied is None:
                fresh = AppliedPatch(parameter, address, NOTHING)
                if self._write(fresh):
                    return fresh
            elif self._join(applied):
                return applied

    def _write(self, fresh: AppliedPatch) -> bool | None:
        """Register a patch and write it; None where another thread was faster."""
        self._held.append(fresh)  # first, so that whatever follows can be undone
        with fresh.lock:
            fresh.users.add(id(self))
            first = _applied.setdefault(fresh.address, fresh) is fresh
            if first and fresh.write():
                return True
        self._leave(fresh)
        return False if first else None

    def _join(self, applied: AppliedPatch) -> bool:
        """Use a patch that is there; False where its last user has just left."""
        self._held.append(applied)
        with applied.lock:
            applied.users.add(id(self))
            if _applied.get(applied.address) is applied:
                return True
        self._leave(applied)
        return False

    def _leave(self, applied: AppliedPatch) -> None:
        """Put the base's bits back, unless others still run on the patch."""
        with applied.lock:
            applied.users.discard(id(self))
            if not applied.users and _applied.get(applied.address) is applied:
                applied.restore()
                _applied.pop(applied.address, None)
        self._held.remove(applied)

    def release(self) -> None:
        """Leave all parameters, all of them also where an interrupt comes in between."""
        try:
            while self._held:
                self._leave(self._held[-1])
        finally:
            while self._held:
                self._leave(self._held[-1])

    def __del__(self) -> None:
        """Release what an exception has left behind."""
        if getattr(self, "_held", None):
            self.release()


@contextmanager
def written(parameter: torch.Tensor, patch: ResolvedTensor) -> Iterator[torch.Tensor]:
    """Give the parameter with a patch on it, or a patched copy where it cannot be written to."""
    lease = PatchLease()
    try:
        held = can_write(parameter) and lease.acquire(parameter, patch)
        yield parameter if held else patched_copy(parameter.detach(), patch.indices, patch.values)
    finally:
        lease.release()


def is_traced() -> bool:
    """Return whether a compiler records the calls, which is to see functions and no side effects."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@torch.compiler.disable
def uncompiled(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function as it is, in the middle of compiled code."""
    return run(*args, **kwargs)


def can_write(parameter: torch.Tensor) -> bool:
    """Return whether nobody else can notice that the parameter is overwritten for a while.

    Autograd and autocast may keep the values of a parameter that requires gradients; other processes may share its
    memory; and a sharded one, or one on the meta device, holds no values of its own.
    """
    return (
        type(parameter) in (nn.Parameter, torch.Tensor)
        and not parameter.requires_grad
        and not parameter.is_meta
        and parameter.is_contiguous()
        and not (parameter.is_cpu and parameter.untyped_storage().is_shared())
        and (torch.is_inference_mode_enabled() or not parameter.is_inference())
    )


def overwrite(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Write values at flat indices, unseen by autograd.

    Args:
        parameter: Where to write.
        indices: Flat indices, int64 [n], increasing.
        values: What to write, [n], in the parameter's dtype.

    Returns:
        The values that were there, [n].
    """
    data = parameter.data
    if not data.is_contiguous():
        before = data.take(indices)
        data.put_(indices, values)
        return before
    flat = data.view(-1)
    before = flat.index_select(0, indices)
    _put_flat(flat, indices, values)
    return before


def restored(entries: torch.Tensor, at: torch.Tensor, indices: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Replace entries by their values before a patch.

    Args:
        entries: Values at `at`, float [n].
        at: Flat indices, int64 [n].
        indices: Flat indices of the patch, int64 [k], increasing.
        before: The values that the patch covers, float [k].

    Returns:
        Values at `at` without the patch, float [n].
    """
    if not indices.numel():
        return entries
    where = torch.searchsorted(indices, at).clamp_(max=indices.numel() - 1)
    return torch.where(indices[where] == at, before[where].to(entries), entries)


def is_any_applied() -> bool:
    """Return whether somebody runs on any parameter right now."""
    return bool(_applied)


def has_patch(parameter: torch.Tensor) -> bool:
    """Return whether somebody runs on the parameter right now."""
    return bool(_applied) and parameter.data_ptr() in _applied


@contextmanager
def _kept(parameter: torch.Tensor) -> Iterator[AppliedPatch]:
    """Keep others from writing to the parameter, or from restoring it, while its bits are read."""
    lease = PatchLease()
    try:
        yield lease.join(parameter)
    finally:
        lease.release()


def own_entries(parameter: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the base's values at these flat indices, int64 [n], also while a patch is on the parameter."""
    flat = parameter.detach().reshape(-1)
    if is_traced() or parameter.is_meta:
        return flat[indices]
    with _kept(parameter) as applied:
        entries, before = flat[indices], applied.before
        return entries if before is None else restored(entries, indices, applied.patch.indices, before)


def own_copy(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return a copy of the parameter with the base's bits, while a patch is on it; else None."""
    if not _applied or is_traced() or not has_patch(parameter):
        return None
    with _kept(parameter) as applied:
        return None if applied.before is None else _put(parameter.detach(), applied.patch.indices, applied.before)


def patched_copy(parameter: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return a copy of the parameter with these values at these flat indices; gradients reach the values."""
    if is_traced() or parameter.is_meta:
        return _put(parameter, indices, values)
    with _kept(parameter):
        own = own_copy(parameter)
        return _put(parameter if own is None else own, indices, values)


@contextmanager
def copied(parameters: Iterable[torch.Tensor]) -> Iterator[Callable[[torch.Tensor, torch.Tensor], None]]:
    """Let parameters be copied while others run on them.

    Args:
        parameters: The parameters that are copied inside.

    Yields:
        A function that puts the base's bits into a copy: `put_back(copy, parameter)`.
    """
    lease = PatchLease()

    def put_back(copy: torch.Tensor, parameter: torch.Tensor) -> None:
        applied = _applied.get(parameter.data_ptr())
        if applied is not None and applied.before is not None and not copy.is_meta:
            overwrite(copy, applied.patch.indices, applied.before)

    try:
        for parameter in parameters:
            if not parameter.is_meta:
                lease.join(parameter)
        yield put_back
    finally:
        lease.release()


def _put(tensor: torch.Tensor, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    if not tensor.is_contiguous():
        return tensor.put(indices, values)  # keeps the order in memory
    return tensor.view(-1).index_put((indices,), values).view(tensor.shape)
