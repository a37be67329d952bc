"""Where the entries of a checkpoint's tensors stand in a model that packs and shards them: asked of its own loader.

`load_weights` is called with an empty tensor of the checkpoint's shape, while `copy_`, with which loaders write, only
notes what it is asked to copy. A loader hands it views, of the tensor that it was given and of the parameter, and their
offsets and strides tell where every entry goes. So a patch is written in time proportional to its entries. vLLM's own
loader of sparse patches replaces `copy_` too, but it fills and compares whole tensors for a patch of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ..workflows.checkpoint_patch import CheckpointEdit


@dataclass(frozen=True, eq=False)
class Route:
    """A block of a tensor in a checkpoint, and the part of a parameter that it is loaded into.

    Attributes:
        offset: Flat index of the block's first entry in the tensor.
        strides: Distance of neighbours in the tensor, for each dimension of `target`.
        target: View of the parameter.
    """

    offset: int
    strides: tuple[int, ...]
    target: torch.Tensor

    @property
    def is_unique(self) -> bool:
        """Whether no entry of the tensor can stand at two places of the block."""
        spanned = 1
        for stride, size in sorted(zip(self.strides, self.target.shape, strict=True)):
            if size > 1:
                if stride < spanned:
                    return False
                spanned += stride * (size - 1)
        return True

    def write(self, edit: CheckpointEdit) -> None:
        """Write those entries of an edit that stand in the block, rounded to the parameter's dtype as loading does."""
        device, dtype = self.target.device, self.target.dtype
        if edit.indices is None:
            block = torch.as_strided(edit.values, self.target.shape, self.strides, self.offset)
            self.target.copy_(block.to(device, dtype))
            return
        spanned = sum(stride * (size - 1) for stride, size in zip(self.strides, self.target.shape, strict=True))
        bounds = torch.tensor([self.offset, self.offset + spanned + 1])
        first, last = torch.searchsorted(edit.indices, bounds).tolist()
        rest, values = edit.indices[first:last] - self.offset, edit.values[first:last]
        inside = torch.ones_like(rest, dtype=torch.bool)
        places = [torch.zeros_like(rest)] * len(self.strides)
        for dim in sorted(range(len(self.strides)), key=lambda dim: -self.strides[dim]):
            if self.target.shape[dim] > 1:
                places[dim] = rest // self.strides[dim]
                rest = rest - places[dim] * self.strides[dim]
                inside &= places[dim] < self.target.shape[dim]
        inside &= rest == 0
        where = tuple(place[inside].to(device) for place in places)
        # A place in no dimension is none to index_put_.
        target, where = (self.target, where) if where else (self.target.view(1), (rest[inside].to(device),))
        target.index_put_(where, values[inside].to(device, dtype))


class Routes:
    """The routes of one model, found when they are first needed.

    Args:
        model: The model, with a method `load_weights` that takes pairs of a name in the checkpoint and a tensor.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._found: dict[str, list[Route] | None] = {}

    def find(self, edits: Mapping[str, CheckpointEdit]) -> dict[str, list[Route] | None]:
        """Return where tensors of a checkpoint go.

        Args:
            edits: An edit of each, by the tensor's name in the checkpoint, for its shape and dtype.

        Returns:
            The routes of each: none for a tensor of another rank, None where the loader computes what it writes, so
            that entries cannot be followed.
        """
        live = {_storage(each) for each in chain(self._model.parameters(), self._model.buffers())}
        for name, edit in edits.items():
            known = self._found.get(name, [])
            # A parameter may have been replaced since.
            if name not in self._found or any(_storage(route.target) not in live for route in known or []):
                self._found[name] = self._ask(name, torch.empty(edit.shape, dtype=edit.values.dtype))
        return {name: self._found[name] for name in edits}

    def _ask(self, name: str, empty: torch.Tensor) -> list[Route] | None:
        with _noting_copies() as copies:
            self._model.load_weights([(name, empty)])
        routes = [_route(target, source, empty) for target, source in copies]
        followed = [route for route in routes if route is not None]
        return followed if len(followed) == len(routes) else None


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _route(target: torch.Tensor, source: torch.Tensor, empty: torch.Tensor) -> Route | None:
    """Return where copied entries come from and go to; None if they are not those of the tensor that was given."""
    given = source.dtype == empty.dtype and bool(empty.numel()) and _storage(source) == _storage(empty)
    if not given or source.shape != target.shape or not target.is_floating_point():
        return None
    route = Route(int(source.storage_offset()), source.stride(), target)
    return route if route.is_unique else None


@contextmanager
def _noting_copies() -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Let `copy_` note its tensors and copy nothing."""
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    copy = torch.Tensor.copy_

    def note(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        copies.append((target, source))
        return target

    torch.Tensor.copy_ = note  # type: ignore[assignment, method-assign]
    try:
        yield copies
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]
