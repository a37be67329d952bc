"""A saved adapter beside the files of its base: what it would write where, tensor by tensor, without a loaded model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from ..adapter_files.hub_names import CONFIG_FILE
from ..adapter_files.summary import WEIGHTS_FILE, fetch_adapter, read_saved
from ..checkpoints.donor import Extent
from ..checkpoints.name_mapping import RenamedCheckpoint, build_skeleton, read_config
from ..checkpoints.pairing import CheckpointDonor, DonorError, resolve_names
from ..patch.arithmetic import grafted_values
from ..patch.patch import Fingerprint, Patch, PatchError
from ..tuner import GraftConfig

_CLASSES: dict[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoModel,
}


class Written(NamedTuple):
    """What a patch writes into one tensor of a base's files.

    Attributes:
        name: The tensor's name in the files.
        extent: Where it stands.
        indices: Flat indices in it, int64 [n], increasing.
        values: What the entries become, float [n], in the dtype of the file.
    """

    name: str
    extent: Extent
    indices: torch.Tensor
    values: torch.Tensor


class StoredGraft:
    """A saved adapter and the files of its base.

    Args:
        adapter: The adapter's directory, or a Hub id.
        base: The base's directory or Hub id; by default the one that the adapter names.
        base_revision: Branch, tag or commit of a base on the Hub; by default the one that the adapter names.
        revision: Branch, tag or commit of an adapter on the Hub.

    Attributes:
        config: The adapter's configuration.
        patch: The patch.
        heads: Tensors stored whole, by their name in the model.
        labels: How many classes they tell apart, where that can be seen.
        base: The base's directory or Hub id.
        base_revision: Its revision.
        model: The base without its values.
        view: The base's files.

    Raises:
        PatchError: There is no finished graft at `adapter`, it names no base, or it belongs to another one.
        DonorError: The base cannot be read.
        OSError: There is no such base or adapter.
    """

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        base: str | os.PathLike[str] | None = None,
        base_revision: str | None = None,
        revision: str | None = None,
    ) -> None:
        directory = fetch_adapter(adapter, revision)
        self.config, self.patch, self.heads, self.labels = _read(directory)
        named = self.config.base_model_name_or_path
        given = base is not None
        if not given:
            base, base_revision = named, base_revision or self.config.revision
        if base is None:
            raise PatchError("base must be given, got an adapter that does not name one. Pass the base's directory.")
        self.base, self.base_revision = os.fspath(base), base_revision
        files = _open_base(base, base_revision, given)
        self.model = self.skeleton()
        self.view = RenamedCheckpoint(files, self.model)
        self._parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self._names = self._locate()
        self._base = {name: self._read_entries(name) for name in sorted(self.patch.tensors)}
        Fingerprint.from_dict(self.config.fingerprint or {}).require(self._base, named)

    def skeleton(self, labels: int | None = None) -> PreTrainedModel:
        """Build the base without its values (see `build_skeleton`), maybe for so many classes."""
        like = read_config(self.base, self.base_revision) if labels else None
        if like is not None:
            like.num_labels = labels or 0
        return build_skeleton(self.base, self.base_revision, like, _model_type(self.config))

    def aliases(self, name: str) -> list[str]:
        """Return all names that the model has for a patched tensor, which it may tie to others."""
        return self._aliases[name]

    def base_entries(self, name: str) -> torch.Tensor:
        """Return the base's values where a tensor is patched, in the dtype in which the base loads."""
        return self._base[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one of the model's tensors."""
        return tuple(self._parameters[name].shape)

    def values(self, name: str) -> torch.Tensor:
        """Return what the patch of a tensor writes: alpha on it, rounded once to the dtype in which the base loads."""
        before, part = self._base[name], self.patch.tensors[name]
        alpha = self.config.alpha.get(name, 1.0) if isinstance(self.config.alpha, Mapping) else self.config.alpha
        return grafted_values(before, part.values, alpha).to(before.dtype)

    def deltas(self, name: str) -> torch.Tensor:
        """Return what the patch of a tensor adds to the base, float32 [n]."""
        return self.values(name).float() - self._base[name].float()

    def written(self) -> Iterator[Written]:
        """Yield what the patch writes into the base's files, tensor by tensor of the files."""
        for name, part in self.patch.tensors.items():
            values, start = self.values(name), 0
            stored = self.view.stored_names(self._names[name])
            for each, extent in zip(stored, self.view.extents(self._names[name]), strict=True):
                end = start + torch.Size(extent.shape).numel()
                first, last = torch.searchsorted(part.indices, torch.tensor([start, end])).tolist()
                if last > first:
                    dtype: Any = extent.dtype
                    yield Written(each, extent, part.indices[first:last] - start, values[first:last].to(dtype))
                start = end

    def _locate(self) -> dict[str, str]:
        """The view's name of every patched tensor."""
        unknown = sorted(self.patch.tensors.keys() - self._parameters.keys())
        if unknown:
            raise PatchError(
                f"patched tensors must be parameters of the base, got {unknown[0]!r} ({len(unknown)} such), which "
                f"{type(self.model).__name__} of {self.base!r} lacks. Give the base that the adapter was made for."
            )
        holders: dict[int, list[str]] = {}
        for name, parameter in self._parameters.items():
            holders.setdefault(id(parameter), []).append(name)
        wanted = {name: self.shape(name) for name in self.patch.tensors}
        for name, part in self.patch.tensors.items():
            part.validate(name, torch.Size(wanted[name]).numel())
        self.view.require_plain(list(wanted))
        prefix = self.model.base_model_prefix
        self._aliases = {name: holders[id(self._parameters[name])] for name in wanted}
        return resolve_names(wanted, self.view, prefixes=(prefix,) if prefix else (), aliases=self._aliases)

    def _read_entries(self, name: str) -> torch.Tensor:
        flat = self.view.get(self._names[name]).flatten()[self.patch.tensors[name].indices]
        return flat.to(self._parameters[name].dtype)


def _open_base(base: str | os.PathLike[str], revision: str | None, given: bool) -> CheckpointDonor:
    try:
        return CheckpointDonor(base, revision, role="base")
    except DonorError as error:
        if given:
            raise
        raise DonorError(f"{error} This is the base that the adapter names; give yours as base (--base).") from error


def _read(directory: Path) -> tuple[GraftConfig, Patch, dict[str, torch.Tensor], int | None]:
    saved = read_saved(directory)
    if saved is None or saved.in_training:
        found = "a checkpoint of a mask in training" if saved else "none"
        raise PatchError(
            f"adapter must be a finished graft, with {CONFIG_FILE} and {WEIGHTS_FILE}, got {found} in "
            f"{str(directory)!r}. Write one with save_pretrained or peft-graft extract."
        )
    return GraftConfig.from_pretrained(directory), saved.load_patch(), saved.load_modules_to_save(), saved.num_labels


def _model_type(config: GraftConfig) -> Any:
    """The class that loads the base, as PEFT's auto classes find it; None where the base's own class does."""
    if config.task_type is not None:
        return _CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    name = (config.auto_mapping or {}).get("base_model_class", "")
    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None
