"""Modules taken whole, such as a task head: DonorHead holds the donor's and keeps them frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..checkpoints.pairing import Donor, ZerosDonor, resolve_names, stream
from .backends.sharded import GATHER, is_sharded, whole_shape
from .targets import COMPILED

if TYPE_CHECKING:
    from .config import GraftConfig


# For these tasks PEFT names the head in the config that the user passed, when the graft has long been made.
_LATE_HEADS = {"TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}


def name_heads(config: GraftConfig) -> None:
    """Name a task's head among the modules to save, as PEFT does, but before they are wrapped."""
    heads = _LATE_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), [])
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *heads]))


class DonorHead(ModulesToSaveWrapper):
    """PEFT's wrapper of a module to save, where copies hold the donor's values and stay frozen whatever PEFT does."""

    frozen: dict[str, dict[str, torch.Tensor]]  # what the frozen copies hold, for when an engine shards them

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
        """Set what trains, but never a copy that holds the donor's values."""
        super().set_requires_grad(adapter_names, requires_grad)
        self.freeze()

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Forget the copy of an adapter."""
        self.frozen.pop(adapter_name, None)
        super().delete_adapter(adapter_name, new_active_adapters)

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of a copy; where this process holds but a shard of them, what was taken from the donor."""
        found = dict(state_dict)
        for name, value in self.frozen.get(adapter_name, {}).items():
            key = f"modules_to_save.{adapter_name}.{name}"
            if not _is_whole(found.get(key), value.shape) and not self._trains(adapter_name):
                found[key] = value
        return super().adapter_state_dict(adapter_name, found)

    def _trains(self, adapter_name: str) -> bool:
        return any(parameter.requires_grad for parameter in self.modules_to_save[adapter_name].parameters())


def _is_whole(value: torch.Tensor | None, shape: torch.Size) -> bool:
    return value is not None and value.shape == shape and not is_sharded(value)


def require_whole_heads(model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse to save modules of which only shards are at hand.

    Args:
        model: The model that holds the adapter.
        adapter_name: Name of the adapter.
        state_dict: State dict of the model.

    Raises:
        ValueError: Values of a module to save are missing.
    """
    partial = []
    for key, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        if isinstance(module, DonorHead) and adapter_name in module.frozen and not module._trains(adapter_name):
            continue
        for name, value in module.modules_to_save[adapter_name].named_parameters():
            stored = state_dict.get(f"{key}.modules_to_save.{adapter_name}.{name}")
            if is_sharded(value) and not _is_whole(stored, torch.Size(whole_shape(value))):
                partial.append(f"{key}.{name}")
    if partial:
        raise ValueError(f"modules_to_save must be whole to be saved, got shards of {partial}. {GATHER}")


def graft_heads(model: nn.Module, adapter_name: str, donor: Donor) -> None:
    """Fill an adapter's `modules_to_save` with the donor's values and freeze them.

    Modules of which the donor lacks parameters keep the base's values and stay trainable.

    Args:
        model: The base, with the adapter in it.
        adapter_name: Name of the adapter.
        donor: The donor; `"zeros"` has no heads.

    Raises:
        DonorError: The donor's head has other shapes.
    """
    if isinstance(donor, ZerosDonor):
        return
    held = set(donor.names())
    for key, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or adapter_name not in module.modules_to_save:
            continue
        key = key.replace(COMPILED, "")
        copies = {f"{key}.{name}": value for name, value in module.modules_to_save[adapter_name].named_parameters()}
        if not copies.keys() <= held:
            continue
        base = {name: value.detach() for name, value in copies.items()}
        names = resolve_names({name: tuple(value.shape) for name, value in base.items()}, donor)
        for _, before, after in stream(base, donor, names):
            before.copy_(after)
        if not isinstance(module, DonorHead):
            # PEFT has made the wrapper already; as a subclass it keeps its copies, and PEFT still knows it.
            module.__class__ = DonorHead
            module.frozen = {}
        held_values = module.modules_to_save[adapter_name].state_dict()
        module.frozen[adapter_name] = {name: value.cpu() for name, value in held_values.items()}
        module.freeze()


def choose_heads(
    model: nn.Module, adapter_names: Sequence[str], chosen: str | None
) -> tuple[dict[str, str], list[str]]:
    """Choose whose copy of each module to save stands for all of these adapters.

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


def copy_heads(model: nn.Module, adapter_name: str, sources: Mapping[str, str]) -> None:
    """Give an adapter the modules to save of others, frozen where theirs are the donor's.

    Args:
        model: The model that holds the adapters.
        adapter_name: Name of the adapter, which has copies of its own already.
        sources: Whose values to take, by the module's key.
    """
    for key, module in model.named_modules():
        if key not in sources or not isinstance(module, ModulesToSaveWrapper):
            continue
        source, copy = sources[key], module.modules_to_save[adapter_name]
        # What has no values yet (meta device) cannot be copied to.
        is_empty = any(parameter.is_meta for parameter in copy.parameters())
        copy.load_state_dict(module.modules_to_save[source].state_dict(), assign=is_empty)
        if isinstance(module, DonorHead) and source in module.frozen:
            module.frozen[adapter_name] = module.frozen[source]
            module.freeze()
