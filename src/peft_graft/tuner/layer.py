"""GraftLayer: a module whose parameters carry a patch."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..patch.arithmetic import align_indices, grafted_values, masked_sum, scatter_rows
from ..patch.value_codes import ScaledTensor, TensorPatch, encode_candidates
from ..peft_compat.peft_names import check_adapters_to_merge
from .apply.forward import effective, run, run_patched
from .apply.in_place import NOTHING, ResolvedTensor, copied, has_patch, overwrite, own_copy, own_entries, restored
from .apply.per_row import Rows
from .apply.sparse_grad import SparseGrad
from .backends.offloaded import real_parameter
from .backends.sharded import UNGATHERED, is_sharded, require_whole, whole
from .mask import GraftState, GraftStates, Slot, straight_through
from .module_proxy import ModuleProxy


class PlannedWrite(NamedTuple):
    """The entries that the active adapters write into one parameter.

    Attributes:
        module: The module that owns the parameter.
        name: The parameter's name there.
        patch: The entries, `NOTHING` for none.
    """

    module: nn.Module
    name: str
    patch: ResolvedTensor


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that a wrapped module patches: its own; for `nn.MultiheadAttention` also its projection's."""
    return dict(module.named_parameters(recurse=isinstance(module, nn.MultiheadAttention), remove_duplicate=False))


def param_key(param: str) -> str:
    """Return the name of a parameter as an attribute: `out_proj.weight` becomes `out_proj__weight`."""
    return param.replace(".", "__")


class GraftLayer(ModuleProxy):
    """Wrap any module that owns parameters; the forward is the module's own, run on patched parameters.

    theta = theta_base + alpha * mask * (theta_donor - theta_base), entry by entry of the wrapped module's parameters.

    Args:
        base_layer: Module to wrap; stays the owner of its parameters.
        name: Name of the module in the unwrapped model.
        states: State of each adapter, shared by all layers of the model.
    """

    cast_input_dtype_enabled = True  # PEFT's helpers look for it; inputs are the wrapped module's own business
    adapter_layer_names: tuple[str, ...] = ("graft_patch",)
    other_param_names: tuple[str, ...] = ()
    has_rows = True  # whether the rows of a batch may have different patches

    def __init__(self, base_layer: nn.Module, name: str, states: GraftStates) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._setup(name, states)

    def _setup(self, name: str, states: GraftStates) -> None:
        self.graft_patch = nn.ModuleDict()
        self.tensor_prefix = name
        self.states = states
        self.keys = {param: param_key(param) for param in own_parameters(self.get_base_layer())}
        self.aliases: dict[str, tuple[GraftLayer, str]] = {}  # tied parameters: who owns the patch
        self.tied: set[str] = set()  # parameters that another module holds as well
        self.merged_adapters: list[str] = []
        self._backup: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._disable_adapters = False
        self._plan: tuple[int, list[str], list[PlannedWrite]] | None = None  # for which version and adapters
        self.applied_names: list[list[str]] = []  # whose patches calls keep in place; compiled code looks here
        self.rows_by_thread: dict[int, Rows] = {}  # the adapter of each row of the batch, where they differ
        self.register_state_dict_post_hook(_save_own_bits)

    # Forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module on patched parameters."""
        return run(self, args, kwargs)

    def run_patched(self, adapter_names: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the wrapped module once with the patches of these adapters, None for the active ones."""
        return run_patched(self, adapter_names, args, kwargs)

    @property
    def rows(self) -> Rows | None:
        """Return the adapter of each row of the batch, while they differ in the call that this thread makes."""
        return self.rows_by_thread.get(threading.get_ident()) if self.rows_by_thread else None

    def plan(self) -> list[PlannedWrite]:
        """Return what the active adapters write, parameter by parameter; resolved anew only after an event."""
        version, names, known = self.states.version, self.active_adapters, self._plan
        if known is None or known[0] != version or known[1] != names:
            writes = [PlannedWrite(*self.holder(param), self.resolve(param)) for param in self.keys]
            known = self._plan = version, list(names), writes
        return known[2]

    def resolve(self, param: str, adapter_names: list[str] | None = None) -> ResolvedTensor:
        """Compute what adapters write into a parameter.

        Args:
            param: Parameter of this layer.
            adapter_names: Adapters whose patches to take; None for the active ones.

        Returns:
            The entries; `NOTHING` where there are none.
        """
        version, names = self.states.version, self.effective_adapters(param, adapter_names)
        if not names:
            return NOTHING
        owner, owned = self.owner(param)
        indices, values = self.effective_entries(param, names)
        tensor = owner.tensor_name(owned)
        from_base = any(owner.states[name].scale(tensor) != 1 or owner.is_coded(name, owned) for name in names)
        expected = owner.base_entries(owned, indices) if from_base else None
        return ResolvedTensor((id(owner), owned, version, *names), indices, values.detach(), expected)

    def owner(self, param: str) -> tuple[GraftLayer, str]:
        """Return the layer that holds the patch of a parameter, and the parameter's name there."""
        return self.aliases.get(param) or (self, param)

    def has_entries(self, adapter_name: str, param: str) -> bool:
        """Return whether an adapter patches this parameter."""
        owner, owned = self.owner(param)
        slot = owner.slots.get(adapter_name)
        return slot is not None and owner.keys[owned] in slot.params

    def is_coded(self, adapter_name: str, param: str) -> bool:
        """Return whether the base is needed for the values of an adapter that patches this parameter of its own."""
        slot, key = self.slots[adapter_name], self.keys[param]
        trains = slot.logits(key) is not None
        return key in slot.codes or (trains and self.states[adapter_name].value_code is not None)

    def patches(self, adapter_name: str) -> bool:
        """Return whether an adapter patches any parameter of this layer."""
        return any(self.has_entries(adapter_name, param) for param in self.keys)

    def effective_adapters(self, param: str, adapter_names: list[str] | None = None) -> list[str]:
        """Return those of these adapters, None for the active ones, that are still to patch the parameter."""
        owner, _ = self.owner(param)
        if owner.merged or owner.disable_adapters:
            return []
        names = owner.active_adapters if adapter_names is None else adapter_names
        return [name for name in names if self.has_entries(name, param)]

    def effective_entries(self, param: str, adapter_names: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what these adapters, which all have entries, write.

        Args:
            param: Parameter of this layer.
            adapter_names: The adapters.

        Returns:
            Flat indices, int64 [n], and values, [n], in the base's dtype.
        """
        owner, owned = self.owner(param)
        self.require_whole(param)
        # Whether gradients are wanted, not the mode, decides: masks can be trained in evaluation mode, without dropout.
        found = owner.joint_entries(adapter_names, owned, training=torch.is_grad_enabled())
        return cast(tuple[torch.Tensor, torch.Tensor], found)

    def effective(self, param: str, adapter_names: list[str] | None = None) -> torch.Tensor | None:
        """Return a patched copy of a parameter, or None where the parameter as it stands is what is wanted."""
        return effective(self, param, adapter_names)

    def require_whole(self, param: str) -> None:
        """Refuse to patch a parameter of which this process holds a shard."""
        owner, owned = self.owner(param)
        require_whole({owner.tensor_name(owned): self.base_parameter(param)}, "patched", UNGATHERED)

    def check(self, adapter_names: list[str] | None) -> None:
        """Say so, where an adapter runs without its patch (see `GraftState.check`)."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.slots:
                self.states[name].check(name)

    # Structure

    def tensor_name(self, param: str) -> str:
        """Return the name of the parameter in the unwrapped model."""
        return f"{self.tensor_prefix}.{param}" if self.tensor_prefix else param

    def holder(self, param: str) -> tuple[nn.Module, str]:
        """Return the module that owns a parameter, and the parameter's name there."""
        module, _, name = param.rpartition(".")
        base = self.get_base_layer()
        return (base.get_submodule(module) if module else base), name

    def base_parameter(self, param: str) -> torch.Tensor:
        """Return the base's parameter itself (patched while merged), also while it is offloaded."""
        return real_parameter(*self.holder(param))

    def get_base_layer(self) -> Any:
        """Return the wrapped module."""
        return self._modules["base_layer"]

    @property
    def slots(self) -> dict[str, Slot]:
        """Return the slot of each adapter, by its name, in one look-up: every forward needs them."""
        return cast(dict[str, Slot], cast(nn.Module, self._modules["graft_patch"])._modules)

    def slot(self, adapter_name: str) -> Slot:
        """Return the entries that an adapter holds for this layer."""
        return self.slots[adapter_name]

    def add_slot(self, adapter_name: str, params: list[str] | None = None) -> None:
        """Make room for an adapter.

        Args:
            adapter_name: Name of the adapter.
            params: Parameters that it may patch; None for all. Added to those of an existing slot.
        """
        eligible = tuple(self.keys) if params is None else tuple(params)
        if adapter_name in self.graft_patch:
            slot = self.slot(adapter_name)
            slot.eligible = tuple(param for param in self.keys if param in {*slot.eligible, *eligible})
        else:
            self.graft_patch[adapter_name] = Slot(eligible)
        self.states.changed()

    def install(
        self,
        adapter_name: str,
        param: str,
        part: TensorPatch | ScaledTensor,
        logits: torch.Tensor | None = None,
    ) -> None:
        """Give an adapter its entries of one parameter (see `Slot.install`), on the parameter's device."""
        device = self.base_parameter(param).device
        device = torch.device("cpu") if device.type == "meta" else device
        slot = self.slot(adapter_name)
        logits = None if logits is None else logits.to(device)
        part = part.to(device)
        slot.install(self.keys[param], part, logits)
        if logits is not None:
            base = self.base_entries(param, part.indices)
            self.states[adapter_name].register(self.tensor_name(param), slot, self.keys[param], base)
        elif is_sharded(self.base_parameter(param)):
            self.states[adapter_name].note_base(self.tensor_name(param), self.base_entries(param, part.indices))
        self.states.changed()

    def clear(self, adapter_name: str, params: Iterable[str] | None = None) -> None:
        """Take an adapter's entries away, of all parameters or of these."""
        if adapter_name in self.graft_patch:
            for param in self.keys if params is None else params:
                self.slot(adapter_name).remove(self.keys[param])
            self.states.changed()

    # Patched values

    def base_entries(self, param: str, indices: torch.Tensor) -> torch.Tensor:
        """Return the base's own values at these flat indices, int64 [n], also while a patch is on it."""
        entries = own_entries(whole(self.base_parameter(param)), indices)
        if param not in self._backup:
            return entries
        at, before = self._backup[param]
        return restored(entries, indices, at.to(entries.device), before.to(entries.device))

    def own_values(self, param: str) -> torch.Tensor:
        """Return all of the base's own values, detached, also while a patch is on it."""
        parameter = self.base_parameter(param)
        own = own_copy(parameter)
        values = whole(parameter) if own is None else own
        if param not in self._backup:
            return values
        indices, before = self._backup[param]
        return values.flatten().index_copy(0, indices, before.to(values)).view(values.shape)

    def entries(
        self, adapter_name: str, param: str, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Compute an adapter's patch of one parameter.

        Args:
            adapter_name: Name of the adapter.
            param: Parameter of this layer.
            training: Whether a learned mask that trains must stay differentiable: then all candidates are returned.

        Returns:
            Indices int64 [n], values [n] that are still to be rounded to the base's dtype, and which of them are taken:
            bool [n], or None for all. None where there is no patch.
        """
        slot, key = self.slots.get(adapter_name), self.keys[param]
        if slot is None or key not in slot.params:
            return None
        state, name = self.states[adapter_name], self.tensor_name(param)
        indices, donor, logits, mask = self._donor_entries(adapter_name, param)
        if logits is not None and mask is not None and not (training and logits.requires_grad):
            indices, donor, mask, logits = indices[mask], donor[mask], None, None
        alpha = state.scale(name)
        values = grafted_values(lambda: self.base_entries(param, indices), donor, alpha)
        if mask is None or logits is None:
            return indices, values, None
        require_whole({name: logits}, "trained", UNGATHERED)
        values = torch.where(mask, values, self.base_entries(param, indices))
        start = self._start(adapter_name, param, indices)
        return indices, straight_through(logits, values, start, donor, alpha), mask

    def _donor_entries(
        self, adapter_name: str, param: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Compute the values of an adapter's entries at alpha 1.

        Returns:
            Indices int64 [n], values [n], and of a learned mask logits float32 [n] and the exact mask, bool [n].
        """
        slot, key, device = self.slots[adapter_name], self.keys[param], self.base_parameter(param).device
        part, logits = slot.part(key, device), slot.logits(key)
        if isinstance(part, ScaledTensor):
            return part.indices, part.decode_entries(self.base_entries(param, part.indices)), None, None
        if logits is None:
            return part.indices, part.values, None, None
        state = self.states[adapter_name]
        mask = self._mask(state, self.tensor_name(param)).to(device)
        values = part.values
        if state.value_code is not None:
            values = encode_candidates(values, self._start(adapter_name, param, part.indices), mask, state.value_code)
        return part.indices, values, logits.to(device), mask

    def _mask(self, state: GraftState, name: str) -> torch.Tensor:
        """Return the exact mask; inside of a call, which looked at all logits when it began, without another look."""
        return state.known_mask(name) if threading.get_ident() in self.states.scopes else state.mask(name)

    def _start(self, adapter_name: str, param: str, indices: torch.Tensor) -> torch.Tensor:
        """Return the base's values at a mask's candidates, those recorded when the mask was made if there are any."""
        recorded = self.states[adapter_name].base_values(self.tensor_name(param))
        return self.base_entries(param, indices) if recorded is None else recorded.to(indices.device)

    def candidates(self, adapter_name: str, param: str) -> SparseGrad | None:
        """Compute the patch of a mask that trains, for a kernel: entries to write, and candidates that want gradients.

        Returns:
            None where no mask trains: a fixed patch, or one without entries here.
        """
        slot, key = self.slots.get(adapter_name), self.keys[param]
        logits = None if slot is None else slot.logits(key)
        state, name = self.states[adapter_name], self.tensor_name(param)
        alpha = state.scale(name)
        if slot is None or logits is None or not logits.requires_grad or isinstance(alpha, torch.Tensor):
            return None
        require_whole({name: logits}, "trained", UNGATHERED)
        parameter = self.base_parameter(param)
        indices, donor, _, mask = self._donor_entries(adapter_name, param)
        if mask is None:
            return None
        at = indices[mask]
        put = grafted_values(lambda: self.base_entries(param, at), donor[mask], alpha)
        carrier = straight_through(logits, logits.detach(), self._start(adapter_name, param, indices), donor, alpha)
        return SparseGrad(indices, carrier, at, put.to(parameter.dtype))

    def joint_entries(
        self, adapter_names: list[str], param: str, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compute the patch of several adapters together: the mean of their values where they take the same entry.

        The mean does not depend on the order of the adapters. Candidates that a mask in training leaves out do
        not count where another adapter takes the entry.

        Returns:
            Indices int64 [n] and values [n] in the base's dtype; None where there is no patch.
        """
        entries = [self.entries(name, param, training) for name in dict.fromkeys(adapter_names)]
        found = [each for each in entries if each is not None]
        dtype = self.base_parameter(param).dtype
        if len(found) < 2:
            return (found[0][0], found[0][1].to(dtype)) if found else None
        indices, where = align_indices([each[0] for each in found])
        values, taken = scatter_rows([each[1] for each in found], where, indices.numel())
        if training:
            masks = [torch.ones_like(at) if each[2] is None else each[2] for each, at in zip(found, where, strict=True)]
            chosen = scatter_rows(masks, where, indices.numel())[0].bool()
            taken = torch.where(chosen.any(0), chosen, taken)
        return indices, (masked_sum(values, taken) / taken.sum(0)).to(dtype)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the patch into the base's parameters, keeping the overwritten entries.

        Args:
            safe_merge: Refuse values that are not finite.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: The patch waits for data, or `safe_merge` and a value is not finite.
            RuntimeError: The patch is in use, as inside of `generate`.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.graft_patch]
        if not names:
            return
        held = {self.tensor_name(param): self.base_parameter(param) for param in self.keys}
        require_whole(held, "merged", "Save the adapter, and merge it in a model that is not sharded.")
        for name in names:
            self.states[name].require_ready("merged")
        if busy := [self.tensor_name(param) for param in self.keys if has_patch(self.base_parameter(param))]:
            raise RuntimeError(f"adapters must be idle to be merged, got a call that patches {busy}. Wait for its end.")
        together = [*self.merged_adapters, *names]
        patches = {param: found for param in self.keys if (found := self.joint_entries(together, param)) is not None}
        if safe_merge:
            broken = [self.tensor_name(param) for param, (_, values) in patches.items() if not values.isfinite().all()]
            if broken:
                raise ValueError(f"merged values must be finite, got NaN or Inf in {broken}. The adapter seems broken.")
        self.unmerge()
        with torch.no_grad():
            for param, (indices, values) in patches.items():
                self._backup[param] = indices, overwrite(self.base_parameter(param), indices, values)
        self.merged_adapters = together
        self.states.changed()

    def unmerge(self) -> None:
        """Put the base's own bits back."""
        with torch.no_grad():
            for param, (indices, values) in self._backup.items():
                parameter = self.base_parameter(param)
                overwrite(parameter, indices, values.to(parameter))
        self._backup = {}
        self.merged_adapters = []
        self.states.changed()

    # Host contract

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the patches on or off; off also unmerges, because a tied partner may run before this layer does."""
        super().enable_adapters(enabled)
        self.states.changed()
        if not enabled:
            self.unmerge()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Choose the active adapters."""
        super().set_adapter(*args, **kwargs)
        self.states.changed()

    def _apply(self, *args: Any, **kwargs: Any) -> GraftLayer:
        """Move or cast, after which the patch must be resolved anew."""
        super()._apply(*args, **kwargs)
        self.states.changed()
        return self

    def train(self, mode: bool = True) -> GraftLayer:
        """Switch between the straight-through mask (training) and the exact one (evaluation)."""
        for state in self.states.values():
            state.change_mode()
        return super().train(mode)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        parameter = next(iter(own_parameters(base_layer).values()), None)
        return (None, None) if parameter is None else (parameter.device, parameter.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # The stock method would also cast to the base's dtype and so lose the donor's bits.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if adapter_name in self.graft_patch and device is not None and device.type != "meta":
            self.slot(adapter_name).to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> GraftLayer:
        """Copy with the base's own bits, also while a call has a patch on them."""
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        with copied([self.base_parameter(param) for param in self.keys]) as put_back:
            own = {key: value for key, value in self.__dict__.items() if key not in ("_plan", "rows_by_thread")}
            clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in own.items()})
            for param in self.keys:
                put_back(clone.base_parameter(param), self.base_parameter(param))
        clone._plan, clone.applied_names, clone.rows_by_thread = None, [], {}
        return clone

    def __repr__(self) -> str:
        """Show the method in front of the wrapped module, as PEFT's layers do."""
        return "graft." + super().__repr__()


class GraftLinear(GraftLayer):
    """GraftLayer of a linear module: its class name lets `target_modules="all-linear"` find it again."""


def _save_own_bits(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put the base's own bits into a state dict, also while a call keeps a patch on them; a merged patch is saved."""
    for param in cast(GraftLayer, layer).keys:
        key = f"{prefix}base_layer.{param}"
        saved = state_dict.get(key)
        own = own_copy(saved) if isinstance(saved, torch.Tensor) else None
        if own is not None:
            state_dict[key] = own
