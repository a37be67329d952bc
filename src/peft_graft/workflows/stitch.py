"""From several adapters in files to the one that combines them, without the values of their base in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn

from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.combine import stitch_problems
from ..patch.patch import PatchError
from ..tuner import GraftModel
from ..tuner.weighted import combine, head_problems
from .adapter_on_base import StoredGraft

_ADAPTER = "default"


@dataclass(frozen=True)
class Stitched:
    """What `stitch_adapters` has written.

    Attributes:
        directory: Where the adapter is.
        entries: Entries of its patch.
        conflicts: Entries that more than one of the adapters take.
        nbytes: Size of its tensors' file.
    """

    directory: Path
    entries: int
    conflicts: int
    nbytes: int


def stitch_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination: str = "linear",
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    modules_to_save_from: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Stitched:
    """Write the adapter that `model.add_weighted_adapter(adapters, weights, ...)` would give, from files alone.

    Each adapter counts with its own alpha, times its weight, and is checked against the base's values.

    Args:
        adapters: Directories or Hub ids of grafts of one base, at least one; `id@revision` for a branch, tag or commit.
        output_dir: The new adapter's directory; it appears when the adapter is whole.
        weights: A finite number for each; 1 by default.
        combination: A name in `COMBINATIONS`.
        base: The base's directory or Hub id; by default the one that the adapters name.
        base_revision: Branch, tag or commit of a base on the Hub.
        modules_to_save_from: Which of the adapters to take task heads from, needed where theirs differ.
        overwrite: Replace an adapter that is in `output_dir` already.

    Returns:
        What was written.

    Raises:
        PatchError: An adapter is no finished graft or belongs to another base, or values overflow.
        ValueError: One message for all arguments that are wrong; or no entry is left.
        FileExistsError: There is an adapter in `output_dir`, and `overwrite` is not set.
        DonorError: The base cannot be read.
        OSError: There is no such adapter or base.
    """
    target = Path(output_dir)
    check_output_dir(target, overwrite, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    given = [os.fspath(adapter) for adapter in adapters]
    weights = [1.0] * len(given) if weights is None else list(weights)
    problems = list(stitch_problems(len(given), weights, combination))
    if not given:
        problems.append("adapters must be at least one, got none. Give directories or Hub ids.")
    wanted = None if modules_to_save_from is None else os.fspath(modules_to_save_from)
    if wanted is not None and _place(wanted) not in map(_place, given):
        problems.append(f"modules_to_save_from must be one of the adapters, got {wanted!r}. Choose from {given}.")
    if problems:
        raise ValueError(" ".join(problems))
    grafts = dict(zip(_names(given), [_open(each, base, base_revision) for each in given], strict=True))
    _require_one_base(grafts)
    names = dict(zip(map(_place, given), grafts, strict=True))
    chosen = None if wanted is None else names[_place(wanted)]
    source = _head_source(grafts, chosen)
    model = _together(grafts, source)
    tuner: GraftModel = model.base_model
    tuner.adopt(
        _ADAPTER, *combine(tuner, list(grafts), weights, _ADAPTER, combination, chosen or source, _base_of(grafts))
    )
    config = tuner.peft_config[_ADAPTER]
    config.provenance = {**(config.provenance or {}), "modules_to_save_from": chosen}
    with atomic_directory(target, last=CONFIG_NAME) as directory:
        model.save_pretrained(directory, selected_adapters=[_ADAPTER])
        nbytes = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return Stitched(target, config.entries or 0, (config.provenance or {})["conflicts"], nbytes)


def _names(adapters: Sequence[str]) -> list[str]:
    """The last part of each path, told apart by a number where several have the same."""
    found: list[str] = []
    for adapter in adapters:
        stem = name = Path(os.path.abspath(adapter)).name.replace(".", "_")
        number = 1
        while name in (*found, _ADAPTER) or hasattr(nn.ModuleDict, name):  # which keeps adapters as attributes
            number += 1
            name = f"{stem}-{number}"
        found.append(name)
    return found


def _place(adapter: str) -> str:
    """A directory however its path is written, a Hub id as it is."""
    return os.path.realpath(adapter) if Path(adapter).exists() else adapter


def _open(adapter: str, base: str | os.PathLike[str] | None, base_revision: str | None) -> StoredGraft:
    if Path(adapter).exists() or "@" not in adapter:
        return StoredGraft(adapter, base, base_revision)
    repo_id, _, revision = adapter.rpartition("@")
    return StoredGraft(repo_id, base, base_revision, revision)


def _require_one_base(grafts: Mapping[str, StoredGraft]) -> None:
    bases = {name: (graft.base, graft.base_revision) for name, graft in grafts.items()}
    classes = {name: type(graft.model).__name__ for name, graft in grafts.items()}
    if len({(_place(base), revision) for base, revision in bases.values()}) > 1:
        named = {name: base if revision is None else f"{base}@{revision}" for name, (base, revision) in bases.items()}
        raise PatchError(f"adapters must be of one base, got {named}. If these are the same, give one of them as base.")
    if len({*classes.values()}) > 1:
        raise PatchError(f"adapters must be for one task, got {classes}. Make them with the same task_type.")


def _head_source(grafts: Mapping[str, StoredGraft], chosen: str | None) -> str | None:
    """The adapter whose modules to save are taken; None where none has any."""
    holders = [name for name, graft in grafts.items() if graft.heads]
    if not holders:
        return None
    if chosen is not None and chosen not in holders:
        raise ValueError(f"modules_to_save_from must have modules to save, got {chosen!r}. Choose from {holders}.")
    if chosen is not None:
        return chosen
    first = grafts[holders[0]].heads
    for name in holders[1:]:
        other = grafts[name].heads
        if first.keys() != other.keys() or not all(torch.equal(first[key], other[key]) for key in first):
            raise ValueError(" ".join(head_problems(holders, chosen, sorted({*first, *other}))))
    return holders[0]


def _together(grafts: Mapping[str, StoredGraft], source: str | None) -> PeftModel:
    """A model without values that holds all the adapters, and the modules to save of one."""
    for graft in grafts.values():
        graft.config.base_model_name_or_path = graft.base  # which may have moved
    first, *others = grafts
    skeleton = grafts[first].skeleton(None if source is None else grafts[source].labels)
    model = get_peft_model(skeleton, grafts[first].config, adapter_name=first)
    for name in others:
        model.add_adapter(name, grafts[name].config)
    tuner: GraftModel = model.base_model
    _require_heads(model.base_model.model, grafts, source)
    for name, graft in grafts.items():
        tuner.fill(name, graft.patch)
    for key, module in model.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and source in module.modules_to_save:
            held = {name: value for name, value in grafts[str(source)].heads.items() if name.startswith(f"{key}.")}
            values = {name.removeprefix(f"{key}."): value for name, value in held.items()}
            module.modules_to_save[source].load_state_dict(values, assign=True)
    return model


def _require_heads(model: nn.Module, grafts: Mapping[str, StoredGraft], source: str | None) -> None:
    """Refuse files in which tensors of modules to save are missing, or of which something would be left out."""
    wrappers = {key: module for key, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    wrong = []
    for name, graft in grafts.items():
        wanted = {
            f"{key}.{param}": value
            for key, module in wrappers.items()
            if name in module.modules_to_save
            for param, value in module.modules_to_save[name].state_dict().items()
        }
        for tensor in sorted({*wanted, *graft.heads}):
            here, there = graft.heads.get(tensor), wanted.get(tensor)
            if here is None or there is None or here.is_floating_point() != there.is_floating_point():
                wrong.append(f"{tensor!r} in {name!r}")
            elif name == source and here.shape != there.shape:  # others may tell other classes apart
                wrong.append(f"{tensor!r} in {name!r}")
    if wrong:
        raise PatchError(
            f"tensors stored whole must be those of the adapter's modules_to_save, got others for {', '.join(wrong)}. "
            "Save or download the adapter again."
        )


def _base_of(grafts: Mapping[str, StoredGraft]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """A function for the base's entries where any of the adapters has a patch."""
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for graft in grafts.values():
        for name, part in graft.patch.tensors.items():
            for alias in graft.aliases(name):
                indices, values = known.get(alias, (part.indices[:0], graft.base_entries(name)[:0]))
                indices, where = torch.cat([indices, part.indices]).unique(return_inverse=True)
                both = torch.cat([values, graft.base_entries(name)])
                known[alias] = indices, torch.empty_like(both[: indices.numel()]).index_copy(0, where, both)

    def read(name: str, indices: torch.Tensor) -> torch.Tensor:
        held, values = known[name]
        return values[torch.searchsorted(held, indices)]

    return read
