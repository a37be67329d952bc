"""Read a checkpoint under the names of a model, as transformers renames and joins its tensors while loading."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from ..peft_compat.transformers_names import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    get_model_conversion_mapping,
    rename_source_key,
)
from .donor import CheckpointDonor, DonorError, Extent
from .wrappers import look_through, plain_name, refuse_adapted


def model_class(
    config: PretrainedConfig,
    name: str,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> type[PreTrainedModel]:
    """Return the class that a checkpoint was saved from.

    Args:
        config: The checkpoint's configuration.
        name: Directory or Hub id of the checkpoint, for its own code and for the error message.
        revision: Branch, tag or commit of a Hub id.
        token: Token for the Hub.
        trust_remote_code: Whether to run code that comes with the checkpoint.

    Raises:
        DonorError: The configuration names no class of transformers, nor one of its own that may be run.
    """
    for architecture in config.architectures or ():
        found = getattr(transformers, architecture, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    own = _own_classes(config)
    for architecture in config.architectures or ():
        if architecture in own and trust_remote_code:
            return get_class_from_dynamic_module(own[architecture], name, revision=revision or "main", token=token)
        if architecture in own:
            raise _remote_code(name)
    raise DonorError(
        f"architectures must name a model of transformers, got {config.architectures!r} in config.json of {name!r}. "
        "Load both models yourself and use get_peft_model(base, GraftConfig(donor=model, ...))."
    )


def auto_class_of(config: PretrainedConfig, architecture: str) -> str | None:
    """Return the auto class under which a checkpoint with code of its own lists a class, None if it lists none."""
    listed = (getattr(config, "auto_map", None) or {}).items()
    return next((auto for auto, where in listed if str(where).rpartition(".")[2] == architecture), None)


def _own_classes(config: PretrainedConfig) -> dict[str, str]:
    """Return where the code of a checkpoint defines its model classes, by the name of the class."""
    listed = (getattr(config, "auto_map", None) or {}).items()
    return {where.rpartition(".")[2]: where for auto, where in listed if auto.startswith("AutoModel")}


def _remote_code(name: str) -> DonorError:
    return DonorError(
        f"trust_remote_code must be set for a model that is defined by code of its own, got False for {name!r}. "
        "If you trust that code, give trust_remote_code=True (--trust-remote-code), which runs it."
    )


def read_config(
    source: str | os.PathLike[str],
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig | None:
    """Read a checkpoint's configuration; None where it is a file without one.

    Args:
        source: Directory, file or Hub id.
        revision: Branch, tag or commit of a Hub id.
        token: Token for the Hub.
        trust_remote_code: Whether to run code that comes with the checkpoint, if its configuration needs it.

    Raises:
        DonorError: It needs code of its own, and `trust_remote_code` is not set. Nothing is asked on the terminal.
    """
    if Path(source).is_file() or (Path(source).is_dir() and not (Path(source) / "config.json").is_file()):
        return None
    try:
        return AutoConfig.from_pretrained(
            source, revision=revision or "main", token=token, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise _remote_code(os.fspath(source)) from error


def build_skeleton(
    base: str | os.PathLike[str],
    revision: str | None = None,
    like: PretrainedConfig | None = None,
    model_type: Any = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the base as transformers would load it, but on the meta device, so that no values are read.

    Args:
        base: A directory or Hub id.
        revision: Branch, tag or commit of a Hub id.
        like: Configuration of a fine-tuned model of the base, whose class and number of labels to take.
        model_type: A class with `from_pretrained`, such as an auto class; by default that of `like`, or the base's own.
        token: Token for the Hub.
        trust_remote_code: Whether to run code that comes with the base or with the fine-tuned model.

    Returns:
        The model, in the dtypes that `from_pretrained(base)` gives it, tied where it ties.

    Raises:
        DonorError: The base is quantized, of no architecture of transformers, or needs code that is not trusted.
        OSError: There is no such base.
    """
    config = read_config(base, revision, token, trust_remote_code)
    if config is None:
        raise DonorError(f"base must be a directory with config.json or a Hub id, got {os.fspath(base)!r}.")
    if getattr(config, "quantization_config", None) is not None:
        raise DonorError(f"base must be in a float dtype, got the quantized {os.fspath(base)!r}. Use the original.")
    if like is not None and like.model_type != config.model_type:
        like = None  # another architecture; the tensors will tell
    elif like is not None:
        config.num_labels = like.num_labels or 0
    cls = model_type or _class_like(config, like, os.fspath(base), revision, token, trust_remote_code)
    with _quiet():
        return cls.from_pretrained(
            base,
            config=config,
            revision=revision or "main",
            token=token,
            device_map="meta",
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )


def _class_like(
    config: PretrainedConfig,
    like: PretrainedConfig | None,
    base: str,
    revision: str | None,
    token: str | bool | None,
    trust_remote_code: bool,
) -> type[PreTrainedModel]:
    """Return the class of a fine-tuned model, in the base's code if the base comes with code for it."""
    if like is not None and {*_own_classes(config)} & {*(like.architectures or ())}:
        config.architectures = like.architectures
        like = None
    return model_class(like or config, base, revision, token, trust_remote_code)


@contextmanager
def _quiet() -> Iterator[None]:
    """Switch off transformers' progress bar and its report on the values that it believes to be loading."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class RenamedCheckpoint:
    """A checkpoint whose tensors have the names that they have in a model.

    Experts that a checkpoint stores one by one and a model holds as one tensor appear as that tensor. Forms that take
    arithmetic to convert, or that reorder entries within a tensor, are refused when they are asked for.

    Args:
        checkpoint: The files.
        model: The model, with or without adapters, and with or without values (meta device).

    Attributes:
        name: The checkpoint's name.
        role: The checkpoint's role.
        revision: The checkpoint's revision.
        checkpoint: The files.
    """

    def __init__(self, checkpoint: CheckpointDonor, model: nn.Module) -> None:
        self.name, self.role, self.revision = checkpoint.name, checkpoint.role, checkpoint.revision
        self.checkpoint = checkpoint
        self._stored: dict[str, list[str]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._refused: dict[str, str] = {}
        state = plain_state(model)
        refuse_adapted({*checkpoint.names()} - state.keys(), checkpoint.name, checkpoint.role)
        in_file = look_through(checkpoint.names(), state)
        collected = _collect(list(in_file), model, state)
        for target, (converter, sources) in collected.items():
            if converter is None:
                stored = [key for keys in sources.values() for key in keys][:1]
            else:
                stored = _in_flat_order(converter, list(sources.values()))
            stored = [in_file[key] for key in stored]
            if stored:
                self._stored[target] = stored
                shape = self.checkpoint.shape(stored[0])
                self._shapes[target] = shape if converter is None else self._joined(stored, tuple(state[target].shape))
            elif converter is not None:
                self._refused[target] = ", ".join(type(operation).__name__ for operation in converter.operations)

    def _joined(self, stored: Sequence[str], expected: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of joined tensors: the model's, but with as many experts or rows as the files have."""
        row = math.prod(expected[1:])
        entries = sum(math.prod(self.checkpoint.shape(name)) for name in stored)
        return expected if not row or entries % row else (entries // row, *expected[1:])

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._stored)

    def holds(self, name: str) -> bool:
        """Return whether the files hold a tensor, also in a form that has to be converted."""
        return name in self._stored or name in self._refused

    def entries(self, name: str, positions: Sequence[int]) -> torch.Tensor | None:
        """Read single entries of a tensor.

        Args:
            name: Name of the tensor.
            positions: Flat indices, in increasing order.

        Returns:
            Their values, [n], in the files' dtype; None if that is no floating-point dtype.
        """
        found, start = [], 0
        for extent in self.extents(name):
            if not isinstance(extent.dtype, torch.dtype):
                return None
            end, width = start + math.prod(extent.shape), extent.dtype.itemsize
            with extent.path.open("rb") as file:
                for position in positions:
                    if start <= position < end:
                        file.seek(extent.offset + (position - start) * width)
                        found.append(torch.frombuffer(bytearray(file.read(width)), dtype=extent.dtype))
            start = end
        return torch.cat(found)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as the files state it."""
        return self._shapes[name]

    def stored_names(self, name: str) -> list[str]:
        """Return the names in the files of the tensors that follow each other in this one's flat order."""
        return self._stored[name]

    def all_extents(self) -> dict[str, Extent]:
        """Return where every tensor of the files stands, by its name in the files."""
        return {name: self.checkpoint.extent(name) for name in self.checkpoint.names()}

    def extents(self, name: str) -> list[Extent]:
        """Return where the tensor's entries stand, in its flat order."""
        return [self.checkpoint.extent(stored) for stored in self._stored[name]]

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        parts = [self.checkpoint.get(stored) for stored in self._stored[name]]
        return parts[0] if len(parts) == 1 else torch.cat([part.flatten() for part in parts]).view(self._shapes[name])

    def require_plain(self, names: Sequence[str]) -> None:
        """Refuse tensors that transformers computes from the files' while it loads them.

        Raises:
            DonorError: Some are; the message names the first, and the operation.
        """
        bad = {name: self._refused[name] for name in names if name in self._refused}
        if bad:
            name, operations = next(iter(bad.items()))
            raise DonorError(
                f"{self.role} tensors must stand in the files as they do in the model, got {name!r} of {self.name!r}, "
                f"which transformers converts while loading ({operations}; {len(bad)} such tensors). Leave them out "
                "with exclude_modules, or load both models and use get_peft_model(base, GraftConfig(donor=model, ...))."
            )


def plain_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's state dict as it was before adapters were added, without the names of wrappers."""
    return {name: tensor for key, tensor in model.state_dict().items() if (name := plain_name(key)) is not None}


def _collect(
    keys: Sequence[str], model: nn.Module, state: dict[str, torch.Tensor]
) -> dict[str, tuple[WeightConverter | None, dict[str, list[str]]]]:
    """Sort a checkpoint's keys by the model's tensor that they become part of, as transformers does when it loads them.

    Returns:
        By the model's tensor: the converter, if there is one, and keys by the converter's source pattern.
    """
    if not isinstance(model, PreTrainedModel):
        return {key: (None, {key: [key]}) for key in keys}
    prefix = model.base_model_prefix
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
        sources: dict[str, list[str]] = {} if converter is None else {each: [] for each in converter.source_patterns}
        found.setdefault(target, (converter, sources))[1].setdefault(pattern or key, []).append(key)
    return found


def _in_flat_order(converter: WeightConverter, sources: list[list[str]]) -> list[str]:
    """Return the keys in the order of their entries in the joined tensor; none if these do not follow each other."""
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in converter.operations]
    if operations == [(MergeModulelist, 0)] and len(sources) == 1:
        return sources[0]
    if operations == [(MergeModulelist, 0), (Concatenate, 1)] and len({len(keys) for keys in sources}) == 1:
        return [key for keys in zip(*sources, strict=True) for key in keys]
    if operations == [(Concatenate, 0)]:
        return [key for keys in sources for key in keys]
    return []
