"""Between the layers of a live adapter and the tensors of its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..patch import Fingerprint, Patch, PatchError, TensorPatch, file_key, parse_file_key
from .layer import GraftLayer

if TYPE_CHECKING:
    from .config import GraftConfig

_ROOT = "base_model.model."
_FSDP = "_fsdp_wrapped_module."


def _layers(model: nn.Module, adapter_name: str) -> dict[str, GraftLayer]:
    return {
        key.removeprefix(_FSDP): module
        for key, module in model.named_modules()
        if isinstance(module, GraftLayer) and adapter_name in module.graft_patch
    }


def _live_key(key: str, adapter_name: str, param: str, kind: str) -> str:
    return f"{key}.graft_patch.{adapter_name}.{param}_{kind}"


def _entries_of_base(layers: Mapping[str, GraftLayer], patch: Patch) -> dict[str, torch.Tensor] | None:
    """The base's values where the patch is, by tensor name; None while the base has no values (meta device)."""
    found = {}
    for name, part in patch.tensors.items():
        key, _, param_key = name.rpartition(".")
        layer = layers[key]
        param = next(param for param, known in layer.keys.items() if known == param_key)
        if layer.base_parameter(param).is_meta:
            return None
        found[layer.tensor_name(param)] = layer.base_entries(param, part.indices.to(layer.base_parameter(param).device))
    return found


def pack(
    model: nn.Module, config: GraftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Turn a live adapter into the tensors of its file, and record the base's fingerprint in its config.

    A learned mask is packed: only the entries it takes are written. During training under a Trainer the candidates
    and their logits are written instead, so that the checkpoint can be resumed.

    Args:
        model: The model that holds the adapter.
        config: The adapter's config; `fingerprint` and `entries` are set.
        adapter_name: Name of the adapter.
        state_dict: State dict of the model, gathered where it is sharded.

    Returns:
        Tensors by key, without the adapter's name.

    Raises:
        ValueError: The graft still waits for data.
    """
    layers = _layers(model, adapter_name)
    state = next(iter(layers.values())).states[adapter_name]
    if not state.ready and not state.in_training:
        raise ValueError(
            f"graft must be complete before it is saved, got selection={config.selection!r} and "
            f"alpha={config.alpha!r} that still wait for data. Call peft_graft.initialize_graft(model, dataloader)."
        )
    parts: dict[str, TensorPatch] = {}
    logits: dict[str, torch.Tensor] = {}
    names: dict[str, str] = {}
    for key, layer in layers.items():
        slot = layer.graft_patch[adapter_name]
        for param, param_key in layer.keys.items():
            if param_key not in slot.params:
                continue
            held = {
                kind: state_dict[live].detach().cpu()
                for kind in ("indices", "values", "logits")
                if (live := _live_key(key, adapter_name, param_key, kind)) in state_dict
            }
            name = f"{key}.{param_key}"
            parts[name] = TensorPatch(held["indices"].long(), held["values"])
            names[name] = layer.tensor_name(param)
            if "logits" in held:
                logits[name] = held["logits"]
    if logits and not state.in_training:
        masks = state.masks_of({names[name]: values for name, values in logits.items()})
        for name in logits:
            mask = masks[names[name]]
            parts[name] = TensorPatch(parts[name].indices[mask], parts[name].values[mask])
    patch = Patch({name: part for name, part in parts.items() if part.indices.numel()})
    base = _entries_of_base(layers, patch)
    if base is not None:
        config.fingerprint = Fingerprint.compute(base).to_dict()
    result = patch.to_tensors()
    if state.in_training:
        for name, values in logits.items():
            key, _, param_key = name.rpartition(".")
            result[file_key(key, param_key, "logits")] = values
            # The config of a checkpoint is not read when training resumes, so alpha travels with the logits.
            alpha = float(state.scale(names[name]))
            result[file_key(key, param_key, "alpha")] = torch.tensor([alpha], dtype=torch.float64)
    else:
        config.entries = patch.num_params
    return result


def unpack(
    model: nn.Module, config: GraftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check the tensors of a file against the model, and give every layer its entries.

    Args:
        model: The model that holds the (still empty) adapter.
        config: The adapter's config.
        adapter_name: Name of the adapter.
        state_dict: Tensors of the file.

    Returns:
        The tensors under the keys of the live model; keys that are not part of the patch pass through.

    Raises:
        PatchError: The file is malformed, names tensors that the model lacks, or belongs to another base.
    """
    layers = _layers(model, adapter_name)
    rooted = any(key.startswith(_ROOT) for key in layers)
    plain = {key.removeprefix(_ROOT): layer for key, layer in layers.items()}
    shapes = {
        f"{key}.{param_key}": tuple(layer.base_parameter(param).shape)
        for key, layer in plain.items()
        for param, param_key in layer.keys.items()
    }
    patch = Patch.from_tensors(state_dict, shapes)
    if not patch.tensors:
        raise PatchError("adapter must hold a patch, got no `graft_patch` tensors. Check that the file is a graft.")
    fresh = not any(layer.graft_patch[adapter_name].params for layer in layers.values())
    if fresh and config.fingerprint is not None:
        base = _entries_of_base(plain, patch)
        if base is not None:
            Fingerprint.from_dict(config.fingerprint).require(base, config.base_model_name_or_path)
    logits = _read_trained(state_dict, patch, "logits")
    alphas = _read_trained(state_dict, patch, "alpha")
    for layer in layers.values():
        if not fresh and not logits and config.selection == "learned" and layer.graft_patch[adapter_name].params:
            slot = layer.graft_patch[adapter_name]
            if any(slot.logits(param) is not None for param in slot.params):
                raise PatchError(
                    "checkpoint must hold mask logits to resume training, got a packed patch. "
                    "Resume from a checkpoint that a Trainer wrote during training."
                )
    for layer in layers.values():
        slot = layer.graft_patch[adapter_name]
        for param_key in list(slot.params):
            key = next(key for key, known in plain.items() if known is layer)
            if f"{key}.{param_key}" not in patch.tensors:
                slot.remove(param_key)
    result = {key: value for key, value in state_dict.items() if parse_file_key(key) is None}
    names: dict[str, str] = {}
    for name, part in patch.tensors.items():
        key, _, param_key = name.rpartition(".")
        layer = plain[key]
        param = next(param for param, known in layer.keys.items() if known == param_key)
        names[name] = layer.tensor_name(param)
        layer.install(adapter_name, param, part.indices, part.values, logits.get(name))
        slot, live = layer.graft_patch[adapter_name], f"{_ROOT}{key}" if rooted else key
        for kind in ("indices", "values", "logits"):
            held = getattr(slot, f"{param_key}_{kind}", None)
            if held is not None:
                result[_live_key(live, adapter_name, param_key, kind)] = held.detach()
    state = next(iter(layers.values())).states[adapter_name]
    state.ready = True
    if logits:
        state.budget = state.budget or config.entries
        if config.scope == "tensor" and config.density is not None:
            state.budget = {names[name]: round(config.density * math.prod(shapes[name])) for name in logits}
        by_tensor = {names[name]: float(value) for name, value in alphas.items()}
        state.alpha = next(iter(by_tensor.values())) if len({*by_tensor.values()}) == 1 else by_tensor
    elif isinstance(config.alpha, int | float | dict):
        state.alpha = config.alpha
    return result


def _read_trained(state_dict: Mapping[str, torch.Tensor], patch: Patch, kind: str) -> dict[str, torch.Tensor]:
    """Read what a training checkpoint holds beside the candidates: their logits, or each tensor's alpha."""
    found = {}
    for stored, values in state_dict.items():
        parsed = parse_file_key(stored)
        if parsed is None or parsed[2] != kind:
            continue
        name = f"{parsed[0]}.{parsed[1]}"
        part = patch.tensors.get(name)
        dtype, shape = (torch.float32, part and part.values.shape) if kind == "logits" else (torch.float64, (1,))
        if part is None or values.shape != shape or values.dtype != dtype or not values.isfinite().all():
            raise PatchError(
                f"{kind} must be finite {dtype} of shape {shape and tuple(shape)}, got {values.dtype} "
                f"{tuple(values.shape)} for {name!r}. The file is damaged."
            )
        found[name] = values
    return found
