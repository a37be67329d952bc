"""Turn the layers of a live adapter into the tensors of its file, and back."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from ..patch.patch import Fingerprint, Patch, PatchError, TensorPatch, file_key, parse_file_key, require_rows
from ..patch.step_tensor import StepTensor
from ..patch.value_codes import CodedTensor, CodeLoss, ScaledTensor
from ..peft_compat.torch_names import FSDP_WRAPPED
from .backends.sharded import GATHER, is_sharded, whole, whole_shape
from .build_patch import encode_parts, note_loss
from .layer import GraftLayer
from .mask import GraftState, Slot
from .modules_to_save import require_whole_modules
from .trainer import is_trainer_checkpoint

if TYPE_CHECKING:
    from .config import GraftConfig

_ROOT = "base_model.model."
_FSDP = f"{FSDP_WRAPPED}."
_WRAPPED = re.compile(r"\.(original_module|base_layer|modules_to_save\.[^.]+)(?=\.)")


class _Place(NamedTuple):
    """The place of a tensor's patch: the layer that owns it, its parameter, and the layer's key in the model."""

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

    def live(self, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that an adapter holds here, by their keys in the live model."""
        for kind, tensor in self.slot(adapter_name).tensors(self.layer.keys[self.param]).items():
            yield self.live_key(adapter_name, kind), tensor.detach()


def _places(model: nn.Module, adapter_name: str) -> dict[str, _Place]:
    """Find what an adapter may patch, by tensor name; a tied tensor is found under each of its names."""
    modules = ((module, key.removeprefix(_FSDP)) for key, module in model.named_modules())
    layers = {module: key for module, key in modules if isinstance(module, GraftLayer)}
    holders = [(layer, param, layer.aliases.get(param, (layer, param))) for layer in layers for param in layer.keys]
    wanted = {owner for layer, _, owner in holders if adapter_name in layer.graft_patch}
    return {
        layer.tensor_name(param): _Place(*owner, layers[owner[0]]) for layer, param, owner in holders if owner in wanted
    }


def _shapes(places: Mapping[str, _Place]) -> dict[str, tuple[int, ...]]:
    return {name: whole_shape(layer.base_parameter(param)) for name, (layer, param, _) in places.items()}


def _base_entries(places: Mapping[str, _Place], patch: Patch) -> dict[str, torch.Tensor] | None:
    """Read the base's values where the patch is, by tensor name; None while the base has none (meta device)."""
    found = {}
    for name, part in patch.tensors.items():
        layer, param, _ = places[name]
        if layer.base_parameter(param).is_meta:
            return None
        if part.indices is None:
            found[name] = layer.own_values(param).flatten()
        else:
            found[name] = layer.base_entries(param, part.indices.to(layer.base_parameter(param).device))
    return found


def _decoded(places: Mapping[str, _Place], part: TensorPatch | CodedTensor, name: str) -> TensorPatch:
    """Compute the values of a tensor's patch for which the base may be needed.

    Raises:
        PatchError: The base is needed and has no values yet.
    """
    if isinstance(part, TensorPatch):
        return part
    layer, param, _ = places[name]
    if layer.base_parameter(param).is_meta:
        raise PatchError(
            f"base must have values before a patch in the code {part.code!r} is read, got {name!r} on the meta device. "
            "Load the base without low_cpu_mem_usage=True or init_empty_weights."
        )
    return part.decode(layer.own_values(param), name)


def _owners(model: nn.Module, adapter_name: str) -> dict[str, _Place]:
    """Find what an adapter may patch, by the owner's name, which stands for all names of a tied tensor."""
    return {name: place for name, place in _places(model, adapter_name).items() if name == place.tensor_name}


def _state(places: Mapping[str, _Place], adapter_name: str) -> GraftState:
    return next(iter(places.values())).layer.states[adapter_name]


def _held(
    places: Mapping[str, _Place], adapter_name: str, state_dict: Mapping[str, torch.Tensor], gather: bool = False
) -> tuple[dict[str, TensorPatch | ScaledTensor], dict[str, torch.Tensor] | None]:
    """Collect all entries that an adapter holds, and the logits of a learned mask, on the CPU by tensor name.

    There are no logits where only shards of them are at hand, unless every rank calls this together to `gather` them.
    """
    parts: dict[str, TensorPatch | ScaledTensor] = {}
    logits: dict[str, torch.Tensor] | None = {}
    for name, place in places.items():
        if place.layer.keys[place.param] not in place.slot(adapter_name).params:
            continue
        parts[name] = _held_part(place, adapter_name, state_dict)
        if place.slot(adapter_name).logits(place.layer.keys[place.param]) is None or logits is None:
            continue
        given = state_dict.get(place.live_key(adapter_name, "logits"))
        if gather and given is not None:
            given = whole(given)
        if given is None or is_sharded(given) or given.numel() != parts[name].count:
            logits = None
        else:
            logits[name] = given.detach().cpu().float()
    return parts, logits


def _held_part(place: _Place, adapter_name: str, state_dict: Mapping[str, torch.Tensor]) -> TensorPatch | ScaledTensor:
    def held(kind: str) -> torch.Tensor:
        return state_dict[place.live_key(adapter_name, kind)].detach().cpu()

    indices, code = held("indices").long(), place.slot(adapter_name).codes.get(place.layer.keys[place.param])
    if code is None:
        return TensorPatch(indices, held("values"))
    return ScaledTensor(indices, held("levels"), held("scales"), code)


def _masks(logits: dict[str, torch.Tensor] | None, state: GraftState) -> Mapping[str, torch.Tensor]:
    """Compute the exact masks of a learned mask, on the CPU by tensor name; other patches have none.

    Raises:
        ValueError: Only shards of the logits are at hand.
    """
    masks = state.settled_masks() if logits is None else state.masks_of(logits) if logits else {}
    if masks is None:
        raise _only_shards()
    return {name: mask.cpu() for name, mask in masks.items()}


def _only_shards() -> ValueError:
    return ValueError(f"mask logits must be whole to be saved, got shards. {GATHER}")


def _taken(
    parts: Mapping[str, TensorPatch | ScaledTensor], masks: Mapping[str, torch.Tensor], state: GraftState
) -> tuple[dict[str, TensorPatch | ScaledTensor], dict[str, CodeLoss]]:
    """Take the entries of the exact masks, in the code that the masks were trained with.

    Returns:
        The entries, and what the code loses of those that are encoded here, by tensor name.
    """
    taken = {
        name: TensorPatch(part.indices[mask], part.values[mask])
        for name, mask in masks.items()
        if isinstance(part := parts[name], TensorPatch) and mask.any()
    }
    encoded: Mapping[str, TensorPatch | ScaledTensor] = taken
    losses: dict[str, CodeLoss] = {}
    if state.value_code is not None:
        base = {name: values.cpu()[masks[name]] for name in taken if (values := state.base_values(name)) is not None}
        encoded, losses = encode_parts(taken, base.__getitem__, state.value_code)
    rest = {name: part for name, part in parts.items() if name not in masks and part.count}
    return {**rest, **encoded}, losses


def _coded(place: _Place, adapter_name: str, part: TensorPatch | CodedTensor) -> TensorPatch | CodedTensor:
    """Return a tensor's patch as its file shall hold it: as steps again, where it was read from such."""
    parameter = place.layer.base_parameter(place.param)
    if not isinstance(part, TensorPatch) or is_sharded(parameter) or parameter.dtype != part.values.dtype:
        return part
    if place.layer.keys[place.param] not in place.slot(adapter_name).in_steps or parameter.is_meta:
        return part
    base = place.layer.own_values(place.param).detach().cpu().flatten()
    return StepTensor.encode(base, base.index_copy(0, part.indices, part.values))


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
    live = {key: tensor for place in places.values() for key, tensor in place.live(adapter_name)}
    parts, logits = _held(places, adapter_name, live)
    taken, _ = _taken(parts, _masks(logits, state), state)
    return Patch({name: _decoded(places, part, name) for name, part in taken.items()}, _shapes(places))


def _quantized(places: Mapping[str, _Place], patch: Patch) -> set[str]:
    """Find the names of the patched tensors of which only rounded values are left."""
    layers = {name: places[name].layer for name in patch.tensors if places[name].param == "weight"}
    return {name for name, layer in layers.items() if layer.quantization_backend is not None}


def _record_fingerprint(
    config: GraftConfig,
    places: Mapping[str, _Place],
    patch: Patch,
    state: GraftState,
    masks: Mapping[str, torch.Tensor],
) -> None:
    """Record the fingerprint of the base, unless it cannot be known, or is known already, as on a quantized base.

    Raises:
        ValueError: The base is sharded, and its values have not been noted.
    """
    if _quantized(places, patch):
        return
    sharded = [name for name in patch.tensors if is_sharded(places[name].layer.base_parameter(places[name].param))]
    noted = {name: values for name in patch.tensors if (values := state.base_values(name)) is not None}
    if not sharded:
        base = _base_entries(places, patch)
    elif len(noted) == len(patch.tensors):
        base = {
            name: values[masks[name].to(values.device)] if name in masks else values for name, values in noted.items()
        }
    elif config.is_pretrained:
        return
    else:
        raise ValueError(
            f"base must be whole to be told by its values, got shards of {sharded[:3]}. "
            "Save before the model is sharded."
        )
    if base is not None:
        config.note(fingerprint=Fingerprint.compute(base).to_dict())


def pack(
    model: nn.Module, config: GraftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Turn a live adapter into the tensors of its file, and record the base's fingerprint in its config.

    A learned mask is packed: only the entries it takes are written. Where a Trainer writes a checkpoint, the
    candidates, their logits and alpha are written instead, so that it can be resumed.

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
    root = _ROOT if any(place.key.startswith(_ROOT) for place in places.values()) else ""
    result: dict[str, torch.Tensor] | None
    if state.logits() and is_trainer_checkpoint(model):
        result = _pack_checkpoint(places, config, adapter_name, state_dict)
    else:
        state.require_ready("saved")
        result = state.packed
    if result is None:
        require_whole_modules(model, adapter_name, state_dict)
        parts, logits = _held(places, adapter_name, state_dict)
        masks = _masks(logits, state)
        taken, losses = _taken(parts, masks, state)
        patch = Patch({name: _coded(places[name], adapter_name, part) for name, part in taken.items()})
        if losses and state.value_code is not None:
            note_loss(config, losses, state.value_code)
        _record_fingerprint(config, places, patch, state, masks)
        config.note(entries=patch.num_params)
        result = patch.to_tensors()
    return {f"{root}{key}": value for key, value in result.items()}


def _pack_checkpoint(
    places: Mapping[str, _Place], config: GraftConfig, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return all candidates of a learned mask, their logits and alpha, as tensors of a file."""
    state = _state(places, adapter_name)
    parts, logits = _held(places, adapter_name, state_dict, gather=True)
    if logits is None:
        raise _only_shards()
    patch = Patch({name: part for name, part in parts.items() if part.count})
    _record_fingerprint(config, places, patch, state, {})
    result = patch.to_tensors()
    for name, values in logits.items():
        result[_file_key(name, "logits")] = values
        if config.alpha != "auto":
            # The config of a checkpoint is not read when training resumes, so alpha travels with the logits.
            result[_file_key(name, "alpha")] = torch.tensor([state.scale(name)], dtype=torch.float64)
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
    _require_rows(model, state_dict)
    places = _places(model, adapter_name)
    patch = Patch.from_tensors(state_dict, _shapes(places))
    _require_tensors(places, patch)
    logits, alphas = (_read_trained(state_dict, patch, kind) for kind in ("logits", "alpha"))
    state = _state(places, adapter_name)
    slots = {place.layer.slots.get(adapter_name) for place in places.values()}
    if not any(slot.params for slot in slots if slot is not None):
        _require_base(config, places, patch)
    if state.logits() and not logits and not config.inference_mode:
        raise PatchError(
            "checkpoint must hold mask logits to resume training, got a packed patch. Resume from a checkpoint that "
            "a Trainer wrote during training, or set inference_mode=True in the config to use the patch as it is."
        )
    _install(places, adapter_name, patch, logits)
    if logits:
        state.budget = _budget(config, places, logits)
    if alphas:
        by_tensor = {places[name].tensor_name: alphas[name].item() for name in alphas}
        config.alpha = by_tensor if len({*by_tensor.values()}) > 1 else next(iter(by_tensor.values()))
    state.awaits_file = False
    state.ready = config.alpha != "auto"
    live = {key: value for place in map(places.__getitem__, patch.tensors) for key, value in place.live(adapter_name)}
    return {key: value for key, value in state_dict.items() if parse_file_key(key) is None} | live


def install_patch(model: nn.Module, config: GraftConfig, adapter_name: str, patch: Patch) -> None:
    """Give the layers of an adapter the entries of a patch that is in memory.

    Args:
        model: The model that holds the adapter, which was made for this base.
        config: The adapter's config.
        adapter_name: Name of the adapter.
        patch: The patch; its tensors are copied.

    Raises:
        PatchError: The patch is malformed, or names tensors that the model lacks.
    """
    places = _places(model, adapter_name)
    Patch(patch.tensors, _shapes(places)).validate()
    _require_tensors(places, patch)
    copies = {name: copy.deepcopy(part) for name, part in patch.tensors.items()}
    _install(places, adapter_name, Patch(copies), {})
    state = _state(places, adapter_name)
    state.awaits_file = False
    state.ready = config.alpha != "auto"


def _require_rows(model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors stored whole (modules to save, resized embeddings) that have another number of rows than here."""
    held = {name: tuple(value.shape) for name, value in model.named_parameters() if not is_sharded(value)}
    stored = {key: tuple(value.shape) for key, value in state_dict.items() if key in held}
    outer = {key: _WRAPPED.sub("", key.removeprefix(_ROOT)) for key in stored}
    require_rows({outer[key]: shape for key, shape in stored.items()}, {outer[key]: held[key] for key in stored})


def _require_tensors(places: Mapping[str, _Place], patch: Patch) -> None:
    """Refuse a patch without tensors, or with several for one parameter."""
    if not patch.tensors:
        raise PatchError("adapter must hold a patch, got no `graft_patch` tensors. Check that the file is a graft.")
    if len({(places[name].layer, places[name].param) for name in patch.tensors}) < len(patch.tensors):
        raise PatchError(f"tied tensors must be patched once, got {sorted(patch.tensors)}. The file is damaged.")


def _install(places: Mapping[str, _Place], adapter_name: str, patch: Patch, logits: Mapping[str, torch.Tensor]) -> None:
    """Put the entries of a patch into the layers, and take all others away."""
    patched = {(places[name].layer, places[name].param) for name in patch.tensors}
    for layer in {place.layer for place in places.values()}:
        layer.clear(adapter_name, [param for param in layer.keys if (layer, param) not in patched])
    for name, part in patch.tensors.items():
        layer, param, _ = places[name]
        if adapter_name not in layer.graft_patch:
            layer.add_slot(adapter_name, [param])
        # Levels and scales are decoded when the layer runs; other codes now.
        known = part if isinstance(part, TensorPatch | ScaledTensor) else _decoded(places, part, name)
        layer.install(adapter_name, param, known, logits.get(name))
        if isinstance(part, StepTensor):
            layer.slot(adapter_name).in_steps.add(layer.keys[param])


def _require_base(config: GraftConfig, places: Mapping[str, _Place], patch: Patch) -> None:
    """Refuse a base that has other values where the patch is than the one that the patch was made for."""
    recorded = config.record.fingerprint if config.record else None
    base = None if recorded is None else _base_entries(places, patch)
    if recorded is not None and base is not None:
        rounded = _quantized(places, patch)
        Fingerprint.from_dict(recorded).require(base, config.base_model_name_or_path, rounded)


def _budget(
    config: GraftConfig, places: Mapping[str, _Place], logits: Mapping[str, torch.Tensor]
) -> int | dict[str, int] | None:
    """Return the budget of a learned mask whose training goes on: one number, or one for each tensor."""
    if config.budget_scope == "tensor" and config.density is not None:
        shapes = _shapes(places)
        return {places[name].tensor_name: round(config.density * math.prod(shapes[name])) for name in logits}
    return config.record.entries if config.record else None


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
        dtype, shape = (torch.float32, part and (part.count,)) if kind == "logits" else (torch.float64, (1,))
        if part is None or values.shape != shape or values.dtype != dtype or not values.isfinite().all():
            raise PatchError(
                f"{kind} must be finite {dtype} of shape {shape and tuple(shape)}, got {values.dtype} "
                f"{tuple(values.shape)} for {name!r}. The file is damaged."
            )
        found[name] = values
    return found
