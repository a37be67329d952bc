"""Write an adapter from the files of a base and a donor, without building either model in memory."""

from __future__ import annotations

import copy
import logging
import os
import tempfile
import warnings
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..adapter_files.card import carry_card, require_readable_card
from ..adapter_files.task_types import TASK_TYPES
from ..checkpoints.block_reader import MAX_WORKERS, PairedReader, map_in_order, worker_pool
from ..checkpoints.donor import Extent
from ..checkpoints.name_mapping import RenamedCheckpoint, auto_class_of, build_skeleton, read_config
from ..checkpoints.pairing import (
    FLOAT_DTYPES,
    Block,
    CheckpointDonor,
    Donor,
    DonorError,
    ZerosDonor,
    bits_differ,
    find_names,
    nothing_to_graft,
    open_donor,
    require_finite,
    resolve_names,
)
from ..checkpoints.wrappers import plain_name
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.fingerprint import FingerprintBuilder
from ..patch.packing import PackedTensor, pack_tensor
from ..patch.patch import Fingerprint, TensorPatch, pack_rows
from ..patch.value_codes import VALUE_CODES, CodeLoss, ValueCode, encode_values
from ..peft_compat.transformers_names import modeling_auto
from ..selection.budget import Budget, capped_note
from ..selection.norm_alpha import energy_of, estimated_note, norm_alpha
from ..selection.rules import SelectionError, get_rule
from ..selection.select import Selected, Selector
from ..tuner import GraftConfig, GraftModel
from ..tuner.base_files import carry_new_modules, warn_of_rows
from ..tuner.build_patch import note_loss
from ..tuner.left_out import aliases_of, base_tensors, report_left_out, require_nothing_more
from ..tuner.modules_to_save import donor_names_of_module, fill_modules, name_modules, names_to_save
from .exact import encode_exact

_LOG = logging.getLogger(__name__)
_ADAPTER = "default"
# Entries that are encoded at the same time, at about 50 bytes each.
_ENTRIES_IN_FLIGHT = 1 << 22
_TASKS = {name: getattr(modeling_auto, task.mapping) for name, task in TASK_TYPES.items() if task.mapping}


@dataclass(frozen=True)
class ExtractResult:
    """Adapter written by `extract`.

    Attributes:
        directory: Directory of the adapter.
        entries: Number of entries taken from the donor.
        eligible: Number of entries that the budget is a share of.
        nbytes: Size of the tensors' file.
        donor_nbytes: Size of the donor's targeted tensors; 0 for `"zeros"`.
    """

    directory: Path
    entries: int
    eligible: int
    nbytes: int
    donor_nbytes: int


def extract(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    density: float | None = None,
    num_params: int | None = None,
    exact: bool = False,
    selection: str = "magnitude",
    budget_scope: str = "global",
    granularity: str = "entry",
    target_modules: Collection[str] | str | None = None,
    exclude_modules: Collection[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    alpha: float | str = 1.0,
    values: str = "donor",
    allow_extra: bool = False,
    task_type: str | None = None,
    seed: int = 0,
    base_revision: str | None = None,
    donor_revision: str | None = None,
    base_subfolder: str | None = None,
    donor_subfolder: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = False,
    **config_options: Any,
) -> ExtractResult:
    """Write the adapter that `get_peft_model(base, GraftConfig(donor=donor, ...)).save_pretrained(output_dir)` would.

    Both checkpoints are streamed, so memory grows with the patch and not with the models: about 60 bytes for each
    entry of the patch up to 21 million entries, and beyond that with the entries taken from the largest tensor.

    Args:
        base: Directory or Hub id of a safetensors checkpoint with its config.json.
        donor: Directory, file or Hub id of the fine-tuned checkpoint, or `"zeros"`.
        output_dir: Directory of the adapter; it appears when the adapter is complete.
        density: Share of the targeted entries to take from the donor, in (0, 1].
        num_params: The same as an integer.
        exact: Take every entry whose bits differ, without a budget: a lossless patch of everything, embeddings and head
            included, unless `target_modules` says otherwise.
        selection: Rule that scores the entries; it must need nothing but weights: `"magnitude"` or `"random"`.
        budget_scope: `"global"`, one budget over all targeted tensors, or `"tensor"`, the same density in each.
        granularity: Take single entries (`"entry"`), or whole `"tensor"`s or `"layer"`s.
        target_modules: Names (suffixes) or a regular expression of the modules to graft, or `"all"`. Default: all but
            embeddings and head; with `exact`, `"all"`.
        exclude_modules: Names or a regular expression of modules to leave alone.
        modules_to_save: Modules to take whole from the donor.
        alpha: Scale of the patch; 1 gives the donor's bits, and `"norm"` is estimated without data (magnitude only).
        values: What is stored of an entry: the donor's value (`"donor"`), or a code of its delta, `"sign"`, `"int4"` or
            `"int8"` (see `GraftConfig`).
        allow_extra: Accept a donor with tensors for which the base has no place, and take only what both have.
        task_type: PEFT's task type, such as `"CAUSAL_LM"`. Default: the task of the donor's architecture.
        seed: Seed of the rule `"random"`.
        base_revision: Branch, tag or commit of a base on the Hub.
        donor_revision: Branch, tag or commit of a donor on the Hub.
        base_subfolder: Folder of the base's directory or repository that holds its checkpoint.
        donor_subfolder: The same of the donor.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        trust_remote_code: Run the code that comes with a model that transformers does not know. Without it, such models
            are refused; nothing is asked on the terminal.
        overwrite: Replace an adapter that is in `output_dir` already.
        show_progress_bar: Show a progress bar of the bytes read.
        **config_options: Further fields of `GraftConfig`, such as `layers_to_transform`.

    Returns:
        The adapter's directory, entries and sizes.

    Raises:
        DonorError: Base or donor cannot be read, do not fit each other, are equal, or are stored in a form that is not
            supported.
        SelectionError: The budget is impossible, or the rule needs data.
        FileExistsError: There is an adapter in `output_dir`, and `overwrite` is not set; or it holds the base, the
            donor or another model.
        OSError: The base does not exist.
        ValueError: An option is out of range.

    Warns:
        UserWarning: An exact patch is larger than the donor; the donor's configuration computes something else than the
            base's; the donor does not tie what the base ties.
    """
    target = Path(output_dir)
    _require_files(donor)
    check_output_dir(target, overwrite, (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME), inputs={"base": base, "donor": donor})
    require_readable_card(target)
    if exact and target_modules is None and not config_options.get("target_parameters"):
        target_modules = "all"
    config = GraftConfig(
        donor=os.fspath(donor),
        donor_revision=donor_revision,
        donor_subfolder=donor_subfolder,
        density=density,
        num_params=num_params,
        selection=selection,
        budget_scope=budget_scope,
        granularity=granularity,
        target_modules=copy.copy(target_modules),  # PEFT extends its lists in place
        exclude_modules=copy.copy(exclude_modules),
        modules_to_save=copy.copy(modules_to_save),
        alpha=alpha,
        values=values,
        allow_extra=allow_extra,
        task_type=task_type,
        seed=seed,
        **config_options,
    )
    _require_no_data(config, exact)
    opened = _open(base, base_revision, base_subfolder, config, token, trust_remote_code)
    result = _write(opened, config, exact, target, show_progress_bar)
    _report(opened)
    return result


def task_of(model: nn.Module) -> str | None:
    """Return PEFT's task type of a model's class, None if PEFT has none for it."""
    name = type(model).__name__
    known = next((task for task, classes in _TASKS.items() if name in classes.values()), None)
    auto_class = auto_class_of(model.config, name) if isinstance(model, PreTrainedModel) else None
    return known or next((task for task, names in TASK_TYPES.items() if names.auto_class == auto_class), None)


def _require_files(donor: object) -> None:
    if not isinstance(donor, str | os.PathLike):
        raise DonorError(
            f"donor must be a directory, a Hub id or 'zeros', got {type(donor).__name__}. "
            "A model in memory is grafted by get_peft_model(base, GraftConfig(donor=model, ...))."
        )


def _require_no_data(config: GraftConfig, exact: bool) -> None:
    """Refuse a configuration that cannot be followed without a model and data."""
    if exact:
        if config.density is not None or config.num_params is not None or config.alpha != 1 or config.values != "donor":
            raise SelectionError(
                "exact must come without a budget, with alpha 1 and with the donor's values, got "
                f"density={config.density!r}, num_params={config.num_params!r}, alpha={config.alpha!r} and "
                f"values={config.values!r}. It takes every entry that differs."
            )
    elif get_rule(config.selection).kind != "data_free" or config.alpha == "auto":
        raise SelectionError(
            f"selection must need no data here, got {config.selection!r} with alpha={config.alpha!r}. Use 'magnitude' "
            "and a number, or load the base and call peft_graft.initialize_graft(model, dataloader)."
        )


class _Opened(NamedTuple):
    """A base and a donor in files, and the base's model without values that has an empty adapter."""

    peft_model: PeftModel
    donor: Donor
    pairs: PairedReader
    base_view: RenamedCheckpoint
    donor_view: RenamedCheckpoint | None
    extra: list[str]


def _open(
    base: str | os.PathLike[str],
    base_revision: str | None,
    base_subfolder: str | None,
    config: GraftConfig,
    token: str | bool | None,
    trust_remote_code: bool,
) -> _Opened:
    base_files = CheckpointDonor(base, base_revision, "base", token, base_subfolder)
    # First, because its errors name the donor.
    donor_files = open_donor(config.donor, config.donor_revision, token, config.donor_subfolder)
    like = None
    if isinstance(donor_files, CheckpointDonor):
        like = read_config(donor_files.source, config.donor_revision, token, trust_remote_code)
    options: dict[str, Any] = {"token": token, "trust_remote_code": trust_remote_code}
    model = build_skeleton(base_files.source, base_revision, like, **options)
    model.name_or_path = base_files.name  # what PEFT records
    base_view = RenamedCheckpoint(base_files, model)
    config.task_type = config.task_type or task_of(model)
    name_modules(config, model, from_file=False)
    if isinstance(donor_files, CheckpointDonor):
        carry_new_modules(config, model, base_view, RenamedCheckpoint(donor_files, model))
    config.note(
        fingerprint={}, base_subfolder=base_subfolder
    )  # marks the adapter as a saved one, so that no patch is made now
    peft_model = get_peft_model(model, config, revision=base_revision)
    tuner: GraftModel = peft_model.base_model
    donor = tuner.open_donor(_ADAPTER, token)
    donor_view = donor if isinstance(donor, RenamedCheckpoint) else None
    pairs = _pair_targets(tuner, base_view, donor_view)
    extra = require_nothing_more(tuner.model, donor_view or donor, config.allow_extra)
    _fill_modules_to_save(tuner, base_view, donor_view)
    warn_of_rows(tuner.model, donor, [*tuner.targets(_ADAPTER), *names_to_save(tuner.model, _ADAPTER)])
    return _Opened(peft_model, donor, pairs, base_view, donor_view, extra)


def _report(opened: _Opened) -> None:
    """Say what the adapter leaves out of its donor."""
    if opened.donor_view is None:
        return
    tuner: GraftModel = opened.peft_model.base_model
    comparison = _InFiles(tuner.model, opened.base_view, opened.donor_view)
    names = tuner.donor_names(_ADAPTER, opened.donor_view)
    report_left_out(tuner.model, _ADAPTER, opened.donor_view, names, comparison, opened.extra, comparison.base_names)


class _InFiles:
    """Compare the tensors of a base with those of a donor, both in files, block by block.

    Args:
        model: The base's model without values.
        base_view: The base's files.
        donor_view: The donor's files.

    Attributes:
        base_names: The model's names of the tensors whose values the base's files have.
    """

    def __init__(self, model: nn.Module, base_view: RenamedCheckpoint, donor_view: RenamedCheckpoint) -> None:
        self._base, self._donor = base_view, donor_view
        self._tensors = {name: tensor for tensor in base_tensors(model) for name in tensor.names}
        prefix = getattr(model, "base_model_prefix", "")
        aliases = {name: [other for other in tensor.names if other != name] for name, tensor in self._tensors.items()}
        self.base_names = find_names(self._tensors, base_view, (prefix,) if prefix else (), aliases)

    def base_and_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return the names of the base's tensors that differ from the donor's."""
        dtypes = {name: self._tensors[name].values().dtype for name in pairs}
        ours = {name: (self._base, self.base_names[name]) for name in pairs if name in self.base_names}
        return self._differing(ours, {name: pairs[name] for name in ours}, dtypes)

    def within_donor(self, pairs: Mapping[str, str]) -> set[str]:
        """Return those of the donor's tensors that differ from another tensor of the donor."""
        return self._differing({name: (self._donor, name) for name in pairs}, pairs, {})

    def _differing(
        self,
        ours: Mapping[str, tuple[RenamedCheckpoint, str]],
        theirs: Mapping[str, str],
        dtypes: Mapping[str, torch.dtype],
    ) -> set[str]:
        found: set[str] = set()
        sides: tuple[dict[str, list[Extent]], dict[str, list[Extent]]] = ({}, {})
        for name, (view, stored) in ours.items():
            if view.shape(stored) != self._donor.shape(theirs[name]):
                found.add(name)
                continue
            one, other = view.extents(stored), self._donor.extents(theirs[name])
            if {extent.dtype for extent in (*one, *other)} <= {*FLOAT_DTYPES}:
                sides[0][name], sides[1][name] = one, other

        def differs(block: Block) -> bool:
            return bool(bits_differ(block.base, block.donor.to(block.base.dtype)).any())

        if sides[0]:
            reader = PairedReader(*sides, {name: dtype for name, dtype in dtypes.items() if name in sides[0]})
            found |= {span.name for span, result in reader.map(differs) if result}
        return found


def _pair_targets(
    tuner: GraftModel, base_view: RenamedCheckpoint, donor_view: RenamedCheckpoint | None
) -> PairedReader:
    """Return a reader of the targeted tensors in both checkpoints."""
    targets = tuner.targets(_ADAPTER)
    extents = []
    for view in (base_view, donor_view):
        if view is not None:
            names = tuner.donor_names(_ADAPTER, view)
            extents.append({name: view.extents(names[name]) for name in targets})
    dtypes = {name: layer.base_parameter(param).dtype for name, (layer, param) in targets.items()}
    return PairedReader(extents[0], extents[1] if donor_view is not None else None, dtypes)


def _fill_modules_to_save(
    tuner: GraftModel, base_view: RenamedCheckpoint, donor_view: RenamedCheckpoint | None
) -> None:
    """Give the modules to save the donor's values, or a task's head the base's if the donor lacks it."""
    model, config = tuner.model, tuner.peft_config[_ADAPTER]
    tensors: dict[str, torch.Tensor] = {}
    for key, module in model.named_modules():
        if not isinstance(module, ModulesToSaveWrapper) or _ADAPTER not in module.modules_to_save:
            continue
        copied, plain = module.modules_to_save[_ADAPTER], plain_name(key)
        view = base_view if donor_view is None else donor_view
        names = donor_names_of_module(model, _ADAPTER, key, module, donor_view or ZerosDonor(), config)
        if names is None:
            prefix = getattr(model, "base_model_prefix", "")
            view = base_view
            wanted = {f"{plain}.{name}": tuple(value.shape) for name, value in copied.named_parameters()}
            names = resolve_names(
                wanted, view, (prefix,) if prefix else (), aliases_of(model, view), are_saved_whole=True
            )
            names |= find_names([f"{plain}.{name}" for name in copied.state_dict()], view)
        if view is donor_view and donor_view is not None:
            _require_finite(donor_view, base_view, names)
        loaded = {
            name.removeprefix("base_layer."): value for name, value in module.original_module.state_dict().items()
        }
        for name, empty in copied.state_dict().items():
            stored = names.get(f"{plain}.{name}")
            # A counter that neither file has starts at zero.
            found = torch.zeros(empty.shape) if stored is None else view.get(stored)
            # Rounded to the base's dtype first, as a copy of the base's own module would be.
            tensors[f"{plain}.{name}"] = found.to(loaded.get(name, empty).dtype).to(empty.dtype)
    fill_modules(model, _ADAPTER, tensors)


def _require_finite(donor_view: RenamedCheckpoint, base_view: RenamedCheckpoint, names: Mapping[str, str]) -> None:
    """Refuse modules to save that hold NaN or Inf, except where the base has the same."""
    held = {*base_view.names()}
    for name, donor_name in names.items():
        theirs = donor_view.get(donor_name)
        if theirs.is_floating_point():
            is_there = name in held and base_view.shape(name) == tuple(theirs.shape)
            ours = base_view.get(name) if is_there else torch.zeros_like(theirs)
            require_finite(name, ours, theirs, donor_view.name)


def _write(opened: _Opened, config: GraftConfig, exact: bool, target: Path, show_progress_bar: bool) -> ExtractResult:
    """Select the entries and write the adapter."""
    pairs = opened.pairs
    budget = Budget(config.density, config.num_params, config.budget_scope, config.granularity)
    rule, estimates = None if exact else get_rule(config.selection), config.alpha == "norm"
    selector = Selector(pairs, rule, budget, seed=config.seed, measures_energy=estimates)
    # The configuration is put in place last: until then, the old one refuses the new tensors.
    with ExitStack() as stack:
        directory = stack.enter_context(atomic_directory(target, last=CONFIG_NAME))
        files = [stack.enter_context(tempfile.TemporaryFile(dir=directory)) for _ in range(2)]
        total, disable = sum(pairs.nbytes) * selector.passes, not show_progress_bar
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading", disable=disable) as bar:
            pairs.on_read = bar.update
            spills = [_SpillFile(file) for file in files]
            if exact:
                packed = _encode_exact(opened, spills[0])
            else:
                packed = _encode(selector, spills[0], spills[1], VALUE_CODES.get(config.values))
        if not (packed.entries if exact else selector.differs):
            raise nothing_to_graft(opened.donor, selector.eligible)
        if estimates:
            alpha = norm_alpha(selector.energy, packed.energy)
            opened.peft_model.peft_config[_ADAPTER].alpha = alpha
            _LOG.warning(estimated_note(alpha))
        _install(opened.peft_model, packed, selector.eligible, exact)
        carry_card(target, directory)
        # Rows of embeddings travel as any other; PEFT would look for the base's config.json to tell.
        opened.peft_model.save_pretrained(directory, save_embedding_layers=False)
        nbytes = (directory / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    if note := capped_note(budget, selector.wanted, packed.entries, selector.eligible):
        _LOG.warning(note)
    donor_nbytes = pairs.nbytes[1]
    if exact and 0 < donor_nbytes <= nbytes:
        warnings.warn(
            f"patch should be smaller than the donor, got {nbytes:,} bytes, where the donor has {donor_nbytes:,} "
            f"({packed.entries:,} of {selector.eligible:,} entries differ). Keep the donor itself, or give a density.",
            stacklevel=3,
        )
    return ExtractResult(target, packed.entries, selector.eligible, nbytes, donor_nbytes)


class _Slice(NamedTuple):
    """Location of a tensor in a spill file."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


class _SpillFile:
    """Hold tensors in a file until all of them are needed, then map them, so that they need not fit in memory."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._end = 0

    def put(self, tensor: torch.Tensor) -> _Slice:
        """Write a tensor and return its location."""
        offset = self._end
        self._file.seek(offset)
        self._file.write(tensor.contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
        self._end += -(-tensor.nbytes // 8) * 8
        return _Slice(offset, tensor.dtype, tensor.shape)

    def append(self, data: torch.Tensor) -> None:
        """Write bytes right after the last ones."""
        self._file.seek(self._end)
        self._file.write(data.numpy().data)
        self._end += data.numel()

    def map_whole(self) -> torch.Tensor:
        """Return all bytes, uint8, which are read from the file when they are used."""
        self._file.flush()
        return self._map(0, torch.uint8, torch.Size([self._end]))

    def map_all(self, slices: dict[str, _Slice]) -> dict[str, torch.Tensor]:
        """Return tensors that read from the file when they are used."""
        self._file.flush()
        return {name: self._map(*where) for name, where in slices.items()}

    def _map(self, offset: int, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        if not shape.numel():
            return torch.empty(shape, dtype=dtype)
        mapped = np.memmap(self._file, np.uint8, mode="r+", offset=offset, shape=shape.numel() * dtype.itemsize)
        return torch.from_numpy(mapped).view(dtype).view(shape)


@dataclass
class _PackedPatch:
    """A patch as its file holds it, in a spill file, the fingerprint of its base, and what its code loses."""

    tensors: dict[str, torch.Tensor]
    fingerprint: Fingerprint
    entries: int
    energy: float
    losses: dict[str, CodeLoss]


def _encode(selector: Selector, spill: _SpillFile, base_spill: _SpillFile, code: ValueCode | None) -> _PackedPatch:
    """Encode the selected entries tensor by tensor, several tensors at a time."""
    rows: dict[str, tuple[str, list[int]]] = {}
    base_values: dict[str, _Slice] = {}
    entries, energy = 0, 0.0
    losses: dict[str, CodeLoss] = {}
    workers = min(torch.get_num_threads(), MAX_WORKERS)
    with worker_pool(workers) as pool:
        encode = partial(_encode_one, code=code)
        found = map_in_order(pool, encode, selector.entries(), 2 * workers, _count, _ENTRIES_IN_FLIGHT)
        for selected, packed, loss, written in found:
            if loss is not None:
                losses[selected.name] = loss
            rows[selected.name] = packed.code, packed.row
            spill.append(packed.data)
            base_values[selected.name] = base_spill.put(selected.base)
            entries += selected.indices.numel()
            energy += written
    fingerprint = Fingerprint.compute(base_spill.map_all(base_values))
    return _PackedPatch(pack_rows(rows, spill.map_whole()), fingerprint, entries, energy, losses)


def _encode_exact(opened: _Opened, spill: _SpillFile) -> _PackedPatch:
    """Encode every tensor that differs, whole."""
    rows: dict[str, tuple[str, list[int]]] = {}
    entries, fingerprint = 0, FingerprintBuilder()
    covered: dict[str, torch.Tensor] = {}
    for tensor in encode_exact(opened.pairs, fingerprint):
        packed = pack_tensor(tensor.part)
        rows[tensor.name] = packed.code, packed.row
        spill.append(packed.data)
        entries += tensor.part.count
        if tensor.base_values is not None:
            covered[tensor.name] = tensor.base_values
    names = opened.peft_model.base_model.donor_names(_ADAPTER, opened.base_view)

    def read(name: str, positions: list[int]) -> torch.Tensor:
        if name in covered:
            return covered[name][positions]
        found = opened.base_view.entries(names[name], positions)
        return cast(torch.Tensor, found).to(opened.pairs.dtype(name))

    return _PackedPatch(pack_rows(rows, spill.map_whole()), fingerprint.finish(read), entries, 0.0, {})


def _count(selected: Selected) -> int:
    return selected.indices.numel()


def _encode_one(selected: Selected, code: ValueCode | None) -> tuple[Selected, PackedTensor, CodeLoss | None, float]:
    """Encode one tensor's entries; return also what the code loses, and the sum of squares of the written deltas."""
    if code is None:
        part = TensorPatch(selected.indices, selected.donor)
        part.validate(selected.name)
        return selected, pack_tensor(part), None, energy_of(selected.donor, selected.base)
    coded, loss = encode_values(selected.indices, selected.donor, selected.base, code)
    coded.validate(selected.name)
    return selected, pack_tensor(coded), loss, energy_of(coded.decode_entries(selected.base), selected.base)


def _install(peft_model: PeftModel, packed: _PackedPatch, eligible: int, exact: bool) -> None:
    """Put the patch into the empty adapter, from where `save_pretrained` writes it like any other."""
    config, state = peft_model.peft_config[_ADAPTER], peft_model.base_model.states[_ADAPTER]
    config.note(eligible=eligible, entries=packed.entries, fingerprint=packed.fingerprint.to_dict())
    if (code := VALUE_CODES.get(config.values)) is not None:
        note_loss(config, packed.losses, code)
    if exact:
        config.note(provenance={**(config.record.provenance or {}), "exact": True})
    state.packed, state.awaits_file, state.ready = packed.tensors, False, True
