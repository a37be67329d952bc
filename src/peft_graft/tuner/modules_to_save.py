"""Modules to save: taken whole from the donor, such as a task head, and kept frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..adapter_files.task_types import task_names
from ..checkpoints.pairing import Donor, DonorError, ZerosDonor, find_names, resolve_names, stream
from ..checkpoints.wrappers import plain_key, plain_name
from .backends.sharded import GATHER, is_sharded, whole_shape
from .left_out import aliases_of, tied_modules

if TYPE_CHECKING:
    from .config import GraftConfig


_TASK_HEADS = {"classifier", "score", "qa_outputs"}  # PEFT adds them for task types


def name_modules(config: GraftConfig, model: nn.Module, from_file: bool) -> None:
    """Complete the modules to save before PEFT wraps them: with the task's head, and with modules tied to them.

    Args:
        config: The adapter's config, to be completed.
        model: The base.
        from_file: Whether the modules come from a file, which has what it needs.

    Raises:
        ValueError: The user named a module that the base does not have.
    """
    if not from_file and config.modules_to_save:
        keys = [plain_name(key) or "" for key, _ in model.named_modules(remove_duplicate=False)]
        named = [
            name for name in _named_by_user(config) if name not in _TASK_HEADS
        ]  # these suit several models at once
        wrong = [name for name in named if not any(key.endswith(name) for key in keys)]
        if wrong:
            raise ValueError(
                f"modules_to_save must name modules of the base, got {wrong}, which {type(model).__name__} does not "
                "have. Check the spelling against model.named_modules()."
            )
        config.modules_to_save = [*config.modules_to_save, *tied_modules(model, config.modules_to_save)]
    task = task_names(config.task_type)
    if task and task.late_modules:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *task.late_modules]))


def _named_by_user(config: GraftConfig) -> list[str]:
    """Return the modules to save without the heads that PEFT may have added for the task."""
    heads = _TASK_HEADS if config.task_type is not None else set()
    return [name for name in config.modules_to_save or [] if name not in heads]


class DonorModule(ModulesToSaveWrapper):
    """PEFT's wrapper of a module to save, with copies that hold the donor's values and stay frozen.

    Attributes:
        frozen: Values of each frozen copy, by adapter name, for when an engine shards the copies.
    """

    frozen: dict[str, dict[str, torch.Tensor]]

    def freeze(self) -> None:
        """Freeze the copies that hold the donor's values."""
        for adapter_name in self.frozen.keys() & self.modules_to_save.keys():
            self.modules_to_save[adapter_name].requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the copies and the base's own module."""
        super().enable_adapters(enabled)
        self.freeze()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Choose the active copy."""
        super().set_adapter(*args, **kwargs)
        self.freeze()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Choose the copies that train, but never one that holds the donor's values."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forget the copy of an adapter."""
        self.frozen.pop(adapter_name, None)
        super().delete_adapter(adapter_name, new_active_adapters)

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the values of a copy; where this process holds but a shard of them, the donor's."""
        found = dict(state_dict)
        for name, value in self.frozen.get(adapter_name, {}).items():
            key = f"modules_to_save.{adapter_name}.{name}"
            if not _is_whole(found.get(key), value.shape) and not self.trains(adapter_name):
                found[key] = value
        return super().adapter_state_dict(adapter_name, found)

    def trains(self, adapter_name: str) -> bool:
        """Return whether a copy has parameters that train, because somebody made them."""
        return any(parameter.requires_grad for parameter in self.modules_to_save[adapter_name].parameters())


def _is_whole(value: torch.Tensor | None, shape: torch.Size) -> bool:
    return value is not None and value.shape == shape and not is_sharded(value)


def _wrappers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, ModulesToSaveWrapper]]:
    """Yield the wrappers in which an adapter has a copy, with their keys in the model."""
    for key, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            yield key, module


def names_to_save(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the names in the unwrapped model of all parameters that an adapter stores whole."""
    return [
        f"{plain_key(key)}.{name}"
        for key, module in _wrappers(model, adapter_name)
        for name, _ in module.modules_to_save[adapter_name].named_parameters()
    ]


def require_whole_modules(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to save modules of which only shards are at hand.

    Args:
        model: The model that holds the adapter.
        adapter_name: Name of the adapter.
        state_dict: State dict of the model.

    Raises:
        ValueError: Values of a module to save are missing.
    """
    partial = []
    for key, module in _wrappers(model, adapter_name):
        if isinstance(module, DonorModule) and adapter_name in module.frozen and not module.trains(adapter_name):
            continue
        for name, value in module.modules_to_save[adapter_name].named_parameters():
            stored = state_dict.get(f"{key}.modules_to_save.{adapter_name}.{name}")
            if is_sharded(value) and not _is_whole(stored, torch.Size(whole_shape(value))):
                partial.append(f"{key}.{name}")
    if partial:
        raise ValueError(f"modules_to_save must be whole to be saved, got shards of {partial}. {GATHER}")


def graft_modules(model: nn.Module, adapter_name: str, donor: Donor, config: GraftConfig) -> None:
    """Fill an adapter's modules to save with the donor's values, buffers included, and freeze them.

    A task's head of which the donor lacks parameters keeps the base's values and stays trainable.

    Args:
        model: The base, with the adapter in it.
        adapter_name: Name of the adapter.
        donor: The donor; `"zeros"` has no modules to save.
        config: The adapter's config.

    Raises:
        DonorError: The donor's module has other shapes, or the donor lacks a module that the user named.
    """
    for key, module in _wrappers(model, adapter_name):
        names = donor_names_of_module(model, adapter_name, key, module, donor, config)
        if names is None:
            continue
        prefix = f"{plain_name(key)}."
        copied = module.modules_to_save[adapter_name].state_dict()
        base = {f"{prefix}{name}": value for name, value in copied.items() if value.is_floating_point()}
        floats = {name: other for name, other in names.items() if name in base}
        values = {name.removeprefix(prefix): after for name, _, after in stream(base, donor, floats)}
        values |= {name.removeprefix(prefix): donor.get(other) for name, other in names.items() if name not in base}
        _fill(module, adapter_name, values, freeze=True)


def donor_names_of_module(
    model: nn.Module, adapter_name: str, key: str, module: ModulesToSaveWrapper, donor: Donor, config: GraftConfig
) -> dict[str, str] | None:
    """Find the donor's tensors of a module to save, under any name that the base or the donor has for them.

    Args:
        model: The base, with the adapter in it.
        adapter_name: Name of the adapter.
        key: The wrapper's key in the model.
        module: The wrapper.
        donor: The donor.
        config: The adapter's config.

    Returns:
        Donor tensor name by the base's name: of all parameters, and of the buffers that the donor has. None where the
        donor lacks a head that was added for the task; the base's is kept then.

    Raises:
        DonorError: The donor's module has other shapes, or the donor lacks a module that the user named.
    """
    if isinstance(donor, ZerosDonor):
        return None
    prefix = getattr(model, "base_model_prefix", "")
    prefixes, aliases, plain = (prefix,) if prefix else (), aliases_of(model, donor), plain_name(key)
    copied = module.modules_to_save[adapter_name]
    wanted = {f"{plain}.{name}": tuple(whole_shape(value)) for name, value in copied.named_parameters()}
    found = find_names(wanted, donor, prefixes, aliases)
    lost = sorted(wanted.keys() - found.keys())
    if lost and any(key.endswith(name) for name in _named_by_user(config)):
        raise DonorError(
            f"donor must hold the modules in modules_to_save, got {donor.name!r} without {', '.join(lost)}. Leave "
            f"{plain!r} out of modules_to_save, or use a donor that has it."
        )
    if lost:
        return None
    found = resolve_names(wanted, donor, prefixes, aliases, are_saved_whole=True)
    buffers = [f"{plain}.{name}" for name in copied.state_dict() if f"{plain}.{name}" not in wanted]
    return found | find_names(buffers, donor, prefixes)


def choose_modules(
    model: nn.Module, adapter_names: Sequence[str], chosen: str | None
) -> tuple[dict[str, str], list[str]]:
    """Choose the adapter whose copy of each module to save stands for all of these adapters.

    Args:
        model: The model that holds the adapters.
        adapter_names: Adapters, with or without copies.
        chosen: The adapter whose copies to take.

    Returns:
        An adapter by the module's key: the chosen one, else the first where all that have a copy have the same; and the
        keys of modules where they differ.
    """
    found, apart = {}, []
    for key, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        names = [name for name in adapter_names if name in module.modules_to_save]
        if not names:
            continue
        copies = [module.modules_to_save[name].state_dict() for name in names]
        if chosen in names:
            found[key] = chosen
        elif all(torch.equal(copy[name], copies[0][name]) for copy in copies for name in copy):
            found[key] = names[0]
        else:
            apart.append(key)
    return found, apart


def copy_modules(model: nn.Module, adapter_name: str, sources: Mapping[str, str]) -> None:
    """Fill an adapter's modules to save with those of other adapters, frozen where these are the donor's.

    Args:
        model: The model that holds the adapters.
        adapter_name: Name of the adapter.
        sources: The adapter to copy from, by the module's key.
    """
    for key, module in _wrappers(model, adapter_name):
        if key in sources:
            source = sources[key]
            freeze = isinstance(module, DonorModule) and source in module.frozen
            _fill(module, adapter_name, module.modules_to_save[source].state_dict(), freeze)


def fill_modules(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill an adapter's modules to save with the tensors of a file.

    Args:
        model: The model that holds the adapter.
        adapter_name: Name of the adapter.
        tensors: By name in the unwrapped model: all of each module.
    """
    for key, module in _wrappers(model, adapter_name):
        prefix = f"{plain_key(key)}."
        values = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        _fill(module, adapter_name, values, freeze=False)


def _fill(module: ModulesToSaveWrapper, adapter_name: str, values: Mapping[str, torch.Tensor], freeze: bool) -> None:
    """Write values into an adapter's copy of a module, and freeze it where they are the donor's."""
    copy = module.modules_to_save[adapter_name]
    # A copy that has no values yet (meta device) cannot be written into.
    is_empty = any(parameter.is_meta for parameter in copy.parameters())
    copy.load_state_dict({**({} if is_empty else copy.state_dict()), **values}, assign=is_empty)
    if not freeze:
        return
    if not isinstance(module, DonorModule):
        # PEFT has made the wrapper already; as a subclass it keeps its copies, and PEFT still knows it.
        module.__class__ = DonorModule
        module.frozen = {}
    module.frozen[adapter_name] = {name: value.cpu() for name, value in copy.state_dict().items()}
    module.freeze()
