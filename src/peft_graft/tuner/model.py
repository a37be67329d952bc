"""GraftModel: wrap the base, hold its adapters, save and load them; PEFT's contract."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.pairing import Donor, DonorError
from ..checkpoints.wrappers import GRAFTED_PARAMETERS, plain_key
from ..patch.combine import conflicts
from ..patch.patch import Patch, PatchError
from ..peft_compat.peft_names import get_submodules
from ..selection.budget import resolve_budget
from .apply.forward import applied
from .apply.per_row import rows_of
from .backends.offloaded import identity, own_names, require_memory
from .backends.quantized import find_backend, require_float
from .backends.sharded import gather_with, is_partitionable
from .build_patch import PatchBuilder, Target
from .config import GraftConfig
from .layer import GraftLayer, GraftLinear, own_parameters
from .mask import GraftState, GraftStates
from .modules_to_save import copy_modules, name_modules
from .parameter_hooks import ParameterHooks
from .quantized_layer import GraftQuantizedLinear
from .state_dict import install_patch, pack, unpack
from .targets import is_wrappable, refuse, resolve_targets
from .trainer import is_for_hub, keep_card
from .weighted import combine, read_patch


class GraftConfigs(dict[str, PeftConfig]):
    """The configs of a grafted model by adapter name. PEFT enters a new one here before it wraps any module."""

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        """Enter a config.

        Raises:
            ValueError: It is of another method.
        """
        self.update({adapter_name: config})

    def update(self, configs: Mapping[str, PeftConfig]) -> None:  # type: ignore[override]
        """Enter several configs, as `__setitem__`."""
        others = sorted({type(config).__name__ for config in configs.values() if not isinstance(config, GraftConfig)})
        if others:
            raise ValueError(
                f"adapters of a grafted model must be grafts, got {', '.join(others)}. "
                "Write the graft into the base first, base = model.merge_and_unload(), and add the other one to that."
            )
        super().update(configs)


def require_no_other_method(model: nn.Module) -> None:
    """Refuse a base that carries another PEFT method already.

    Raises:
        ValueError: Names the first layers of it.
    """
    found = [
        f"{name} ({type(module).__module__.split('.')[-2]}.{type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, GraftLayer)
    ]
    if found:
        raise ValueError(
            f"base must carry no other PEFT method, got {', '.join(found[:3])}{' and more' if found[3:] else ''}. "
            "Merge and unload that one first, base = model.merge_and_unload(), and graft the result."
        )


def require_unwrapped(model: nn.Module) -> None:
    """Refuse a base inside of a wrapper for several devices, whose name would be part of every tensor's name.

    Raises:
        ValueError: Names the wrapper.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"base must come without its wrapper, got {type(model).__name__}, which puts 'module.' before every name. "
            "Graft the model inside, get_peft_model(base.module, ...), and wrap the result."
        )


class GraftModel(PatchBuilder, BaseTuner):
    """Graft a donor's skill into a base: theta = theta_base + alpha * mask * (theta_donor - theta_base).

    Made by `get_peft_model(base, GraftConfig(...))` or `PeftModel.from_pretrained(base, path)`.
    """

    prefix: str = "graft_"
    tuner_layer_cls = GraftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str, **kwargs: Any) -> None:
        nn.Module.__init__(self)
        require_unwrapped(model)
        require_no_other_method(model)
        # Set before the base class injects. The states are shared with every layer, also with those that a base
        # carries already, from an earlier call or a refused file.
        grafted = next((module for module in model.modules() if isinstance(module, GraftLayer)), None)
        self.states = GraftStates() if grafted is None else grafted.states
        self.donors: dict[str, Donor] = {}
        self._gathers = False  # whether ZeRO-3 knows what the layers need
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        super().__init__(model, GraftConfigs(configs), adapter_name, **kwargs)

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Wrap the targeted modules and, unless the patch comes from a file, make it from the donor.

        Raises:
            DonorError: The donor does not fit the base.
            SelectionError: The budget is impossible.
        """
        require_memory(model)
        config = copy.copy(self.peft_config[adapter_name])  # the user's own config stays usable for another model
        self.peft_config[adapter_name] = config
        from_file = config.is_pretrained or state_dict is not None or (low_cpu_mem_usage and config.donor is None)
        is_being_extracted = config.record is not None and config.record.fingerprint == {}
        name_modules(config, model, from_file and not is_being_extracted)
        if config.donor is None and not from_file:
            raise DonorError(
                "donor must be a checkpoint, a module or 'zeros', got None. "
                "Pass GraftConfig(donor=...), or load a saved adapter with PeftModel.from_pretrained."
            )
        if config.density is None and config.num_params is None and not from_file:
            resolve_budget(1, None, None)
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        recorded = config.record.base_model_type if config.record else None
        if None not in (recorded, model_type) and recorded != model_type:
            raise PatchError(
                f"base must be of the type that the patch was made for, {recorded!r}, got "
                f"{model_type!r}. Load {config.base_model_name_or_path or 'the base that it was made from'!r}."
            )
        config.note(base_model_type=recorded or model_type)
        if not from_file:
            self._carry_new_modules(config, model)
        self.states[adapter_name] = GraftState(config)
        self.states[adapter_name].awaits_file = from_file
        with ExitStack() as undo:
            undo.callback(self._undo_injection, adapter_name, {p: p.requires_grad for p in model.parameters()})
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            self._link_tied(model)
            if not from_file:
                self._graft(adapter_name)
            undo.pop_all()

    def _undo_injection(self, adapter_name: str, gradients: dict[nn.Parameter, bool]) -> None:
        """Make the model what it was before an injection that failed."""
        for held in (self.states, self.donors, self.peft_config):
            held.pop(adapter_name, None)
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for module in modules.values():
            if isinstance(module, GraftLayer) and adapter_name in module.graft_patch:
                del module.graft_patch[adapter_name]
            elif isinstance(module, ModulesToSaveWrapper):
                module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
        for key, module in modules.items():
            parent, _, name = key.rpartition(".")
            if isinstance(module, GraftLayer) and not self.states:
                self._replace_module(modules[parent], name, module.get_base_layer(), module)
            elif isinstance(module, ModulesToSaveWrapper) and not module.modules_to_save:
                setattr(modules[parent], name, module.original_module)
        if not self.states:
            self.model.__dict__.pop("peft_config", None)
        for parameter, requires_grad in gradients.items():
            parameter.requires_grad_(requires_grad)

    def _prepare_adapter_config(self, peft_config: GraftConfig, model_config: dict[str, Any]) -> GraftConfig:
        return resolve_targets(peft_config, self.model)

    def _create_and_replace(
        self,
        peft_config: GraftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        params = None if parameter_name is None else [parameter_name]
        if isinstance(parent, GraftLayer):
            return  # part of a unit that is wrapped as a whole, such as the projection of nn.MultiheadAttention
        from_file = self.states[adapter_name].awaits_file
        self._wrap(parent, target_name, target, current_key, from_file).add_slot(adapter_name, params)

    def _wrap(
        self, parent: nn.Module, target_name: str, target: nn.Module, key: str, from_file: bool = False
    ) -> GraftLayer:
        base = target.get_base_layer() if isinstance(target, GraftLayer) else target
        quantized = find_backend(base) is not None
        if not (quantized and from_file):  # a patch from elsewhere needs no difference to a donor
            refuse(key, base)
        if isinstance(target, GraftLayer):
            return target
        key = plain_key(key)
        if not is_wrappable(target):
            hooks = getattr(target, GRAFTED_PARAMETERS, None)
            if hooks is None:
                hooks = ParameterHooks(target, key, self.states)
                target.add_module(GRAFTED_PARAMETERS, hooks)
            return hooks
        cls = GraftLinear if isinstance(target, nn.Linear | Conv1D) else GraftLayer
        layer = (GraftQuantizedLinear if quantized else cls)(target, key, self.states)
        layer.train(target.training)
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _inject_parameters(
        self, peft_config: GraftConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        """Wrap the owners of the bare parameters that `target_parameters` names."""
        found: list[str] = []
        wanted = set(peft_config.target_parameters or [])
        for key, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, ParameterHooks) or ".base_layer" in f".{key}":
                continue
            held = module.keys if isinstance(module, GraftLayer) else dict(module.named_parameters(recurse=False))
            for param in held:
                name = f"{key}.{param}" if key else param
                if name not in wanted and not any(name.endswith(f".{suffix}") for suffix in wanted):
                    continue
                if not key and is_wrappable(module):
                    raise ValueError(
                        f"target_parameters must name parameters of submodules, got {name!r}, which the model itself "
                        "owns. Wrap the model in another module."
                    )
                parent, target, target_name = get_submodules(model, key) if key else (model, model, "")
                from_file = self.states[adapter_name].awaits_file
                self._wrap(parent, target_name, target, key, from_file).add_slot(adapter_name, [param])
                found.append(name)
        # PEFT 0.20 looks here, later versions at what is returned.
        self.targeted_parameter_names += [name for name in found if name not in self.targeted_parameter_names]
        return found

    def _link_tied(self, model: nn.Module) -> None:
        """Give every parameter object one owner; wrap its other holders, so that they see the patch too."""
        owners: dict[Hashable, Target] = {}
        for layer in self._layers():
            for param in layer.keys:
                if param not in layer.aliases:  # who owns a patch already keeps it
                    owners.setdefault(identity(*layer.holder(param)), (layer, param))
        for key, module in list(model.named_modules(remove_duplicate=False)):
            inside = ".base_layer" in f".{key}" or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
            if inside or owners.keys().isdisjoint(identity(module, name) for name in own_names(module)):
                continue
            parent, target, target_name = get_submodules(model, key)
            if not isinstance(parent, GraftLayer) and not isinstance(target, GraftLayer):
                self._wrap(parent, target_name, target, key)
        for layer in self._layers():
            for param in layer.keys:
                owner, owned = owners.setdefault(identity(*layer.holder(param)), (layer, param))
                if (owner, owned) != (layer, param):
                    layer.aliases[param] = (owner, owned)
                    layer.tied.add(param)
                    owner.tied.add(owned)

    # Patches to patches

    def patch(self, adapter_name: str = "default", with_alpha: bool = False) -> Patch:
        """Read an adapter's patch: its exact mask, and the donor's values.

        Args:
            adapter_name: Name of the adapter.
            with_alpha: Give base + alpha * (donor - base) as values, as the model has them.

        Returns:
            The patch on the CPU, with the shapes of all tensors that the adapter may patch.

        Raises:
            ValueError: There is no such adapter, or it still waits for data.
            RuntimeError: The adapter's file is still to be loaded.
        """
        return read_patch(self, adapter_name, with_alpha)

    def conflicts(self, adapter_names: list[str] | None = None) -> dict[str, int]:
        """Count the entries that more than one adapter takes; active together, they give these the mean of theirs.

        Args:
            adapter_names: Names of the adapters; None for the active ones.

        Returns:
            How many by tensor name, without the tensors that have none. Their sum is the total.

        Raises:
            ValueError: As `patch`.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        return conflicts([self.patch(name) for name in names])

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
        modules_to_save_from: str | None = None,
    ) -> None:
        """Add a graft that combines others: base + combination of weight_i * alpha_i * (donor_i - base).

        It is a graft like any: it needs neither the others nor their donors, has alpha = 1, and its config records
        under `record.provenance` what it is made of. Like every added adapter it is not active until `set_adapter`.

        Args:
            adapters: Names of the grafts to combine; of a learned mask, the exact one is taken.
            weights: A finite number for each: 1 goes all the way to a graft, 0.5 half of it, -1 the opposite way.
            adapter_name: Name of the new adapter.
            combination_type: A name in `COMBINATIONS`: "linear", "mean" (with weights of 1 the same bits as
                all adapters active together), "disjoint" or "ties".
            modules_to_save_from: Whose `modules_to_save` (task heads) to take, needed where the adapters' differ.

        Raises:
            ValueError: One message for all arguments that are wrong; or no entry is left.
            PatchError: A combined value overflows the base's dtype.
        """
        made = combine(self, adapters, weights, adapter_name, combination_type, modules_to_save_from)
        self.adopt(adapter_name, *made)

    def adopt(self, adapter_name: str, config: GraftConfig, patch: Patch, sources: dict[str, str]) -> None:
        """Add an adapter with a patch that was made elsewhere, and other adapters' modules to save, by their keys."""
        self.peft_config[adapter_name] = config
        self.inject_adapter(self.model, adapter_name)
        self.fill(adapter_name, patch)
        copy_modules(self.model, adapter_name, sources)

    def fill(self, adapter_name: str, patch: Patch) -> None:
        """Give an adapter that is still empty its patch."""
        install_patch(self, self.peft_config[adapter_name], adapter_name, patch)

    # Host contract

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParameterHooks):
            child.detach_from_parent()
        else:
            setattr(parent, child_name, new_module)

    def _check_tied_modules(self, model: nn.Module, peft_config: GraftConfig) -> None:
        """Tied parameters have one patch that all holders see, so there is nothing to warn about."""

    def _check_merge_allowed(self) -> None:
        """Merging writes into the shared parameter, so tied parameters stay tied; quantized ones cannot be written."""
        require_float(self._layers(), "merged")

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        self._start_forward()
        with applied(self.states, self.model) if names is None else rows_of(self.model, list(self._layers()), names):
            yield

    def _start_forward(self) -> None:
        for state in self.states.values():
            state.start_forward()
        parameter = next(self.model.parameters(), None)
        if parameter is not None and is_partitionable(parameter) and not self._gathers:
            self._gathers = True
            for layer in self._layers():
                base = layer.get_base_layer()
                runs = base if isinstance(layer, ParameterHooks) else layer
                gather_with(runs, [*own_parameters(base).values(), *layer.graft_patch.parameters()])
                if isinstance(layer, ParameterHooks):
                    layer.hook()  # again, to act after ZeRO-3's own hooks

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Keep the active patches in place for as long as this context lasts, for many batches without gradients.

        Every layer's patch is written once, and the base's bits are restored at the end, also after an exception.
        Adapters, alpha and masks may change meanwhile. A module outside of this model that shares its weights sees the
        patches.

            with torch.no_grad(), model.applied():
                for batch in batches:
                    model(**batch)
        """
        with applied(self.states, self.model, self._layers()):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate with the patches in place all the while, instead of writing them anew for every token.

        A module outside of this model that shares its weights sees the patches meanwhile.
        """
        with applied(self.states, self.model, self._layers()):
            return cast(Any, self.model).generate(*args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter and what its layers share.

        Raises:
            ValueError: The adapter is merged: its values would stay in the base.
        """
        if any(adapter_name in layer.merged_adapters for layer in self._layers()):
            # In the words of the PEFT that says so itself.
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        self.states.pop(adapter_name, None)
        self.donors.pop(adapter_name, None)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: GraftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        keep_card(model)
        config.for_hub = is_for_hub(model)
        return pack(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: GraftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        keep_card(model)
        with ExitStack() as undo:
            for tuner in model.modules():
                if isinstance(tuner, cls) and tuner.states[adapter_name].awaits_file:
                    undo.callback(tuner._undo_injection, adapter_name, {})
            result = unpack(model, config, adapter_name, state_dict)
            undo.pop_all()
        return result
