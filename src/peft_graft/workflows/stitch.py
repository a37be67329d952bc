"""Combine several saved adapters into one, without loading the values of their base."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn

from ..adapter_files.card import carry_card, require_readable_card
from ..adapter_files.hub_names import find_hub_ids
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.combine import stitch_problems
from ..patch.patch import PatchError
from ..tuner import GraftModel
from ..tuner.modules_to_save import fill_modules
from ..tuner.weighted import combine, module_problems
from .adapter_on_base import AdapterOnBase

_ADAPTER = "default"


@dataclass(frozen=True)
class StitchResult:
    """Adapter written by `stitch`.

    Attributes:
        directory: Directory of the adapter.
        entries: Number of entries of its patch.
        conflicts: Number of entries that more than one of the adapters take.
        nbytes: Size of the tensors' file.
    """

    directory: Path
    entries: int
    conflicts: int
    nbytes: int


def stitch(
    adapters: Sequence[str | os.PathLike[str]],
    output_dir: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    modules_to_save_from: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> StitchResult:
    """Write the adapter that `model.add_weighted_adapter(adapters, weights, ...)` would give, from files alone.

    The scale of each adapter is its own alpha times its weight. Each adapter is checked against the base's values.

    Args:
        adapters: Directories or Hub ids of grafts of one base, at least one; `id@revision` for a branch, tag or commit.
        output_dir: Directory of the new adapter; it appears when the adapter is complete.
        weights: A finite number for each adapter. Default: 1.
        combination_type: A name in `peft_graft.patch.combinations.COMBINATIONS`.
        base: Directory or Hub id of the base. Default: the base that the adapters name.
        base_revision: Branch, tag or commit of a base on the Hub.
        modules_to_save_from: The adapter whose modules to save are taken; needed if theirs differ.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        trust_remote_code: Run the code that comes with a base that transformers does not know. Without it, such bases
            are refused; nothing is asked on the terminal.
        overwrite: Replace an adapter that is in `output_dir` already.

    Returns:
        The new adapter's directory, entries and conflicts.

    Raises:
        PatchError: An adapter is no finished graft or belongs to another base, or values overflow.
        ValueError: Arguments are wrong (one message for all of them), or no entry is left.
        FileExistsError: There is an adapter in `output_dir`, and `overwrite` is not set; or it holds one of the
            adapters, the base or another model.
        DonorError: The base cannot be read.
        OSError: An adapter or the base does not exist.
    """
    target = Path(output_dir)
    require_readable_card(target)
    paths = [os.fspath(adapter) for adapter in adapters]
    inputs: dict[str, Any] = {**{f"adapter {number}": path for number, path in enumerate(paths, 1)}, "base": base}
    check_output_dir(target, overwrite, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), inputs)
    weights = [1.0] * len(paths) if weights is None else list(weights)
    wanted = None if modules_to_save_from is None else os.fspath(modules_to_save_from)
    _require_arguments(paths, weights, combination_type, wanted)
    opened = [_open(path, base, base_revision, token, trust_remote_code) for path in paths]
    grafts = dict(zip(_adapter_names(paths), opened, strict=True))
    inputs = {"base": opened[0].base}  # that the adapters name
    check_output_dir(target, overwrite, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), inputs)
    _require_one_base(grafts)
    names = dict(zip(map(_real_path, paths), grafts, strict=True))
    chosen = None if wanted is None else names[_real_path(wanted)]
    source = _modules_to_save_source(grafts, chosen)
    model = _load_together(grafts, source)
    tuner: GraftModel = model.base_model
    read_base, taken_from = _base_reader(grafts), chosen or source
    tuner.adopt(_ADAPTER, *combine(tuner, list(grafts), weights, _ADAPTER, combination_type, taken_from, read_base))
    config = tuner.peft_config[_ADAPTER]
    config.note(provenance={**(config.record.provenance or {}), "modules_to_save_from": chosen})
    with atomic_directory(target, last=CONFIG_NAME) as directory:
        carry_card(target, directory)
        model.save_pretrained(directory, selected_adapters=[_ADAPTER], save_embedding_layers=False)
        nbytes = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return StitchResult(target, config.record.entries or 0, (config.record.provenance or {})["conflicts"], nbytes)


def _require_arguments(
    paths: Sequence[str], weights: Sequence[float], combination_type: str, wanted: str | None
) -> None:
    problems = list(stitch_problems(len(paths), weights, combination_type))
    if not paths:
        problems.append("adapters must be at least one, got none. Give directories or Hub ids.")
    if wanted is not None and _real_path(wanted) not in map(_real_path, paths):
        problems.append(f"modules_to_save_from must be one of the adapters, got {wanted!r}. Choose from {paths}.")
    if problems:
        raise ValueError(" ".join(problems))


def _adapter_names(adapters: Sequence[str]) -> list[str]:
    """Return the last part of each path, followed by a number if another adapter has the same name."""
    found: list[str] = []
    for adapter in adapters:
        stem = name = Path(os.path.abspath(adapter)).name.replace(".", "_")
        number = 1
        while name in (*found, _ADAPTER) or hasattr(nn.ModuleDict, name):  # a ModuleDict holds adapters as attributes
            number += 1
            name = f"{stem}-{number}"
        found.append(name)
    return found


def _real_path(adapter: str) -> str:
    """Return the same string for every spelling of a directory's path; a Hub id is returned unchanged."""
    return os.path.realpath(adapter) if Path(adapter).exists() else adapter


def _open(
    adapter: str,
    base: str | os.PathLike[str] | None,
    base_revision: str | None,
    token: str | bool | None,
    trust_remote_code: bool,
) -> AdapterOnBase:
    repo_id, revision = adapter, None
    if "@" in adapter and not Path(adapter).exists():
        repo_id, _, revision = adapter.rpartition("@")
    return AdapterOnBase(repo_id, base, base_revision, revision, token, trust_remote_code)


def _require_one_base(grafts: Mapping[str, AdapterOnBase]) -> None:
    bases = {name: (graft.base, graft.base_revision) for name, graft in grafts.items()}
    classes = {name: type(graft.model).__name__ for name, graft in grafts.items()}
    if len({(_real_path(base), revision) for base, revision in bases.values()}) > 1:
        named = {name: base if revision is None else f"{base}@{revision}" for name, (base, revision) in bases.items()}
        raise PatchError(f"adapters must be of one base, got {named}. If these are the same, give one of them as base.")
    if len({*classes.values()}) > 1:
        raise PatchError(f"adapters must be for one task, got {classes}. Make them with the same task_type.")


def _modules_to_save_source(grafts: Mapping[str, AdapterOnBase], chosen: str | None) -> str | None:
    """Return the adapter whose modules to save are taken, None if no adapter has any."""
    holders = [name for name, graft in grafts.items() if graft.modules_to_save]
    if not holders:
        return None
    if chosen is not None and chosen not in holders:
        raise ValueError(f"modules_to_save_from must have modules to save, got {chosen!r}. Choose from {holders}.")
    if chosen is not None:
        return chosen
    first = grafts[holders[0]].modules_to_save
    for name in holders[1:]:
        other = grafts[name].modules_to_save
        if first.keys() != other.keys() or not all(torch.equal(first[key], other[key]) for key in first):
            raise ValueError(" ".join(module_problems(holders, chosen, sorted({*first, *other}))))
    return holders[0]


def _load_together(grafts: Mapping[str, AdapterOnBase], source: str | None) -> PeftModel:
    """Return a model without values that holds all adapters, and the modules to save of one of them."""
    for graft in grafts.values():
        graft.config.base_model_name_or_path = graft.base  # the base may have moved
        known = graft.config.record.hub_ids if graft.config.record else None
        graft.config.note(hub_ids=find_hub_ids([graft.base], known))
    first, *others = grafts
    skeleton = grafts[first].build_model(None if source is None else grafts[source].num_labels)
    model = get_peft_model(skeleton, grafts[first].config, adapter_name=first)
    for name in others:
        model.add_adapter(name, grafts[name].config)
    tuner: GraftModel = model.base_model
    _require_modules_to_save(model.base_model.model, grafts, source)
    for name, graft in grafts.items():
        tuner.fill(name, graft.patch)
    if source is not None:
        fill_modules(model.base_model.model, source, grafts[source].modules_to_save)
    return model


def _require_modules_to_save(model: nn.Module, grafts: Mapping[str, AdapterOnBase], source: str | None) -> None:
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
        for tensor in sorted({*wanted, *graft.modules_to_save}):
            here, there = graft.modules_to_save.get(tensor), wanted.get(tensor)
            if here is None or there is None or here.is_floating_point() != there.is_floating_point():
                wrong.append(f"{tensor!r} in {name!r}")
            elif name == source and here.shape != there.shape:  # the others may have another number of classes
                wrong.append(f"{tensor!r} in {name!r}")
    if wrong:
        raise PatchError(
            f"tensors stored whole must be those of the adapter's modules_to_save, got others for {', '.join(wrong)}. "
            "Save or download the adapter again."
        )


def _base_reader(grafts: Mapping[str, AdapterOnBase]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Return a function (name, flat indices) -> the base's values, for entries that any of the adapters patches."""
    known: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for graft in grafts.values():
        for name, part in graft.patch.plain.items():
            for alias in graft.aliases(name):
                indices, values = known.get(alias, (part.indices[:0], graft.base_values(name)[:0]))
                indices, where = torch.cat([indices, part.indices]).unique(return_inverse=True)
                both = torch.cat([values, graft.base_values(name)])
                known[alias] = indices, torch.empty_like(both[: indices.numel()]).index_copy(0, where, both)

    def read(name: str, indices: torch.Tensor) -> torch.Tensor:
        held, values = known[name]
        return values[torch.searchsorted(held, indices)]

    return read
