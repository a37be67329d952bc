"""Find the modules of a model that can carry a patch, and those that do by default."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.utils import parametrize

from ..checkpoints.wrappers import GRAFTED_PARAMETERS, plain_key
from ..peft_compat.peft_names import (
    check_target_module_exists,
    find_minimal_target_modules,
    include_all_linear_layers,
)
from .backends.quantized import find_backend
from .layer import GraftLayer, own_parameters

if TYPE_CHECKING:
    from .config import GraftConfig


def is_wrappable(module: nn.Module) -> bool:
    """Return whether a module is wrapped as one: only it owns parameters, no submodule; or it is an attention unit."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    inside = sum(1 for _ in module.parameters())
    return inside > 0 and inside == len(list(module.parameters(recurse=False)))


def reason_to_refuse(module: nn.Module) -> str | None:
    """Return the reason why a module cannot be patched, or None."""
    if parametrize.is_parametrized(module):
        return "its parameters are computed by a parametrization. Remove it with torch.nn.utils.parametrize"
    if not _runs(module):
        return "it has no forward of its own, so nothing tells when its parameters are read"
    if isinstance(module, nn.RNNBase):
        return "recurrent modules read flattened weights that a patch cannot shadow"
    if find_backend(module) is not None:
        return (
            "its weight is quantized, so that it differs from a donor's everywhere. Make the graft on the base in a "
            "float dtype, save it, and load it onto the quantized one"
        )
    frozen = [name for name, value in own_parameters(module).items() if not value.is_floating_point()]
    if frozen:
        return f"{frozen} hold no floating-point values (a quantized base?). Load the base in a float dtype"
    if not own_parameters(module):
        return "it owns no parameters. Name the modules inside of it"
    return None


def _runs(module: nn.Module) -> bool:
    """Return whether a module is ever called; containers such as ParameterList only hold what others read."""
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def _can_be_saved(module: nn.Module) -> bool:
    """Return whether PEFT can wrap a module as one to save: it runs, and all its parameters could train."""
    return _runs(module) and all(value.is_floating_point() or value.is_complex() for value in module.parameters())


def refuse(key: str, module: nn.Module) -> None:
    """Refuse a module that cannot be patched.

    Raises:
        ValueError: Names the module and says why.
    """
    reason = reason_to_refuse(module)
    if reason:
        raise ValueError(
            f"target_modules must name modules that own floating-point parameters, got {key!r} "
            f"({type(module).__name__}): {reason}, or leave it out with exclude_modules."
        )


def head_names(model: nn.Module) -> set[str]:
    """Find the names of a model's head: its output embeddings, and what lies outside of its backbone."""
    heads: set[str] = set()
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    prefix = getattr(model, "base_model_prefix", "")
    backbone = getattr(model, prefix, None) if prefix else None
    for key, module in model.named_modules():
        name = plain_key(f"{key}.")
        if output is not None and module is output:
            heads.add(key)
        elif backbone is not None and backbone is not model and key and not name.startswith(f"{prefix}."):
            heads.add(key)
    return heads


def default_targets(
    model: nn.Module, everything: bool, left_alone: Callable[[str], bool] = lambda key: False
) -> tuple[list[str], list[str], list[str]]:
    """Find the modules to graft when the user names none, or says `"all"`.

    Args:
        model: The base.
        everything: Take embeddings, the head and bare parameters of parent modules too.
        left_alone: Says of a module's name that the user has decided about it, so that no warning is due.

    Returns:
        Names of the modules to graft, names of all other modules, and names of bare parameters to graft.
    """
    heads = set() if everything else head_names(model)
    names: list[str] = []
    others: list[str] = []
    bare: list[str] = []
    skipped: list[str] = []
    units: list[str] = []
    for key, module in model.named_modules():
        inner = any(key.startswith(f"{unit}.") for unit in units)
        if inner or key.endswith(GRAFTED_PARAMETERS):
            others.append(key)
            continue
        if isinstance(module, GraftLayer | AuxiliaryTrainingWrapper):
            units.append(key)
        unit = module.get_base_layer() if isinstance(module, GraftLayer) else module
        if parametrize.is_parametrized(unit):
            units.append(key)
            others.append(key)
            skipped.append(key)
            continue
        if not key or isinstance(module, AuxiliaryTrainingWrapper) or not is_wrappable(unit):
            own = [f"{key}.{param}" for param in unit._parameters if unit._parameters[param] is not None]
            if everything and key and own and not isinstance(module, AuxiliaryTrainingWrapper):
                if _runs(unit):
                    bare.extend(own)
                else:
                    skipped.append(key)
            if key:
                others.append(key)
            continue
        units.append(key)
        if reason_to_refuse(unit):
            skipped.append(key)
        if key in heads or reason_to_refuse(unit) or (isinstance(unit, nn.Embedding) and not everything):
            others.append(key)
        else:
            names.append(key)
    if skipped := [key for key in skipped if not left_alone(key)]:
        whole = [key for key in skipped if _can_be_saved(model.get_submodule(key))]
        remedy = f" If they were fine-tuned, take them whole from the donor: modules_to_save={whole}." if whole else ""
        warnings.warn(f"Not grafted, because they cannot carry a patch: {skipped}.{remedy}", stacklevel=2)
    return names, others, bare


def resolve_targets(config: GraftConfig, model: nn.Module) -> GraftConfig:
    """Name the modules and bare parameters to graft, where the user names none or says `"all"`.

    Args:
        config: The adapter's config; `target_modules` and `target_parameters` are set.
        model: The base.

    Returns:
        The config.

    Raises:
        ValueError: No module can be grafted.
    """
    everything = config.target_modules == "all"
    if str(config.target_modules).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND and config.layers_to_transform is not None:
        # PEFT would name the modules in full and then not look at their layers.
        found = include_all_linear_layers(copy.copy(config), model).target_modules
        config.target_modules = {name for name in found if _is_wanted(config, name)}
    if not everything and (config.target_modules is not None or config.target_parameters is not None):
        return config
    names, others, bare = default_targets(model, everything, lambda key: is_left_alone(config, key))
    wanted = [name for name in names if _is_wanted(config, name)]
    bare = [name for name in bare if _is_wanted(config, name.rpartition(".")[0])]
    if not wanted and not bare:
        raise ValueError(
            "target_modules must match a module that owns parameters, got none in this model. "
            "Check exclude_modules and layers_to_transform, or use target_modules='all'."
        )
    config.target_modules = _shortened(wanted, others + [name for name in names if name not in wanted])
    if bare:
        config.target_parameters = sorted({*(config.target_parameters or []), *bare})
    return config


def _is_wanted(config: GraftConfig, key: str) -> bool:
    """Return whether `exclude_modules`, `modules_to_save` and `layers_to_transform` let a module be grafted."""
    probe = copy.copy(config)
    probe.target_modules = {key}
    if not check_target_module_exists(probe, key):
        return False
    probe.exclude_modules = None
    # PEFT does not look at the layers of a full match, only of a suffix.
    return bool(check_target_module_exists(probe, f".{key}"))


def is_left_alone(config: GraftConfig, key: str) -> bool:
    """Return whether `exclude_modules` or `modules_to_save` already says what becomes of a module."""
    probe = copy.copy(config)
    probe.target_modules, probe.layers_to_transform, probe.layers_pattern = {key}, None, None
    return not check_target_module_exists(probe, key)


def _shortened(names: list[str], others: list[str]) -> set[str] | str:
    """Find suffixes that match these modules and no others, or else build a regular expression."""
    short = find_minimal_target_modules(names, others) if names and others else set(names)

    def matches(key: str) -> bool:
        return key in short or any(key.endswith(f".{suffix}") for suffix in short)

    if all(matches(key) for key in names) and not any(matches(key) for key in others):
        return short
    return "|".join(re.escape(key) for key in names)
