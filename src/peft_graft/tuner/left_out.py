"""Find what a graft leaves out of its donor, and say what would take it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..checkpoints.forward_config import read_donor_config
from ..checkpoints.pairing import FLOAT_DTYPES, Donor, DonorError, ZerosDonor, bits_differ, find_names
from ..checkpoints.wrappers import plain_name
from ..peft_compat.transformers_names import is_ignored_on_load
from .backends.offloaded import identity, own_names, real_parameter
from .backends.sharded import whole

_LOG = logging.getLogger(__name__)
_LISTED = 5  # tensors that a line names at most
_MODULES_LISTED = 12  # modules that a ready-made argument names at most


class BaseTensor(NamedTuple):
    """A parameter or buffer of the base.

    Attributes:
        module: The module that owns it.
        attribute: Its name there.
        names: Its names in the unwrapped model; several where it is tied.
        is_buffer: Whether it is a buffer.
    """

    module: nn.Module
    attribute: str
    names: list[str]
    is_buffer: bool

    def values(self) -> torch.Tensor:
        """Return all values, detached; of sharded parameters, every rank must ask together."""
        if self.is_buffer:
            return self.module._buffers[self.attribute].detach()  # type: ignore[union-attr]
        return whole(real_parameter(self.module, self.attribute))


class Comparison(Protocol):
    """Compare values of a base and a donor: in memory, or in files."""

    def base_and_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return the names of the base's tensors that differ from the donor's, by whose names they come."""

    def within_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return those of the donor's tensors that differ from another of the donor, by whose names they come."""


class InMemory:
    """Compare the tensors of a base in memory with those of a donor.

    Args:
        tensors: The base's tensors.
        donor: The donor.
    """

    def __init__(self, tensors: Iterable[BaseTensor], donor: Donor) -> None:
        self._tensors = {name: tensor for tensor in tensors for name in tensor.names}
        self._donor = donor

    def base_and_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return the names of the base's tensors that differ from the donor's."""
        return {
            name
            for name, other in sorted(pairs.items())
            if _differ(self._tensors[name].values(), self._donor.get(other))
        }

    def within_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return those of the donor's tensors that differ from another tensor of the donor."""
        return {name for name, other in pairs.items() if _differ(self._donor.get(name), self._donor.get(other))}


def _differ(base: torch.Tensor, donor: torch.Tensor) -> bool:
    if base.shape != donor.shape:
        return True
    if not {base.dtype, donor.dtype} <= {*FLOAT_DTYPES} or base.is_meta:
        return False
    # As the donor would be loaded beside this base.
    return bool(bits_differ(base, donor.to(base.device, base.dtype)).any())


def base_tensors(model: nn.Module) -> list[BaseTensor]:
    """Find the parameters and buffers of a base, with or without adapters in it; tied parameters once."""
    found: dict[Hashable, BaseTensor] = {}
    for key, module in model.named_modules(remove_duplicate=False):
        prefix = plain_name(key)
        if prefix is None:
            continue
        own = [(name, False, identity(module, name)) for name in own_names(module)]
        own += [(name, True, id(buffer)) for name, buffer in module._buffers.items() if buffer is not None]
        for name, is_buffer, key_of in own:
            tensor = found.setdefault(key_of, BaseTensor(module, name, [], is_buffer))
            full = f"{prefix}.{name}" if prefix else name
            if full not in tensor.names:
                tensor.names.append(full)
    return list(found.values())


def aliases_of(model: nn.Module, donor: Donor) -> dict[str, list[str]]:
    """Find the other names that a tensor may have in the donor, because the base or the donor ties it.

    Args:
        model: The base, with or without adapters in it.
        donor: The donor.

    Returns:
        Other names by name.
    """
    groups = [tensor.names for tensor in base_tensors(model) if len(tensor.names) > 1]
    config = getattr(model, "config", None)
    theirs = read_donor_config(donor, config) if isinstance(config, PretrainedConfig) else None
    if theirs is not None and getattr(theirs, "tie_word_embeddings", False):
        groups.append(_embedding_names(model))
    found: dict[str, list[str]] = {}
    for names in groups:
        for name in names:
            found[name] = list(dict.fromkeys([*found.get(name, []), *(other for other in names if other != name)]))
    return found


def _embedding_names(model: nn.Module) -> list[str]:
    """Return the names of the weights of a model's input and output embeddings, which a checkpoint may tie."""
    if not isinstance(model, PreTrainedModel):
        return []
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    keys = [plain_name(key) for key, module in model.named_modules() if any(module is end for end in ends)]
    return [f"{key}.weight" for key in keys if key]


def tied_modules(model: nn.Module, named: Collection[str]) -> list[str]:
    """Find the modules that share parameters with modules to save, and so must be saved with them.

    Args:
        model: The base.
        named: Names (suffixes) of modules to save. A head alone does not bring the embeddings along.

    Returns:
        Full names of further modules.
    """
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    heads = {plain_name(key) for key, module in model.named_modules() if module is output and output is not None}
    found: list[str] = []
    for tensor in base_tensors(model):
        owners = [name.rpartition(".")[0] for name in tensor.names]
        if len(owners) < 2 or not any(owner.endswith(end) for owner in owners if owner not in heads for end in named):
            continue
        found += [owner for owner in owners if owner and not any(owner.endswith(end) for end in named)]
    return list(dict.fromkeys(found))


def require_nothing_more(model: nn.Module, donor: Donor, allow_extra: bool, patched: Iterable[str] = ()) -> list[str]:
    """Refuse a donor that has tensors within the base's body for which the base has no place.

    Args:
        model: The base, with or without adapters in it.
        donor: The donor.
        allow_extra: Take only what both have.
        patched: The donor's names of the tensors that are targeted.

    Returns:
        Names of the donor's tensors that are left out, such as those of a head that the base's class does not have.

    Raises:
        DonorError: There are some; the message names them.
    """
    if isinstance(donor, ZerosDonor):
        return []
    prefix = getattr(model, "base_model_prefix", "")
    tensors, aliases = base_tensors(model), aliases_of(model, donor)
    names = [name for tensor in tensors for name in tensor.names]
    used = {*patched, *find_names(names, donor, (prefix,) if prefix else (), aliases).values()}
    used |= {spelling for name in names for spelling in (name, f"{prefix}.{name}")}
    extra = [name for name in donor.names() if name not in used and not is_ignored_on_load(model, name)]
    body = [name for name in extra if _is_of_body(model, prefix, name)]
    if body and not allow_extra:
        more = ", ..." if len(body) > _LISTED else ""
        raise DonorError(
            f"donor must have no tensors beyond the base's, got {len(body)} in {donor.name!r} for which "
            f"{type(model).__name__} has no place ({', '.join(body[:_LISTED])}{more}): an extra layer, or another "
            "architecture. Use the base that it was fine-tuned from, or take only what both have: allow_extra=True "
            "(--allow-extra)."
        )
    return extra


def _is_of_body(model: nn.Module, prefix: str, name: str) -> bool:
    """Return whether a tensor belongs to the base's body, and not to a head that its class does not have."""
    if not isinstance(model, PreTrainedModel):
        return True
    backbone = getattr(model, prefix, None) if prefix else None
    parts = {key for each in (model, backbone) if each is not None for key, _ in each.named_children()}
    return name.removeprefix(f"{prefix}." if prefix not in parts else "").partition(".")[0] in parts


def report_left_out(
    model: nn.Module,
    adapter_name: str,
    donor: Donor,
    patched: Mapping[str, str],
    comparison: Comparison,
    extra: Collection[str] = (),
    base_names: Collection[str] | None = None,
) -> None:
    """Say which tensors of the donor differ from the base's but are not taken, and what to type to take them.

    Args:
        model: The base, with the adapter in it.
        adapter_name: Name of the adapter.
        donor: The donor.
        patched: Donor tensor name by the base's name of every targeted tensor.
        comparison: Compares values.
        extra: Names of the donor's tensors for which the base has no place.
        base_names: Names of the tensors whose values the base's files have; None for all.
    """
    if isinstance(donor, ZerosDonor):
        return
    prefix = getattr(model, "base_model_prefix", "")
    prefixes = (prefix,) if prefix else ()
    saved = _saved_names(model, adapter_name)
    aliases = aliases_of(model, donor)
    compared: dict[str, str] = {}
    untied: dict[str, str] = {}
    buffers: set[str] = set()
    tensors = base_tensors(model)
    direct = find_names([name for tensor in tensors for name in tensor.names], donor, prefixes)
    for tensor in tensors:
        names = [name for name in tensor.names if name not in saved]
        taken = next((patched[name] for name in tensor.names if name in patched), None)
        present = {name: direct[name] for name in names if name in direct}
        if taken is not None:
            untied |= {other: taken for other in present.values() if other != taken}
            continue
        if not present and names:
            present = find_names(names[:1], donor, prefixes, aliases)
        if base_names is None or any(name in base_names for name in tensor.names):
            compared |= present
            buffers |= {*present} if tensor.is_buffer else set()
    _warn_of_untied(donor, untied, comparison.within_donor(untied))
    differing = comparison.base_and_donor(compared)
    for line in _lines(model, differing - buffers, differing & buffers, compared.keys() - buffers, extra):
        _LOG.warning(line)


def _saved_names(model: nn.Module, adapter_name: str) -> set[str]:
    """Return the names of the tensors that an adapter takes with its modules to save."""
    return {
        f"{plain_name(key)}.{name}"
        for key, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
        for name in module.modules_to_save[adapter_name].state_dict()
    }


def _warn_of_untied(donor: Donor, pairs: Mapping[str, str], differing: Collection[str]) -> None:
    if not differing:
        return
    names = ", ".join(f"{name} from {pairs[name]}" for name in sorted(differing))
    modules = [name.rpartition(".")[0].rpartition(".")[2] for name in sorted(differing)]
    warnings.warn(
        f"donor must tie the weights that the base ties, got {donor.name!r}, where values differ ({names}): one patch "
        f"cannot hold both, so the graft is not the donor. Take the other one whole: modules_to_save={modules} "
        f"(--modules-to-save {' '.join(modules)}).",
        stacklevel=3,
    )


def _lines(
    model: nn.Module,
    tensors: Collection[str],
    buffers: Collection[str],
    compared: Collection[str],
    extra: Collection[str],
) -> Iterator[str]:
    if tensors:
        modules = _modules_to_save(model, tensors)
        more = f", or these modules whole with modules_to_save={modules}" if modules else ""
        yield (
            f"donor differs from the base in {len(tensors)} of {len(compared)} tensors that are not targeted "
            f"({_listed(tensors)}): the graft keeps the base's, and is not the donor. Take all with "
            f"target_modules='all' (--target-modules all) and no exclude_modules{more}."
        )
    if buffers:
        modules = _modules_to_save(model, buffers)
        yield (
            f"donor has other running statistics than the base in {len(buffers)} buffers ({_listed(buffers)}), which a "
            f"patch cannot hold: the graft keeps the base's, and is not the donor. Take their modules whole: "
            f"modules_to_save={modules} (--modules-to-save {' '.join(modules)})."
        )
    if extra:
        yield (
            f"donor has {len(extra)} tensors for which {type(model).__name__} has no place ({_listed(extra)}): they "
            "are left out."
        )


def _listed(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


def _modules_to_save(model: nn.Module, tensors: Collection[str]) -> list[str]:
    """Return the shortest names of the tensors' modules, as PEFT matches them; none if they are many."""
    wanted = {name.rpartition(".")[0] for name in tensors}
    keys = {plain_name(key) for key, _ in model.named_modules()} - {None}

    def short(key: str) -> str:
        suffix = key.rpartition(".")[2]
        return suffix if {other for other in keys if other and other.endswith(suffix)} <= wanted else key

    found = sorted({short(key) for key in wanted if key})
    return found if len(found) <= _MODULES_LISTED else []
