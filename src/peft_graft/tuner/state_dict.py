"""Between the layers of a live adapter and the tensors of its file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..patch.patch import Fingerprint, Patch, PatchError, TensorPatch, file_key, parse_file_key
from ..peft_compat.torch_names import FSDP_WRAPPED
from .backends.sharded import GATHER, is_sharded, whole, whole_shape
from .layer import GraftLayer
from .mask import GraftState, Slot
from .modules_to_save import require_whole_heads
from .trainer import is_trainer_checkpoint

if TYPE_CHECKING:
    from .config import GraftConfig

_ROOT = "base_model.model."
_FSDP = f"{FSDP_WRAPPED}."


class _Place(NamedTuple):
    """Where the patch of a tensor lives: the layer that owns it, its parameter, and the layer's key in the model."""

    layer: GraftLayer
    param: str
    key: str

    @property
    def tensor_name(self) -> str:
        return self.layer.tensor_name(self.param)

    def slot(self, adapter_name: str) -> Slot:
        return self.layer.slot(adapter_name)

    def live_key(self, adapter_name: str, kind: str) -> str:
        return f"{self.key}.graft_patch.{adapter_name}.{self.layer.keys[self.param]}_{kind}"


def _places(model: nn.Module, adapter_name: str) -> dict[str, _Place]:
    """What an adapter may patch, by tensor name; a tied tensor is found under each of its names."""
    modules = ((module, key.removeprefix(_FSDP)) for key, module in model.named_modules())
    layers = {module: key for module, key in modules if isinstance(module, GraftLayer)}
    holders = [(layer, param, layer.aliases.get(param, (layer, param))) for layer in layers for param in layer.keys]
    wanted = {owner for layer, _, owner in holders if adapter_name in layer.graft_patch}
    return {
        layer.tensor_name(param): _Place(*owner, layers[owner[0]]) for layer, param, owner in holders if owner in wanted
    }


def _base_entries(places: Mapping[str, _Place], patch: Patch) -> dict[str, torch.Tensor] | None:
    """The base's values where the patch is, by tensor name; None while the base has no values (meta device)."""
    found = {}
    for name, part in patch.tensors.items():
        layer, param, _ = places[name]
        if layer.base_parameter(param).is_meta:
            return None
        found[name] = layer.base_entries(param, part.indices.to(layer.base_parameter(param).device))
    return found


def _owners(model: nn.Module, adapter_name: str) -> dict[str, _Place]:
    """What an adapter may patch, by the owner's name, which stands for all names of a tied tensor."""
    return {name: place for name, place in _places(model, adapter_name).items() if name == place.tensor_name}


def _state(places: Mapping[str, _Place], adapter_name: str) -> GraftState:
    return next(iter(places.values())).layer.states[adapter_name]


def _held(
    places: Mapping[str, _Place], adapter_name: str, state_dict: Mapping[str, torch.Tensor], gather: bool = False
) -> tuple[dict[str, TensorPatch], dict[str, torch.Tensor] | None]:
    """All entries that an adapter holds, and the logits of a learned mask, on the CPU by tensor name.

    No logits where only shards of them are at hand, unless every rank calls this together, to `gather` them.
    """
    parts: dict[str, TensorPatch] = {}
    logits: dict[str, torch.Tensor] | None = {}
    for name, place in places.items():
        if place.layer.keys[place.param] not in place.slot(adapter_name).params:
            continue
        indices, values = (state_dict[place.live_key(adapter_name, kind)] for kind in ("indices", "values"))
        parts[name] = TensorPatch(indices.detach().cpu().long(), values.detach().cpu())
        if place.slot(adapter_name).logits(place.layer.keys[place.param]) is None or logits is None:
            continue
        given = state_dict.get(place.live_key(adapter_name, "logits"))
        if gather and given is not None:
            given = whole(given)
        if given is None or is_sharded(given) or given.shape != indices.shape:
            logits = None
        else:
            logits[name] = given.detach().cpu().float()
    return parts, logits


def _masks(logits: dict[str, torch.Tensor] | None, state: GraftState) -> Mapping[str, torch.Tensor]:
    """Which of the entries a learned mask takes, on the CPU by tensor name; nothing for other patches.

    Raises:
        ValueError: Only shards of the logits are at hand.
    """
    masks = state.settled_masks() if logits is None else state.masks_of(logits) if logits else {}
    if masks is None:
        raise _only_shards()
    return {name: mask.cpu() for name, mask in masks.items()}


def _only_shards() -> ValueError:
    return ValueError(f"mask logits must be whole to be saved, got shards. {GATHER}")


def _taken(parts: Mapping[str, TensorPatch], masks: Mapping[str, torch.Tensor]) -> dict[str, TensorPatch]:
    taken = {name: TensorPatch(parts[name].indices[mask], parts[name].values[mask]) for name, mask in masks.items()}
    return {name: part for name, part in {**parts, **taken}.items() if part.indices.numel()}


def live_patch(model: nn.Module, adapter_name: str) -> Patch:
    """Read the patch of a live adapter: its exact mask, and the donor's values, whatever alpha is.

    Args:
        model: The model that holds the adapter.
        adapter_name: Name of the adapter.

    Returns:
        The patch on the CPU, with the shapes of all tensors that the adapter may patch.

    Raises:
        RuntimeError: The adapter's file is still to be loaded.
        ValueError: The graft still waits for data.
    """
    places = _owners(model, adapter_name)
    state = _state(places, adapter_name)
    if state.awaits_file:
        state.check(adapter_name)
    state.require_ready("read")
    live = {
        place.live_key(adapter_name, kind): tensor
        for place in places.values()
        for kind, tensor in place.slot(adapter_name).tensors(place.layer.keys[place.param]).items()
    }
    shapes = {name: whole_shape(layer.base_parameter(param)) for name, (layer, param, _) in places.items()}
    parts, logits = _held(places, adapter_name, live)
    return Patch(_taken(parts, _masks(logits, state)), shapes)


def _quantized(places: Mapping[str, _Place], patch: Patch) -> set[str]:
    """Names of the patched tensors of which only rounded values are left."""
    layers = {name: places[name].layer for name in patch.tensors if places[name].param == "weight"}
    return {name for name, layer in layers.items() if layer.quantization_backend is not None}


def _fingerprint(
    places: Mapping[str, _Place], patch: Patch, state: GraftState, masks: Mapping[str, torch.Tensor]
) -> dict[str, Any] | None:
    """Fingerprint of the base; None while it cannot be known, or is known already, as on a quantized base.

    Raises:
        ValueError: The base is sharded, and its values have not been noted.
    """
    if _quantized(places, patch):
        return None
    sharded = [name for name in patch.tensors if is_sharded(places[name].layer.base_parameter(places[name].param))]
    noted = {name: values for name in patch.tensors if (values := state.base_values(name)) is not None}
    if not sharded:
        base = _base_entries(places, patch)
    elif len(noted) == len(patch.tensors):
        base = {
            name: values[masks[name].to(values.device)] if name in masks else values for name, values in noted.items()
        }
    elif not state.config.is_pretrained:
        raise ValueError(
            f"base must be whole to be told by its values, got shards of {sharded[:3]}. "
            "Save before the model is sharded."
        )
    else:
        return None
    return None if base is None else Fingerprint.compute(base).to_dict()


def pack(
    model: nn.Module, config: GraftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Turn a live adapter into the tensors of its file, and record the base's fingerprint in its config.

    A learned mask is packed: only the entries it takes are written. During training under a Trainer the candidates,
    their logits and alpha are written instead, so that the checkpoint can be resumed.

    Args:
        model: The model that holds the adapter.
        config: The adapter's config; its record gets the fingerprint and the number of entries.
        adapter_name: Name of the adapter.
        state_dict: State dict of the model, gathered where it is sharded.

    Returns:
        Tensors by key, without the adapter's name.

    Raises:
        ValueError: The graft still waits for data, or only shards of it are at hand.
    """
    places = _owners(model, adapter_name)
    state = _state(places, adapter_name)
    goes_on = bool(state.logits()) and is_trainer_checkpoint(model)
    if not goes_on:
        state.require_ready("saved")
    root = _ROOT if any(place.key.startswith(_ROOT) for place in places.values()) else ""
    if state.packed is not None:
        return {f"{root}{key}": value for key, value in state.packed.items()}
    if not goes_on:
        require_whole_heads(model, adapter_name, state_dict)
    parts, logits = _held(places, adapter_name, state_dict, gather=goes_on)
    if goes_on and logits is None:
        raise _only_shards()
    masks = {} if goes_on else _masks(logits, state)
    patch = Patch(_taken(parts, masks))
    fingerprint = _fingerprint(places, patch, state, masks)
    if fingerprint is not None:
        config.note(fingerprint=fingerprint)
    result = patch.to_tensors()
    if not goes_on:
        config.note(entries=patch.num_params)
    for name, values in (logits or {}).items() if goes_on else ():
        result[_file_key(name, "logits")] = values
        if config.alpha != "auto":
            # The config of a checkpoint is not read when training resumes, so alpha travels with the logits.
            result[_file_key(name, "alpha")] = torch.tensor([state.scale(name)], dtype=torch.float64)
    return {f"{root}{key}": value for key, value in result.items()}


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
    places = _places(model, adapter_name)
    shapes = {name: whole_shape(layer.base_parameter(param)) for name, (layer, param, _) in places.items()}
    patch = Patch.from_tensors(state_dict, shapes)
    if not patch.tensors:
        raise PatchError("adapter must hold a patch, got no `graft_patch` tensors. Check that the file is a graft.")
    patched = {(places[name].layer, places[name].param) for name in patch.tensors}
    if len(patched) < len(patch.tensors):
        raise PatchError(f"tied tensors must be patched once, got {sorted(patch.tensors)}. The file is damaged.")
    layers = {place.layer for place in places.values()}
    state = next(iter(layers)).states[adapter_name]
    held = {layer: layer.slot(adapter_name) for layer in layers if adapter_name in layer.graft_patch}
    fresh = not any(slot.params for slot in held.values())
    if fresh and config.record is not None and config.record.fingerprint is not None:
        base = _base_entries(places, patch)
        if base is not None:
            fingerprint = Fingerprint.from_dict(config.record.fingerprint)
            fingerprint.require(base, config.base_model_name_or_path, _quantized(places, patch))
    logits, alphas = (_read_trained(state_dict, patch, kind) for kind in ("logits", "alpha"))
    if state.logits() and not logits and not config.inference_mode:
        raise PatchError(
            "checkpoint must hold mask logits to resume training, got a packed patch. Resume from a checkpoint that "
            "a Trainer wrote during training, or set inference_mode=True in the config to use the patch as it is."
        )
    for layer in held:
        layer.clear(adapter_name, [param for param in layer.keys if (layer, param) not in patched])
    result = {key: value for key, value in state_dict.items() if parse_file_key(key) is None}
    for name, part in patch.tensors.items():
        place = places[name]
        if adapter_name not in place.layer.graft_patch:
            place.layer.add_slot(adapter_name, [place.param])
        place.layer.install(adapter_name, place.param, part.indices, part.values, logits.get(name))
        slot, param_key = place.slot(adapter_name), place.layer.keys[place.param]
        for kind, live in slot.tensors(param_key).items():
            result[place.live_key(adapter_name, kind)] = live.detach()
    if logits:
        if config.budget_scope == "tensor" and config.density is not None:
            sizes = {places[name].tensor_name: math.prod(shapes[name]) for name in logits}
            state.budget = {name: round(config.density * size) for name, size in sizes.items()}
        else:
            state.budget = config.record.entries if config.record else None
    if alphas:
        by_tensor = {places[name].tensor_name: alphas[name].item() for name in alphas}
        config.alpha = by_tensor if len({*by_tensor.values()}) > 1 else next(iter(by_tensor.values()))
    state.awaits_file = False
    state.ready = config.alpha != "auto"
    return result


def _file_key(name: str, kind: str) -> str:
    module, _, param = name.rpartition(".")
    return file_key(module, param, kind)


def _read_trained(state_dict: Mapping[str, torch.Tensor], patch: Patch, kind: str) -> dict[str, torch.Tensor]:
    """Read what a training checkpoint holds beside the candidates: their logits, or each tensor's alpha."""
    found = {}
    for stored, values in state_dict.items():
        parsed = parse_file_key(stored)
        if parsed is None or parsed[2] != kind:
            continue
        name = ".".join(part for part in parsed[:2] if part)
        part = patch.tensors.get(name)
        dtype, shape = (torch.float32, part and part.values.shape) if kind == "logits" else (torch.float64, (1,))
        if part is None or values.shape != shape or values.dtype != dtype or not values.isfinite().all():
            raise PatchError(
                f"{kind} must be finite {dtype} of shape {shape and tuple(shape)}, got {values.dtype} "
                f"{tuple(values.shape)} for {name!r}. The file is damaged."
            )
        found[name] = values
    return found
