"""Combine several live grafts into one: stitch their patches, and make the config of the new graft."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..patch.combine import apply_alpha, conflicts, stitch, stitch_problems
from ..patch.fingerprint import Fingerprint
from ..patch.patch import Patch
from .backends.quantized import require_float
from .build_patch import PatchBuilder
from .config import GraftConfig, GraftRecord
from .modules_to_save import choose_modules
from .parameter_hooks import ParameterHooks
from .state_dict import live_patch

# Fields of a source that the new graft records.
_ORIGIN = ("donor", "donor_revision", "donor_subfolder", "selection", "alpha")
# Where the scaled deltas of two adapters differ by more than this factor, the larger one drowns the other.
_MAX_RATIO = 4.0
_LOG = logging.getLogger(__name__)


def read_patch(tuner: PatchBuilder, adapter_name: str, with_alpha: bool) -> Patch:
    """Read the patch of an adapter (see `GraftModel.patch`)."""
    if adapter_name not in tuner.peft_config:
        raise ValueError(
            f"adapter_name must be a loaded graft, got {adapter_name!r}. Loaded are {sorted(tuner.peft_config)}."
        )
    patch = live_patch(tuner.model, adapter_name)
    return (
        apply_alpha(patch, _alphas(tuner, adapter_name, patch), _base(tuner, [adapter_name])) if with_alpha else patch
    )


def combine(
    tuner: PatchBuilder,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    modules_to_save_from: str | None,
    base: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[GraftConfig, Patch, dict[str, str]]:
    """Stitch the patches of adapters, as they stand in the model (see `GraftModel.add_weighted_adapter`).

    Args:
        tuner: The model that holds the adapters.
        adapters: Their names.
        weights: One for each.
        adapter_name: Name of the new adapter.
        combination_type: A name in `COMBINATIONS`.
        modules_to_save_from: The adapter whose modules to save to take.
        base: Function from a tensor's name and flat indices to the base's values; by default reads the model.

    Returns:
        The new adapter's config, its patch, and the adapter to copy each module to save from, by the module's key.

    Raises:
        ValueError: Arguments are wrong, all of which the message names; or nothing is left of the patches.
        PatchError: Values overflow.
    """
    sources, apart = choose_modules(tuner.model, adapters, modules_to_save_from)
    problems = [
        *_problems(tuner, adapters, adapter_name),
        *stitch_problems(len(adapters), weights, combination_type),
        *module_problems(adapters, modules_to_save_from, apart),
    ]
    if problems:
        raise ValueError(" ".join(problems))
    patches = [live_patch(tuner.model, name) for name in adapters]
    scaled = [
        {name: weight * alpha for name, alpha in _alphas(tuner, adapter, patch).items()}
        for adapter, weight, patch in zip(adapters, weights, patches, strict=True)
    ]
    require_float(tuner._layers(), "combined")
    base = base or _base(tuner, adapters)
    if note := _unequal_note(adapters, weights, [_norm(*each, base) for each in zip(patches, scaled, strict=True)]):
        _LOG.warning(note)
    patch = stitch(patches, scaled, combination_type, base=base)
    if not patch.num_params:
        raise ValueError(
            f"combination must leave at least one entry, got none of {[one.num_params for one in patches]} with "
            f"combination_type={combination_type!r}. Choose another type."
        )
    config = _config(tuner, adapters, patch)
    fingerprint = Fingerprint.compute({name: base(name, part.indices) for name, part in patch.plain.items()})
    records = [record for name in adapters if (record := tuner.peft_config[name].record)]
    first = tuner.peft_config[adapters[0]].record
    config.note(
        fingerprint=fingerprint.to_dict(),
        base_subfolder=first.base_subfolder if first else None,
        hub_ids={name: found for record in records for name, found in (record.hub_ids or {}).items()},
        provenance={
            "combination_type": combination_type,
            "adapters": _origins(tuner, adapters, weights, patches),
            "conflicts": sum(conflicts(patches).values()),
            "modules_to_save_from": modules_to_save_from,
        },
    )
    return config, patch, sources


def _norm(patch: Patch, scales: Mapping[str, Any], base: Callable[[str, torch.Tensor], torch.Tensor]) -> float:
    """Return the norm of what a patch adds to the base: ||scale * mask * delta||."""
    parts = (
        float(scales[name]) * float((part.values.float() - base(name, part.indices).float()).norm())
        for name, part in patch.plain.items()
    )
    return math.hypot(*parts)


def _unequal_note(adapters: Sequence[str], weights: Sequence[float], norms: Sequence[float]) -> str | None:
    """Return a line where one adapter is so much larger than another that the sum behaves like it alone."""
    found = {name: norm for name, norm in zip(adapters, norms, strict=True) if norm}
    if len(found) < 2 or max(found.values()) <= _MAX_RATIO * min(found.values()):
        return None
    target = math.exp(math.fsum(map(math.log, found.values())) / len(found))
    even = [round(weight * target / norm, 3) if norm else weight for weight, norm in zip(weights, norms, strict=True)]
    listed = ", ".join(f"{name} {norm:.3g}" for name, norm in found.items())
    return (
        f"adapters should add about as much each, got norms of alpha * weight * delta of {listed}: the largest decides "
        f"where they differ. weights={even} would make them equal."
    )


def _origins(
    tuner: PatchBuilder, adapters: Sequence[str], weights: Sequence[float], patches: Sequence[Patch]
) -> list[dict[str, Any]]:
    """Return the record of the adapters that a new graft combines."""
    return [
        {
            "name": name,
            "weight": float(weight),
            "entries": one.num_params,
            **{key: value for key, value in tuner.peft_config[name].to_dict().items() if key in _ORIGIN},
            "provenance": tuner.peft_config[name].record.provenance if tuner.peft_config[name].record else None,
        }
        for name, weight, one in zip(adapters, weights, patches, strict=True)
    ]


def _config(tuner: PatchBuilder, adapters: Sequence[str], patch: Patch) -> GraftConfig:
    """Make the config of a graft that needs no donor and targets the tensors of all adapters."""
    first = tuner.peft_config[adapters[0]]
    targets = {name: target for adapter in adapters for name, target in tuner.targets(adapter).items()}
    bare = sorted(name for name, (layer, _) in targets.items() if isinstance(layer, ParameterHooks))
    modules = {layer.tensor_prefix for layer, _ in targets.values() if not isinstance(layer, ParameterHooks)}
    rules = {tuner.peft_config[adapter].selection for adapter in adapters}
    saved = [name for adapter in adapters for name in tuner.peft_config[adapter].modules_to_save or []]
    return GraftConfig(
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        auto_mapping=first.auto_mapping,
        inference_mode=first.inference_mode,
        selection=rules.pop() if len(rules) == 1 else GraftConfig.selection,
        target_modules=modules or None,
        target_parameters=bare or None,
        modules_to_save=list(dict.fromkeys(saved)) or None,
        record=GraftRecord(
            eligible=sum(layer.base_parameter(param).numel() for layer, param in targets.values()),
            entries=patch.num_params,
        ),
    )


def _alphas(tuner: PatchBuilder, adapter_name: str, patch: Patch) -> dict[str, Any]:
    return {name: tuner.states[adapter_name].scale(name) for name in patch.tensors}


def _base(tuner: PatchBuilder, adapters: Sequence[str]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Read the base's own entries, on the CPU, also while something is merged."""
    targets = {name: target for adapter in adapters for name, target in tuner.targets(adapter).items()}

    def read(name: str, indices: torch.Tensor) -> torch.Tensor:
        layer, param = targets[name]
        return layer.base_entries(param, indices.to(layer.base_parameter(param).device)).cpu()

    return read


def _problems(tuner: PatchBuilder, adapters: Sequence[str], adapter_name: str) -> Iterator[str]:
    loaded = sorted(tuner.peft_config)
    if not adapters:
        yield f"adapters must be at least one, got none. Loaded are {loaded}."
    if unknown := [name for name in adapters if name not in tuner.peft_config]:
        yield f"adapters must be loaded grafts, got {unknown}. Loaded are {loaded}."
    if waiting := [name for name in adapters if name in tuner.peft_config and not tuner.states[name].ready]:
        yield f"adapters must be complete, got {waiting} that wait for data or for a file. Call initialize_graft first."
    if adapter_name in tuner.peft_config:
        yield f"adapter_name must be a new one, got {adapter_name!r}. Delete that adapter, or choose another name."


def module_problems(adapters: Sequence[str], chosen: str | None, apart: Sequence[str]) -> Iterator[str]:
    """Yield a message for each mistake in the choice of modules to save, where those named in `apart` differ."""
    if chosen is not None and chosen not in adapters:
        yield f"modules_to_save_from must be one of the adapters, got {chosen!r}. Choose from {list(adapters)}."
    elif apart:
        yield (
            f"modules_to_save must be the same in all adapters, got different {list(apart)}. "
            "Choose an adapter with modules_to_save_from."
        )
