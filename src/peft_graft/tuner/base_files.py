"""Compare a base in memory with its files: what they do not hold is new at every load, and must travel whole."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn

from ..adapter_files.hub_names import cached_commit, public_name
from ..checkpoints.donor import INDEX_FILE, MAX_LISTED, WEIGHTS_FILE, CheckpointDonor, Donor, DonorError
from ..checkpoints.name_mapping import RenamedCheckpoint
from ..checkpoints.wrappers import plain_key, plain_name
from .backends.sharded import is_sharded, whole_shape
from .targets import is_left_alone, is_wrappable

if TYPE_CHECKING:
    from .config import GraftConfig
    from .layer import GraftLayer

# Entries of each tensor that are compared with the files.
_SAMPLES = 8
# Heads that PEFT adds to the modules to save by itself, given a task type that has them.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


class NewTensors(NamedTuple):
    """Parameters of a model that its files do not hold as they are.

    Attributes:
        lacking: Names that the files lack: initialised anew at every load.
        resized: Shapes (in the files, in the model) by name: rows were added or removed after loading.
        tied: Names, among these, of parameters that have several names.
    """

    lacking: list[str]
    resized: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    tied: set[str]


def find_base_files(model: nn.Module) -> RenamedCheckpoint | None:
    """Open the files that a model was loaded from, where they are on this machine; their values are not read.

    Returns:
        The files under the model's names; None for a model that names none, or whose files are no safetensors.
    """
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    path: str | Path | None = name if Path(name).is_dir() else None
    if path is None and public_name(name):
        commit = cached_commit(name, None)
        cached = [try_to_load_from_cache(name, file, revision=commit) for file in (WEIGHTS_FILE, INDEX_FILE) if commit]
        path = next((Path(found).parent for found in cached if isinstance(found, str)), None)
    if path is None:
        return None
    try:
        files = RenamedCheckpoint(CheckpointDonor(path, role="base"), model)
    except DonorError:  # pickles, or a download that is not complete: nothing can be told
        return None
    known = {plain_name(key) for key, _ in model.named_parameters()}
    return files if known & {*files.names()} else None


def find_new_tensors(model: nn.Module, files: RenamedCheckpoint) -> NewTensors:
    """Find the parameters of a model that its files lack, or hold with another number of rows."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(key)
        if name is not None and parameter.is_floating_point():
            names.setdefault(id(parameter), []).append(name)
            parameters[id(parameter)] = parameter
    new = NewTensors([], {}, set())
    for identity, spelt in names.items():
        held = next((name for name in spelt if files.holds(name)), None)
        shape = whole_shape(parameters[identity])
        if held is None:
            new.lacking.extend(spelt)
        elif held in files.names() and files.shape(held) != shape:
            new.resized.update(dict.fromkeys(spelt, (files.shape(held), shape)))
        else:
            continue
        new.tied.update(spelt if len(spelt) > 1 else [])
    return new


def carry_new_modules(config: GraftConfig, model: nn.Module, files: RenamedCheckpoint, donor: Donor) -> None:
    """Name the modules that are new at every load among the modules to save, so that they travel whole.

    Args:
        config: The adapter's config; `modules_to_save` grows.
        model: The base.
        files: The base's files.
        donor: The donor under the base's names; modules that it lacks are left as they are.

    Warns:
        UserWarning: Names the modules.
    """
    new, held = find_new_tensors(model, files), {*donor.names()}
    names = ({*new.lacking} | new.resized.keys()) - new.tied
    owners: dict[str, list[str]] = {}
    for name in sorted(names):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    found = []
    for key, module in model.named_modules():
        plain = plain_key(key)
        if plain not in owners or not plain or not is_wrappable(module) or is_left_alone(config, key):
            continue
        if plain in _TASK_HEADS.get(str(getattr(config.task_type, "value", config.task_type)), ()):
            continue
        wanted = {f"{plain}.{name}" for name, _ in module.named_parameters(recurse=False)}
        if wanted <= held and all(_shape_of(donor, name) == _shape_of_new(new, model, name) for name in wanted):
            found.append(plain)
    if found:
        config.modules_to_save = [*(config.modules_to_save or []), *found]
        warnings.warn(
            f"modules_to_save takes {found} whole from the donor: the base's files in {files.name!r} do not hold these "
            "modules as they are in the model, so they would be new at every load. Pass "
            f"modules_to_save={config.modules_to_save} to say so yourself, or exclude_modules to leave them alone.",
            stacklevel=3,
        )


def refuse_new_targets(model: nn.Module, files: RenamedCheckpoint, targets: Collection[str]) -> None:
    """Refuse targeted tensors that the base's files do not hold, because no later load has their values again.

    Args:
        model: The base.
        files: The base's files.
        targets: Names of the targeted tensors.

    Raises:
        DonorError: Names them, with the argument that leaves them out.
    """
    new = find_new_tensors(model, files)
    found = sorted(({*new.lacking} | new.resized.keys()) & {*targets})
    if not found:
        return
    modules = sorted({name.rpartition(".")[0] for name in found})
    rows = [
        f"{name}: {new.resized[name][0]} there, {new.resized[name][1]} here" for name in found if name in new.resized
    ]
    raise DonorError(
        f"base must hold every targeted tensor in its files, got {files.name!r} without {_listed(found)} as the "
        f"model has them{' (' + '; '.join(rows) + ')' if rows else ''}: they are new at every load, and the adapter "
        "could not be loaded again. Write the base once, base.save_pretrained('path/to/new-base'), load it from there "
        "and graft "
        f"that; or leave them out with exclude_modules={modules}."
    )


def warn_of_rows(model: nn.Module, donor: Donor, carried: Collection[str]) -> None:
    """Tell of donor tensors with another number of rows than the base, of which the adapter carries nothing.

    Args:
        model: The base.
        donor: The donor, under the base's names.
        carried: Names of the tensors that are targeted or taken whole.

    Warns:
        UserWarning: Names the tensors, their rows, and how to carry them.
    """
    held, found = {*donor.names()}, {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        name = plain_name(key)
        if name is None or name in carried or name not in held or not parameter.is_floating_point():
            continue
        ours, theirs = whole_shape(parameter), donor.shape(name)
        if ours[:1] != theirs[:1] and ours[1:] == theirs[1:]:
            found[name] = (ours[0], theirs[0])
    if found:
        first, (ours_rows, theirs_rows) = next(iter(found.items()))
        warnings.warn(
            f"donor should have as many rows as the base, got {theirs_rows} for {ours_rows} in {first!r} "
            f"({len(found)} such tensors), which the adapter does not carry: what the donor learned there, such as "
            "added tokens, is lost. Load the base, call base.resize_token_embeddings"
            f"({theirs_rows}) and base.save_pretrained('path/to/new-base'), and graft that one with "
            "target_modules='all'.",
            stacklevel=3,
        )


def warn_of_changed_values(
    files: RenamedCheckpoint, targets: Mapping[str, tuple[GraftLayer, str]], names: Iterable[str] | None = None
) -> None:
    """Tell of a base whose values in memory are not those of its files: a later load of the files will not fit.

    Args:
        files: The base's files.
        targets: Layer and parameter by the name of each targeted tensor.
        names: Names to look at. Default: all.

    Warns:
        UserWarning: Names the tensors.
    """
    held = {*files.names()}
    changed = [
        name
        for name in (targets if names is None else names)
        if name in held and not _agrees(files, name, targets[name][0].base_parameter(targets[name][1]))
    ]
    if changed:
        warnings.warn(
            f"base should be as its files in {files.name!r} have it, got other values in {_listed(changed)} of "
            f"{len(targets)} targeted tensors (a merged adapter, or further training?). The adapter fits only the base "
            "as it is now: write it once, base.save_pretrained('path/to/new-base'), load it from there and graft that.",
            stacklevel=3,
        )


def _agrees(files: RenamedCheckpoint, name: str, parameter: torch.Tensor) -> bool:
    """Return whether a sample of a tensor is what the files hold, in the precision that it has in memory."""
    if parameter.is_meta or is_sharded(parameter) or not parameter.numel():
        return True
    if files.shape(name) != tuple(parameter.shape):
        return True
    count = parameter.numel()
    positions = sorted({i * (count - 1) // (_SAMPLES - 1) for i in range(_SAMPLES)})
    now = parameter.detach().flatten()[torch.tensor(positions, device=parameter.device)].cpu()
    then = files.entries(name, positions)
    if then is None or not now.is_floating_point():
        return True
    for dtype in (now.dtype, torch.bfloat16, torch.float16):  # loaded in a coarser dtype, and widened later
        rounded = now.to(dtype)
        if torch.equal(rounded.to(now.dtype).nan_to_num(), now.nan_to_num()):
            if torch.equal(then.to(dtype).nan_to_num(), rounded.nan_to_num()):
                return True
    return False


def _shape_of(donor: Donor, name: str) -> tuple[int, ...]:
    return tuple(donor.shape(name))


def _shape_of_new(new: NewTensors, model: nn.Module, name: str) -> tuple[int, ...]:
    if name in new.resized:
        return new.resized[name][1]
    return next(whole_shape(value) for key, value in model.named_parameters() if plain_name(key) == name)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return f"{names[:MAX_LISTED]}{more}"
