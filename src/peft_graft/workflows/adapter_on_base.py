"""A saved adapter on the files of its base: the values it writes, tensor by tensor, without loading a model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from ..adapter_files.hub_names import CONFIG_FILE
from ..adapter_files.summary import WEIGHTS_FILE, SavedAdapter, fetch_adapter, read_saved
from ..adapter_files.task_types import task_names
from ..checkpoints.donor import Extent
from ..checkpoints.name_mapping import RenamedCheckpoint, build_skeleton, read_config
from ..checkpoints.pairing import CheckpointDonor, DonorError, resolve_names
from ..patch.arithmetic import grafted_values
from ..patch.fingerprint import FingerprintBuilder
from ..patch.patch import Fingerprint, Patch, PatchError, TensorPatch, require_rows
from ..tuner import GraftConfig


class FileEdit(NamedTuple):
    """The entries that a patch replaces in one tensor of a checkpoint's files.

    Attributes:
        name: Name of the tensor in the files.
        extent: Location of the tensor in the files.
        indices: Flat indices in the tensor, int64 [n], increasing.
        values: New values of these entries, float [n], in the dtype of the file.
        base_values: The file's own values of these entries, float [n].
    """

    name: str
    extent: Extent
    indices: torch.Tensor
    values: torch.Tensor
    base_values: torch.Tensor


class WholeEdit(NamedTuple):
    """A tensor that the adapter stores whole: of a task head, or of another module in `modules_to_save`.

    Attributes:
        name: Name of the tensor in the base's files; its name in the model if they have none.
        extent: Location of the tensor in the base's files, None if they have none.
        values: The tensor, in the dtype in which the adapter stores it.
    """

    name: str
    extent: Extent | None
    values: torch.Tensor


class AdapterOnBase:
    """A saved adapter and the files of its base, checked against each other.

    Args:
        adapter: Directory or Hub id of the adapter.
        base: Directory or Hub id of the base. Default: the base that the adapter names.
        base_revision: Branch, tag or commit of a base on the Hub. Default: the revision that the adapter names.
        revision: Branch, tag or commit of an adapter on the Hub.
        token: Token for the Hub.
        trust_remote_code: Whether to run code that comes with a base that transformers does not know.

    Attributes:
        config: Configuration of the adapter.
        saved_patch: Patch of the adapter, as its file holds it.
        modules_to_save: Tensors of the modules stored whole (task heads), by their name in the model.
        num_labels: Number of classes of the task head, None if there is no head that shows it.
        base: Directory or Hub id of the base.
        base_revision: Revision of the base.
        source: Directory or Hub id of its checkpoint: a subfolder of `base`, where the adapter names one.
        model: The base's model without values (on the meta device).
        view: The base's files under the names of `model`.

    Raises:
        PatchError: `adapter` holds no finished graft, names no base, or belongs to another base.
        DonorError: The base cannot be read.
        OSError: The base or the adapter does not exist.
    """

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        directory = fetch_adapter(adapter, revision, token)
        saved = read_finished(directory)
        self.config, self.saved_patch = GraftConfig.from_pretrained(directory), saved.load_patch()
        self.modules_to_save, self.num_labels = saved.load_modules_to_save(), saved.num_labels
        self._token, self._trusts_code = token, trust_remote_code
        recorded = self.config.base_model_name_or_path
        is_given = base is not None
        if not is_given:
            base, base_revision = recorded, base_revision or self.config.revision
        if base is None:
            raise PatchError(
                f"base must be given for {os.fspath(adapter)!r}, whose configuration names none. "
                "Pass the directory or Hub id of the model that the adapter was made for."
            )
        self.base, self.base_revision = os.fspath(base), base_revision
        subfolder = self.config.record.base_subfolder if self.config.record and not is_given else None
        files = _open_base(base, base_revision, is_given, token, subfolder)
        self.source = files.source
        self.model = self.build_model()
        self.view = RenamedCheckpoint(files, self.model)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._require_vocabulary()
        self._names = self._resolve_names()
        self._file_values: dict[str, torch.Tensor] = {}
        self._check_base(recorded)

    @cached_property
    def patch(self) -> Patch:
        """The patch of the adapter, with the values of all tensors decoded."""
        return Patch({name: self._decode(name)[0] for name in self.saved_patch.tensors}, self.saved_patch.shapes)

    def build_model(self, num_labels: int | None = None) -> PreTrainedModel:
        """Build the base's model without values, with `num_labels` classes if given (see `build_skeleton`)."""
        like = read_config(self.source, self.base_revision, self._token, self._trusts_code) if num_labels else None
        if like is not None:
            like.num_labels = num_labels or 0
        auto_class = _auto_class(self.config)
        model = build_skeleton(self.source, self.base_revision, like, auto_class, self._token, self._trusts_code)
        model.name_or_path = self.base  # what PEFT records
        return model

    def download_base(self, allow_patterns: Sequence[str]) -> Path:
        """Return the directory of the base, after downloading these files of a base on the Hub."""
        if Path(self.source).is_dir():
            return Path(self.source)
        patterns = list(allow_patterns)
        return Path(
            snapshot_download(self.base, revision=self.base_revision, allow_patterns=patterns, token=self._token)
        )

    def aliases(self, name: str) -> list[str]:
        """Return every name that the model has for a patched tensor: more than one if its weights are tied."""
        return self._aliases[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one of the model's tensors."""
        return tuple(self._parameters[name].shape)

    def base_values(self, name: str) -> torch.Tensor:
        """Return the base's values at the patched entries of a tensor, [n], in the dtype in which the base loads."""
        return self._file_values_of(name).to(self._parameters[name].dtype)

    def values(self, name: str) -> torch.Tensor:
        """Compute the grafted values base + alpha * (donor - base) of a tensor's patched entries.

        Returns:
            The values, [n], rounded once to the dtype in which the base loads; with alpha 1 the donor's bits.
        """
        return self._grafted(name, self.patch.plain[name].values, self.base_values(name))

    def deltas(self, name: str) -> torch.Tensor:
        """Compute the grafted values of a tensor minus the base's, float32 [n]."""
        return self.values(name).float() - self.base_values(name).float()

    def edits(self) -> Iterator[FileEdit]:
        """Yield the changes that the patch makes to the base's files, one tensor of the files at a time."""
        for name in self.saved_patch.tensors:
            part, before = self._decode(name)
            values, start = self._grafted(name, part.values, before.to(self._parameters[name].dtype)), 0
            stored = self.view.stored_names(self._names[name])
            for stored_name, extent in zip(stored, self.view.extents(self._names[name]), strict=True):
                end = start + torch.Size(extent.shape).numel()
                first, last = torch.searchsorted(part.indices, torch.tensor([start, end])).tolist()
                if last > first:
                    dtype: Any = extent.dtype
                    indices = part.indices[first:last] - start
                    yield FileEdit(stored_name, extent, indices, values[first:last].to(dtype), before[first:last])
                start = end

    def whole_edits(self) -> Iterator[WholeEdit]:
        """Yield the tensors that the adapter stores whole, and where the base's files have them.

        Raises:
            PatchError: One has another shape in the base's files.
        """
        held = {*self.view.names()}
        for name, values in self.modules_to_save.items():
            if name not in held:
                yield WholeEdit(name, None, values)
                continue
            (extent,) = self.view.extents(name)
            if extent.shape != tuple(values.shape):
                raise PatchError(
                    f"module to save must have the base's shape, got {tuple(values.shape)} for {extent.shape} in "
                    f"{name!r}. Use a base without this module, such as the pretrained model."
                )
            yield WholeEdit(self.view.stored_names(name)[0], extent, values)

    def _require_vocabulary(self) -> None:
        """Refuse embeddings and language heads that are stored whole for a vocabulary of another size."""
        modules = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        names = {
            name for name, each in self.model.named_modules(remove_duplicate=False) if any(each is m for m in modules)
        }
        stored = {name.replace(".base_layer.", "."): tuple(each.shape) for name, each in self.modules_to_save.items()}
        require_rows(stored, {name: self.shape(name) for name in stored if name.rpartition(".")[0] in names})

    def _resolve_names(self) -> dict[str, str]:
        """Return the name in `view` of every patched tensor, and check that the patch fits the model."""
        unknown = sorted(self.saved_patch.tensors.keys() - self._parameters.keys())
        if unknown:
            raise PatchError(
                f"patched tensors must be parameters of the base, got {unknown[0]!r} ({len(unknown)} such), which "
                f"{type(self.model).__name__} of {self.base!r} lacks. Give the base that the adapter was made for."
            )
        names_of: dict[int, list[str]] = {}
        for name, parameter in self._parameters.items():
            names_of.setdefault(id(parameter), []).append(name)
        wanted = {name: self.shape(name) for name in self.saved_patch.tensors}
        for name, part in self.saved_patch.tensors.items():
            part.validate(name, torch.Size(wanted[name]).numel())
        self.view.require_plain(list(wanted))
        prefix = self.model.base_model_prefix
        self._aliases = {name: names_of[id(self._parameters[name])] for name in wanted}
        return resolve_names(wanted, self.view, prefixes=(prefix,) if prefix else (), aliases=self._aliases)

    def _check_base(self, base_name: str | None) -> None:
        """Check that the base is the right one, tensor by tensor, so that they need not fit in memory together."""
        builder = FingerprintBuilder()
        for name in sorted(self.saved_patch.tensors):
            values = self._covered(name)
            builder.add(name, values.dtype, values.numel(), [values])
        recorded = Fingerprint.from_dict((self.config.record and self.config.record.fingerprint) or {})
        if builder.finish(lambda name, positions: self._covered(name)[positions]) != recorded:
            recorded.require({name: self._covered(name) for name in self.saved_patch.tensors}, base_name)

    def _covered(self, name: str) -> torch.Tensor:
        """Return the base's values of a tensor that the fingerprint covers, [n], in the dtype in which it loads."""
        part = self.saved_patch.tensors[name]
        values = self._read(name) if part.indices is None else self._file_values_of(name)
        return values.to(self._parameters[name].dtype)

    def _read(self, name: str) -> torch.Tensor:
        return self.view.get(self._names[name]).flatten()

    def _file_values_of(self, name: str) -> torch.Tensor:
        """Return the values in the base's files at the patched entries of a tensor, [n]."""
        if name not in self._file_values:
            indices = self.saved_patch.tensors[name].indices
            if indices is None:
                return self._decode(name)[1]
            self._file_values[name] = self._read(name)[indices]
        return self._file_values[name]

    def _decode(self, name: str) -> tuple[TensorPatch, torch.Tensor]:
        """Return a tensor's patch and the values in the base's files at its entries.

        Neither is kept where the patch covers a whole tensor.
        """
        part = self.saved_patch.tensors[name]
        if isinstance(part, TensorPatch):
            return part, self._file_values_of(name)
        flat = self._read(name)
        decoded = part.decode(flat.to(self._parameters[name].dtype), name)
        return decoded, flat[decoded.indices]

    def _grafted(self, name: str, donor: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        alpha = self.config.alpha.get(name, 1.0) if isinstance(self.config.alpha, Mapping) else self.config.alpha
        return grafted_values(before, donor, alpha).to(before.dtype)


def _open_base(
    base: str | os.PathLike[str], revision: str | None, is_given: bool, token: str | bool | None, subfolder: str | None
) -> CheckpointDonor:
    try:
        return CheckpointDonor(base, revision, "base", token, subfolder)
    except DonorError as error:
        if is_given:
            raise
        raise DonorError(f"{error} This is the base that the adapter names; give yours as base (--base).") from error


def read_finished(directory: Path) -> SavedAdapter:
    """Read a saved adapter that holds a finished patch.

    Args:
        directory: The adapter's directory.

    Raises:
        PatchError: It holds none.
    """
    saved = read_saved(directory)
    if saved is None or saved.in_training:
        found = "a checkpoint of a mask in training" if saved else "none"
        raise PatchError(
            f"adapter must be a finished graft, with {CONFIG_FILE} and {WEIGHTS_FILE}, got {found} in "
            f"{str(directory)!r}. Write one with save_pretrained or peft-graft extract."
        )
    return saved


def _auto_class(config: GraftConfig) -> Any:
    """Return the class that loads the base, as PEFT's auto classes choose it; None for the base's own class."""
    if config.task_type is not None:
        task = task_names(config.task_type)
        return getattr(transformers, task.auto_class) if task else None
    name = (config.auto_mapping or {}).get("base_model_class", "")
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
