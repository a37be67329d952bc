"""A checkpoint seen in a model's own names: what transformers renames or joins while loading is undone here, unread."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .donors import CheckpointDonor, DonorError, Extent


class ModelView:
    """A checkpoint whose tensors bear the names that they have in a model.

    Experts that a checkpoint stores one by one and a model holds as one tensor appear as that tensor. Forms that take
    arithmetic to convert, or that reorder entries within a tensor, are refused when they are asked for.

    Args:
        checkpoint: The files.
        model: The model, also without values (meta device), before any adapter is added.

    Attributes:
        name: The checkpoint's name.
        role: The checkpoint's role.
        revision: The checkpoint's revision.
    """

    def __init__(self, checkpoint: CheckpointDonor, model: nn.Module) -> None:
        self.name, self.role, self.revision = checkpoint.name, checkpoint.role, checkpoint.revision
        self._checkpoint = checkpoint
        self._stored: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._refused: dict[str, str] = {}
        collected = _collect(checkpoint.names(), model)
        state = model.state_dict()
        for target, (converter, sources) in collected.items():
            if converter is None:
                stored = [key for keys in sources.values() for key in keys][:1]
            else:
                stored = _in_flat_order(converter, list(sources.values()))
            if stored:
                self._stored[target] = stored
                shape = self._checkpoint.shape(stored[0])
                self._shapes[target] = shape if converter is None else tuple(state[target].shape)
            elif converter is not None:
                self._refused[target] = ", ".join(type(operation).__name__ for operation in converter.operations)

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as the files state it."""
        return self._shapes[name]

    def stored_names(self, name: str) -> list[str]:
        """Return the names in the files of the tensors that follow each other in this one's flat order."""
        return self._stored[name]

    def extents(self, name: str) -> list[Extent]:
        """Return where the tensor's entries stand, in its flat order."""
        return [self._checkpoint.extent(stored) for stored in self._stored[name]]

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        parts = [self._checkpoint.get(stored) for stored in self._stored[name]]
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]).view(self._shapes[name])

    def require_plain(self, names: Sequence[str]) -> None:
        """Refuse tensors that transformers computes from the files' while it loads them.

        Raises:
            DonorError: Names them and says what is done to them.
        """
        bad = {name: self._refused[name] for name in names if name in self._refused}
        if bad:
            name, what = next(iter(bad.items()))
            raise DonorError(
                f"{self.role} tensors must stand in the files as they do in the model, got {name!r} of {self.name!r}, "
                f"which transformers converts while loading ({what}; {len(bad)} such tensors). Leave them out with "
                "exclude_modules, or load both models and use get_peft_model(base, GraftConfig(donor=model, ...))."
            )


def _collect(
    keys: Sequence[str], model: nn.Module
) -> dict[str, tuple[WeightConverter | None, dict[str, list[str]]]]:
    """Sort a checkpoint's keys by the model's tensor that they become part of, as transformers does when it loads them.

    Returns:
        By the model's tensor: what converts them, and keys by the converter's source pattern.
    """
    if not isinstance(model, PreTrainedModel):
        return {key: (None, {key: [key]}) for key in keys}
    state, prefix = model.state_dict(), model.base_model_prefix
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, tuple[WeightConverter | None, dict[str, list[str]]]] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if target not in state and key in state:
            target, pattern = key, None
        converter = None if pattern is None else by_pattern[pattern]
        sources = {} if converter is None else {each: [] for each in converter.source_patterns}
        found.setdefault(target, (converter, sources))[1].setdefault(pattern or key, []).append(key)
    return found


def _in_flat_order(converter: WeightConverter, sources: list[list[str]]) -> list[str]:
    """The keys in the order in which their entries follow each other in the joined tensor; none if they do not."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if operations == [(MergeModulelist, 0)] and len(sources) == 1:
        return sources[0]
    if operations == [(MergeModulelist, 0), (Concatenate, 1)] and len({len(keys) for keys in sources}) == 1:
        return [key for keys in zip(*sources, strict=True) for key in keys]
    if operations == [(Concatenate, 0)]:
        return [key for keys in sources for key in keys]
    return []
