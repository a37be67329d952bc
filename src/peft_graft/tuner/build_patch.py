"""Build a patch: read the donor tensor by tensor, take the budget, give every layer its entries."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..adapter_files.hub_names import cached_commit, find_hub_ids
from ..adapter_files.versions import installed_versions
from ..checkpoints.forward_config import Differences, describe, forward_differences, read_donor_config
from ..checkpoints.name_mapping import RenamedCheckpoint, plain_state
from ..checkpoints.pairing import (
    CheckpointDonor,
    Donor,
    ModuleDonor,
    PairedTensors,
    ZerosDonor,
    nothing_to_graft,
    open_donor,
    resolve_names,
    stream,
)
from ..checkpoints.wrappers import unwrap
from ..patch.value_codes import (
    CodeLoss,
    ScaledTensor,
    TensorPatch,
    ValueCode,
    describe_loss,
    encode_values,
    total_loss,
)
from ..selection.budget import Budget, capped_note
from ..selection.norm_alpha import energy_of, estimated_note, norm_alpha
from ..selection.rules import get_rule
from ..selection.select import Selector
from .backends.sharded import WholeTensors, whole_shape
from .base_files import (
    carry_new_modules,
    find_base_files,
    find_new_tensors,
    refuse_new_targets,
    warn_of_changed_values,
    warn_of_rows,
)
from .layer import GraftLayer
from .left_out import InMemory, aliases_of, base_tensors, report_left_out, require_nothing_more
from .mask import GraftStates
from .modules_to_save import graft_modules, names_to_save

if TYPE_CHECKING:
    from .config import GraftConfig

Target = tuple[GraftLayer, str]
_LOG = logging.getLogger(__name__)
MANY_ENTRIES = 100_000_000  # from here on, reading the donor takes seconds


class PatchBuilder:
    """The part of a `GraftModel` that opens donors and builds patches from them."""

    model: nn.Module
    peft_config: dict[str, Any]
    states: GraftStates
    donors: dict[str, Donor]
    active_adapters: list[str]

    def _layers(self) -> Iterator[GraftLayer]:
        for module in self.model.modules():
            if isinstance(module, GraftLayer):
                yield module

    def targets(self, adapter_name: str) -> dict[str, Target]:
        """Find the tensors that the adapter may patch, by name in the unwrapped model, sorted; tied tensors once.

        Returns:
            (layer, parameter) by tensor name.
        """
        found: dict[str, Target] = {}
        for layer in self._layers():
            if adapter_name not in layer.graft_patch:
                continue
            for param in layer.slot(adapter_name).eligible:
                owner, owned = layer.aliases.get(param, (layer, param))
                if owner is not layer and adapter_name not in owner.graft_patch:
                    owner.add_slot(adapter_name, [owned])
                found[owner.tensor_name(owned)] = (owner, owned)
        return dict(sorted(found.items()))

    def base_tensors(self, targets: Mapping[str, Target]) -> Mapping[str, torch.Tensor]:
        """Return the base's own values by tensor name; sharded ones are gathered when their turn comes."""
        return WholeTensors({name: partial(layer.own_values, param) for name, (layer, param) in targets.items()})

    def open_donor(self, adapter_name: str, token: str | bool | None = None) -> Donor:
        """Open an adapter's donor, and put it on record."""
        config = self.peft_config[adapter_name]
        donor = open_donor(config.donor, config.donor_revision, token, config.donor_subfolder)
        # Commits, where base and donor came from the Hub: a branch may move.
        config.revision = cached_commit(config.base_model_name_or_path, config.revision)
        config.donor_revision = getattr(donor, "revision", None) or config.donor_revision
        names = [config.base_model_name_or_path or getattr(self.model, "name_or_path", None)]
        if not isinstance(donor, ZerosDonor | ModuleDonor):
            names.append(config.donor if isinstance(config.donor, os.PathLike) else donor.name)
        # A model in memory is recorded by the name of its class.
        known = {donor.name: None} if isinstance(donor, ModuleDonor) else None
        provenance: dict[str, Any] = {"versions": installed_versions()}
        if differences := self._config_differences(donor):
            provenance["donor_config"] = {
                name: {"base": ours, "donor": theirs} for name, (ours, theirs) in differences.items()
            }
        config.note(provenance=provenance, hub_ids=find_hub_ids(names, known))
        self.donors[adapter_name] = _in_names_of(self.model, donor)
        return self.donors[adapter_name]

    def _config_differences(self, donor: Donor) -> Differences:
        """Find, and warn of, fields of the donor's configuration that change its forward."""
        ours = getattr(self.model, "config", None)
        if not isinstance(ours, PretrainedConfig):
            return {}
        theirs = read_donor_config(donor, ours)
        differences = {} if theirs is None else forward_differences(ours, theirs)
        if differences:
            warnings.warn(
                f"donor's configuration must compute as the base's, got {donor.name!r} with other values of "
                f"{describe(differences)}. A patch holds weights only, so the graft computes with the base's values. "
                "Load the base with the donor's: from_pretrained(base, "
                f"config=AutoConfig.from_pretrained({donor.name!r})).",
                stacklevel=3,
            )
        return differences

    def _carry_new_modules(self, config: GraftConfig, model: nn.Module) -> None:
        """Take modules whole that the base's files do not hold, as far as there are files and a donor in them."""
        files = None if config.donor == ZerosDonor.name else find_base_files(model)
        if files is not None and any(find_new_tensors(model, files)):
            donor = open_donor(config.donor, config.donor_revision, subfolder=config.donor_subfolder)
            carry_new_modules(config, model, files, _in_names_of(model, donor))

    def _graft(self, adapter_name: str) -> None:
        config, donor = self.peft_config[adapter_name], self.open_donor(adapter_name)
        # First, because the body tells another architecture better than the head does.
        names = self.donor_names(adapter_name)
        extra = require_nothing_more(self.model, donor, config.allow_extra, names.values())
        targets, files = self.targets(adapter_name), find_base_files(self.model)
        if files is not None:
            refuse_new_targets(self.model, files, list(targets))
            warn_of_changed_values(files, targets)
        warn_of_rows(self.model, donor, [*targets, *names_to_save(self.model, adapter_name)])
        graft_modules(self.model, adapter_name, donor, config)
        report_left_out(self.model, adapter_name, donor, names, InMemory(base_tensors(self.model), donor), extra)
        rule = get_rule(config.selection)
        if rule.kind == "scored":
            self.states[adapter_name].waits_for_data = True
        else:
            self.build_patch(adapter_name)

    def donor_names(self, adapter_name: str, donor: Donor | None = None) -> dict[str, str]:
        """Find the donor's name of every targeted tensor, by its name in the base.

        Args:
            adapter_name: Name of the adapter.
            donor: Where to look; by default the adapter's donor.

        Raises:
            DonorError: Tensors are missing, have other shapes, or are stored in another form.
        """
        targets = self.targets(adapter_name)
        donor = self.donors[adapter_name] if donor is None else donor
        if isinstance(donor, RenamedCheckpoint):
            donor.require_plain(list(targets))
        prefix = getattr(self.model, "base_model_prefix", "")
        return resolve_names(
            {name: whole_shape(layer.base_parameter(param)) for name, (layer, param) in targets.items()},
            donor,
            prefixes=(prefix,) if prefix else (),
            aliases=aliases_of(self.model, donor),
        )

    def build_patch(
        self,
        adapter_name: str = "default",
        measured: Mapping[str, torch.Tensor] | None = None,
        show_progress_bar: bool | None = None,
    ) -> None:
        """Score the delta, take the budget (or, for a learned mask, the candidates), and hold the donor's values.

        Only entries that differ are taken: a budget beyond their number is capped, with a line in the log.

        Args:
            adapter_name: Name of the adapter.
            measured: Measurement that the rule needs, by tensor name, broadcastable to the tensor; None for none.
            show_progress_bar: Show a progress bar; None for one where there are many entries to read.

        Raises:
            DonorError: The donor does not fit the base, or equals it.
            SelectionError: The budget is impossible.
        """
        config, state = self.peft_config[adapter_name], self.states[adapter_name]
        donor = self.donors[adapter_name]
        rule, targets = get_rule(config.selection), self.targets(adapter_name)
        base, names = self.base_tensors(targets), self.donor_names(adapter_name)
        sizes = {name: math.prod(whole_shape(layer.base_parameter(param))) for name, (layer, param) in targets.items()}
        if show_progress_bar is None:
            show_progress_bar = sum(sizes.values()) >= MANY_ENTRIES
        trained = rule.kind == "trained"
        budget = Budget(config.density, config.num_params, config.budget_scope, config.granularity)
        selector = Selector(
            PairedTensors(base, donor, names, sizes, show_progress_bar=show_progress_bar),
            rule,
            budget,
            measured=measured,
            seed=config.seed,
            candidate_ratio=config.candidate_ratio if trained else 1.0,
            measures_energy=config.alpha == "norm",
        )
        chosen = selector.indices()
        if not selector.differs:
            raise nothing_to_graft(donor, selector.eligible)
        if rule.trains_mask:
            state.budget = selector.budget_of(chosen)
        self._install(adapter_name, targets, chosen, names, base, trained)
        entries = _count(state.budget) if rule.trains_mask else sum(index.numel() for index in chosen.values())
        if note := capped_note(budget, selector.wanted, entries, selector.eligible):
            _LOG.warning(note)
        config.note(eligible=selector.eligible, entries=entries)
        if config.alpha == "norm":
            config.alpha = norm_alpha(selector.energy, self._energy(adapter_name, chosen))
            _LOG.warning(estimated_note(config.alpha))
        state.ready = config.alpha != "auto" and rule.kind != "procedure"

    def _energy(self, adapter_name: str, chosen: Mapping[str, torch.Tensor]) -> float:
        """Return the sum of the squares of the deltas that a patch takes."""
        energy, targets = 0.0, self.targets(adapter_name)
        for name, index in chosen.items():
            layer, param = targets[name]
            part = layer.slot(adapter_name).part(layer.keys[param], torch.device("cpu"))
            start = base_entries(layer, param, index)
            energy += energy_of(part.decode_entries(start) if isinstance(part, ScaledTensor) else part.values, start)
        return energy

    def install_mask(self, adapter_name: str, chosen: Mapping[str, torch.Tensor]) -> None:
        """Build the patch from a mask that is already known.

        Args:
            adapter_name: Name of the adapter.
            chosen: Flat indices by tensor name: int64, increasing.
        """
        targets = self.targets(adapter_name)
        chosen = {name: index for name, index in chosen.items() if index.numel()}
        names, base = self.donor_names(adapter_name), self.base_tensors(targets)
        self._install(adapter_name, targets, chosen, names, base, trained=False)
        self.peft_config[adapter_name].note(entries=sum(index.numel() for index in chosen.values()))

    def _install(
        self,
        adapter_name: str,
        targets: Mapping[str, Target],
        chosen: Mapping[str, torch.Tensor],
        names: Mapping[str, str],
        base: Mapping[str, torch.Tensor],
        trained: bool,
    ) -> None:
        donor, state = self.donors[adapter_name], self.states[adapter_name]
        state.clear()
        state.waits_for_data = False
        for layer, _ in targets.values():
            layer.clear(adapter_name)
        values = {
            name: after.reshape(-1)[chosen[name]]
            for name, _, after in stream(base, donor, {name: names[name] for name in chosen})
        }
        plain = {name: TensorPatch(index, values[name]) for name, index in chosen.items()}
        parts: Mapping[str, TensorPatch | ScaledTensor] = plain
        if state.value_code is not None and not trained:
            read = {name: partial(base_entries, *target) for name, target in targets.items()}
            parts, losses = encode_parts(plain, lambda name: read[name](chosen[name]), state.value_code)
            note_loss(self.peft_config[adapter_name], losses, state.value_code)
        for name, part in parts.items():
            layer, param = targets[name]
            logits = torch.ones(part.count) if trained else None
            layer.install(adapter_name, param, part, logits)
        trains = adapter_name in self.active_adapters and not self.peft_config[adapter_name].inference_mode
        for layer, _ in targets.values():
            layer.set_requires_grad(adapter_name, trains)


def base_entries(layer: GraftLayer, param: str, indices: torch.Tensor) -> torch.Tensor:
    """Return the base's own values at flat indices, on the CPU, also while something is merged."""
    return layer.base_entries(param, indices.to(layer.base_parameter(param).device)).cpu()


def encode_parts(
    parts: Mapping[str, TensorPatch], read_base: Callable[[str], torch.Tensor], code: ValueCode
) -> tuple[dict[str, ScaledTensor], dict[str, CodeLoss]]:
    """Encode the values of a patch.

    Args:
        parts: The entries by tensor name.
        read_base: Function from a tensor's name to the base's values at its entries, [n].
        code: The code.

    Returns:
        The coded entries, and what the code loses, by tensor name.
    """
    made = {
        name: encode_values(part.indices, part.values, read_base(name), code) for name, part in sorted(parts.items())
    }
    return {name: coded for name, (coded, _) in made.items()}, {name: loss for name, (_, loss) in made.items()}


def note_loss(config: GraftConfig, losses: Mapping[str, CodeLoss], code: ValueCode) -> None:
    """Record what a code loses in an adapter's config, and log where it loses much."""
    provenance = config.record.provenance if config.record else None
    config.note(provenance={**(provenance or {}), "values_error": float(f"{total_loss(losses):.3g}")})
    if note := describe_loss(losses, code):
        _LOG.warning(note)


def _in_names_of(model: nn.Module, donor: Donor) -> Donor:
    """Give a donor's tensors the names that they have in the base."""
    if isinstance(donor, CheckpointDonor):
        return RenamedCheckpoint(donor, model)
    return unwrap(donor, plain_state(model))


def _count(budget: int | dict[str, int] | None) -> int:
    return sum(budget.values()) if isinstance(budget, dict) else int(budget or 0)
