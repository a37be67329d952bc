"""From a base and a donor in files to an adapter's directory, without building either model."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn
from tqdm import tqdm
from transformers.models.auto import modeling_auto

from ..checkpoints.block_reader import MAX_WORKERS, PairedReader, map_in_order, worker_pool
from ..checkpoints.name_mapping import RenamedCheckpoint, build_skeleton, read_config
from ..checkpoints.pairing import CheckpointDonor, DonorError, ZerosDonor, nothing_to_graft, open_donor, resolve_names
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.patch import Fingerprint, Patch, TensorPatch
from ..selection.budget import Budget
from ..selection.rules import SelectionError, get_rule
from ..selection.select import Selected, Selector
from ..tuner import GraftConfig, GraftModel

_ADAPTER = "default"
# Entries that are coded at the same time, at some 50 bytes each.
_ROOM = 1 << 22
_Place = tuple[int, torch.dtype, torch.Size]  # offset in a file, and what stands there
_TASKS = {
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "CAUSAL_LM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "SEQ_2_SEQ_LM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Extraction:
    """What `extract` has written.

    Attributes:
        directory: Where the adapter is.
        entries: How many entries it takes from the donor.
        eligible: How many it might have taken.
        nbytes: Size of its tensors' file.
        donor_nbytes: Size of the donor's targeted tensors; 0 for `"zeros"`.
    """

    directory: Path
    entries: int
    eligible: int
    nbytes: int
    donor_nbytes: int


def extract(
    base: str | os.PathLike[str],
    config: GraftConfig,
    output_dir: str | os.PathLike[str],
    *,
    base_revision: str | None = None,
    exact: bool = False,
    overwrite: bool = False,
    progress: bool = False,
) -> Extraction:
    """Write the adapter that `get_peft_model(base, config).save_pretrained(output_dir)` would, from files alone.

    The files are read piece by piece, so memory grows with the patch, not with the models: about 60 bytes for each
    entry of the patch up to 21 million entries, and beyond that with the entries taken from the largest tensor.

    Args:
        base: Directory or Hub id of a safetensors checkpoint with its config.json.
        config: What to graft. `donor` must name a checkpoint or be `"zeros"`, and `selection` a rule that needs nothing
            but weights. Where `task_type` is not given, the donor's architecture tells it.
        output_dir: The adapter's directory; it appears when the adapter is whole.
        base_revision: Branch, tag or commit of a base on the Hub.
        exact: Take every entry whose bits differ: no budget, and a lossless patch of all that is targeted.
        overwrite: Replace an adapter that is in `output_dir` already.
        progress: Show a progress bar with bytes and the time left.

    Returns:
        What was written.

    Raises:
        DonorError: Base and donor cannot be read, do not fit, are equal, or are stored in a form that is not supported.
        SelectionError: The budget is impossible, or the rule needs data.
        FileExistsError: There is an adapter in `output_dir`, and `overwrite` is not set.
        OSError: There is no such base.

    Warns:
        UserWarning: An exact patch is larger than the donor.
    """
    target = Path(output_dir)
    check_output_dir(target, overwrite, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    config = _checked(config, exact)
    base_files = CheckpointDonor(base, base_revision, role="base")
    open_donor(config.donor, config.donor_revision)  # whose errors call it the donor
    like = None if config.donor == ZerosDonor.name else read_config(config.donor, config.donor_revision)
    model = build_skeleton(base, base_revision, like)
    ours = RenamedCheckpoint(base_files, model)
    config.task_type = config.task_type or task_of(model)
    peft_model = _with_empty_adapter(model, config, base_revision)
    tuner: GraftModel = peft_model.base_model
    donor = tuner.open_donor(_ADAPTER)
    theirs = donor if isinstance(donor, RenamedCheckpoint) else None
    pairs = _pairs(tuner, ours, theirs)
    _fill_heads(tuner.model, ours, theirs)
    selector = Selector(
        pairs,
        None if exact else get_rule(config.selection),
        Budget(config.density, config.num_params, config.scope, config.granularity),
        seed=config.seed,
    )
    # The configuration last: until then, the old one refuses the new tensors.
    with atomic_directory(target, last=CONFIG_NAME) as directory, tempfile.TemporaryFile(dir=directory) as file:
        with tqdm(
            total=sum(pairs.nbytes) * selector.passes, unit="B", unit_scale=True, desc="reading", disable=not progress
        ) as bar:
            pairs.on_read = bar.update
            kept = _take(selector, _Shelf(file))
        if not (kept.entries if exact else selector.differs):
            raise nothing_to_graft(donor, selector.eligible)
        _complete(peft_model, kept, selector.eligible, exact)
        peft_model.save_pretrained(directory)
        nbytes = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    donor_nbytes = pairs.nbytes[1]
    if exact and theirs is not None and nbytes >= donor_nbytes:
        warnings.warn(
            f"patch should be smaller than the donor, got {nbytes:,} bytes, where the donor has {donor_nbytes:,} "
            f"({kept.entries:,} of {selector.eligible:,} entries differ). Keep the donor itself, or give a density.",
            stacklevel=2,
        )
    return Extraction(target, kept.entries, selector.eligible, nbytes, donor_nbytes)


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's name of the task that a model's class is made for, None where it has no name for it."""
    return next((task for task, classes in _TASKS.items() if type(model).__name__ in classes.values()), None)


def _checked(config: GraftConfig, exact: bool) -> GraftConfig:
    """A copy of the configuration, if it can be followed without a model."""
    if not isinstance(config.donor, str | os.PathLike):
        raise DonorError(
            f"donor must be a directory, a Hub id or 'zeros', got {type(config.donor).__name__}. "
            "A model in memory is grafted by get_peft_model(base, config)."
        )
    if exact:
        if config.density is not None or config.num_params is not None or config.alpha != 1:
            raise SelectionError(
                f"exact must come without a budget and with alpha 1, got density={config.density!r}, "
                f"num_params={config.num_params!r} and alpha={config.alpha!r}. It takes every entry that differs."
            )
    elif get_rule(config.selection).kind != "data_free" or config.alpha == "auto":
        raise SelectionError(
            f"selection must need no data here, got {config.selection!r} with alpha={config.alpha!r}. Use 'magnitude' "
            "and a number, or load the base and call peft_graft.initialize_graft(model, dataloader)."
        )
    config = copy.deepcopy(config)  # PEFT extends its lists in place
    config.donor = os.fspath(config.donor)
    return config


def _with_empty_adapter(model: nn.Module, config: GraftConfig, revision: str | None) -> PeftModel:
    config.fingerprint = {}  # as a saved adapter has one: the patch comes from elsewhere
    return get_peft_model(model, config, revision=revision)


def _pairs(tuner: GraftModel, ours: RenamedCheckpoint, theirs: RenamedCheckpoint | None) -> PairedReader:
    """What is targeted, as it stands in the files."""
    targets = tuner.targets(_ADAPTER)
    extents = []
    for view in (ours, theirs):
        if view is not None:
            names = tuner.donor_names(_ADAPTER, view)
            extents.append({name: view.extents(names[name]) for name in targets})
    dtypes = {name: layer.base_parameter(param).dtype for name, (layer, param) in targets.items()}
    return PairedReader(extents[0], extents[1] if theirs is not None else None, dtypes)


def _fill_heads(model: nn.Module, ours: RenamedCheckpoint, theirs: RenamedCheckpoint | None) -> None:
    """Give the modules to save the donor's values, or the base's where the donor lacks them."""
    for key, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or _ADAPTER not in module.modules_to_save:
            continue
        head = module.modules_to_save[_ADAPTER]
        wanted = {f"{key}.{name}": tuple(value.shape) for name, value in head.named_parameters()}
        view = theirs if theirs is not None and wanted.keys() <= {*theirs.names()} else ours
        names = resolve_names(wanted, view)
        loaded = module.original_module.state_dict()
        values = {
            # Through the dtype of the base, as a copy of the base's module that is given these values would be.
            name: view.get(names.get(f"{key}.{name}", f"{key}.{name}")).to(loaded[name].dtype).to(empty.dtype)
            for name, empty in head.state_dict().items()
        }
        head.load_state_dict(values, assign=True)


class _Shelf:
    """Tensors in a file until all are needed together; then mapped, so that they need not fit in memory."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._end = 0

    def put(self, tensor: torch.Tensor) -> _Place:
        """Write a tensor; what is returned gets it back."""
        place = self._end
        self._file.seek(place)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
        self._end += -(-tensor.nbytes // 8) * 8
        return place, tensor.dtype, tensor.shape

    def get_all(self, places: dict[str, _Place]) -> dict[str, torch.Tensor]:
        """Map tensors."""
        self._file.flush()
        return {name: self._get(*place) for name, place in places.items()}

    def _get(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(self._file, np.uint8, mode="r+", offset=offset, shape=shape.numel() * dtype.itemsize)
        return torch.from_numpy(mapped).view(dtype).view(shape)


@dataclass
class _Kept:
    """What a patch is made of, on the shelf."""

    packed: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    entries: int


def _take(selector: Selector, shelf: _Shelf) -> _Kept:
    packed: dict[str, _Place] = {}
    base: dict[str, _Place] = {}
    entries = 0
    workers = min(torch.get_num_threads(), MAX_WORKERS)
    with worker_pool(workers) as pool:
        for selected, coded in map_in_order(pool, _coded, selector.entries(), 2 * workers, _entries, _ROOM):
            packed |= {key: shelf.put(tensor) for key, tensor in coded.items()}
            base[selected.name] = shelf.put(selected.base)
            entries += selected.indices.numel()
    return _Kept(shelf.get_all(packed), shelf.get_all(base), entries)


def _entries(selected: Selected) -> int:
    return selected.indices.numel()


def _coded(selected: Selected) -> tuple[Selected, dict[str, torch.Tensor]]:
    return selected, Patch({selected.name: TensorPatch(selected.indices, selected.donor)}).to_tensors()


def _complete(peft_model: PeftModel, kept: _Kept, eligible: int, exact: bool) -> None:
    """Let PEFT's own way of saving find what was taken, so that nobody can tell how the adapter was made."""
    config, state = peft_model.peft_config[_ADAPTER], peft_model.base_model.states[_ADAPTER]
    config.eligible, config.entries = eligible, kept.entries
    config.fingerprint = Fingerprint.compute(kept.base).to_dict()
    kept.base.clear()  # unmapped before the rest is read
    if exact:
        config.provenance = {**(config.provenance or {}), "exact": True}
    state.packed, state.awaits_file, state.ready = kept.packed, False, True
