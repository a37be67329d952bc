"""Read fine-tuned models in files, on the Hub or in memory, one tensor at a time."""

from __future__ import annotations

import glob
import json
import os
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from huggingface_hub import file_exists, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PretrainedConfig

from ..peft_compat.torch_names import COMPILED

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The names that diffusers gives to the weights of a part of a pipeline.
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
DIFFUSERS_INDEX_FILE = "diffusion_pytorch_model.safetensors.index.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
# Dtypes of the tensors of a base, a donor and a patch.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# How many names an error message lists at most.
MAX_LISTED = 5

_WEIGHTS = (WEIGHTS_FILE, INDEX_FILE, DIFFUSERS_FILE, DIFFUSERS_INDEX_FILE)
# Bytes of the length that a safetensors file begins with.
_LENGTH_BYTES = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# PEFT's classes that load an adapter with its base, by task type.
_AUTO_CLASSES = {
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_PICKLE_FILES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class DonorError(ValueError):
    """A donor cannot be read, or does not fit the base."""


class Extent(NamedTuple):
    """The place of a tensor's values in a file, for reading them block by block.

    Attributes:
        path: The file.
        offset: Position of the first value in it, in bytes.
        dtype: A floating-point dtype, or the file's own name of any other.
        shape: The tensor's shape.
    """

    path: Path
    offset: int
    dtype: torch.dtype | str
    shape: tuple[int, ...]


@runtime_checkable
class Donor(Protocol):
    """A fine-tuned model whose tensors are read one at a time.

    Attributes:
        name: Where the donor comes from, for the record: a Hub id, a path or a class name.
    """

    name: str

    def names(self) -> list[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading its values."""

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, on the CPU, in the donor's own dtype."""


class CheckpointDonor:
    """A safetensors checkpoint: a directory, a single file, or a repository of the Hub.

    Only the headers are read here; `get` reads the one tensor that it is asked for.

    Args:
        source: A directory with `model.safetensors`, or with `model.safetensors.index.json` and its shards; one
            `*.safetensors` file; or a Hub id, of which only those files are fetched (from the cache when offline).
        revision: Branch, tag or commit of a Hub id.
        role: Its name in errors: `"donor"`, or `"base"` where both sides are read from files.
        token: Token for the Hub.
        subfolder: Folder in the directory or repository that holds the checkpoint, such as `"unet"`.

    Attributes:
        name: `source` as a string.
        source: Where the checkpoint itself is: the subfolder on this machine if there is one, else `name`.
        revision: The commit that a Hub id resolved to, None for local files.

    Raises:
        DonorError: If there is no readable safetensors checkpoint at `source`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        revision: str | None = None,
        role: str = "donor",
        token: str | bool | None = None,
        subfolder: str | None = None,
    ) -> None:
        self.name = os.fspath(source)
        self._token = token
        self.role = role
        self.revision: str | None = None
        if subfolder:
            source, self.revision = find_subfolder(source, subfolder, revision, role, token)
        self.source = os.fspath(source)
        path = Path(source)
        if path.is_dir():
            refuse_adapter(path, role)
            main = _find_in_directory(path, role)
        elif path.is_file():
            if path.name.startswith("adapter_model"):
                refuse_adapter(path.parent, role)
            main = path
        elif isinstance(source, os.PathLike) or path.is_absolute() or self.name.startswith("."):
            raise DonorError(f"{role} must be an existing directory or file, got {self.name!r}. Check the path.")
        else:
            main = _find_on_hub(self.name, revision, role, token)
            # The cache keeps files under snapshots/<commit>/: every shard must come from the commit of the first file.
            self.revision = main.parent.name
            _refuse_adapter_on_hub(self.name, self.revision, role, token)
        self._extents: dict[str, Extent] = {}
        if main.suffix == ".json":
            self._read_index(main)
        elif main.suffix in _PICKLE_SUFFIXES:
            raise _pickled(f"the pickle {str(main)!r}", role)
        else:
            self._read_header(main)

    @cached_property
    def config_fields(self) -> dict[str, Any] | None:
        """Fields of the config.json beside the tensors; None where there is none, or it cannot be read."""
        path = Path(self.source)
        if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
            return None
        try:
            return PretrainedConfig.get_config_dict(self.source, revision=self.revision, token=self._token)[0]
        except (OSError, ValueError):
            return None

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._extents)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, as its file's header states it."""
        return self._extents[name].shape

    def extent(self, name: str) -> Extent:
        """Return where the values of a tensor stand."""
        return self._extents[name]

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        # Opened anew each time: a handle that lives on keeps every page it has read in memory, where files are mapped.
        path = self._extents[name].path
        with _open(path, self.role) as file:
            try:
                return file.get_tensor(name)
            except SafetensorError as error:
                raise DonorError(
                    f"{self.role} tensor {name!r} must be readable, got {error} in {str(path)!r}."
                ) from error

    def _read_index(self, index: Path) -> None:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(weight_map.values()))
            # A shard is a plain file beside its index; anything else could point out of the checkpoint.
            plain = all(shard.endswith(".safetensors") and not set(shard) & set("/\\:") for shard in shards)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DonorError(f"{str(index)!r} must be a JSON index with a weight_map, got {error!r}.") from error
        if not plain or not shards:
            raise DonorError(f"{str(index)!r} must map tensors to the names of files beside it, got {shards[:3]!r}.")
        # All from the commit of the index, even if the branch moves meanwhile.
        folder = index.parent
        if self.revision is not None and self.source == self.name:  # a subfolder has been fetched as a whole
            folder = _download_all(self.name, shards, self.revision, self.role, self._token)
        for shard in shards:
            if not (folder / shard).is_file():
                raise DonorError(
                    f"{self.role} must hold every file that {INDEX_FILE} names, got no {shard!r} in {self.name!r}. "
                    "Copy or download the checkpoint again; offline, the cache must hold all of them."
                )
            self._read_header(folder / shard)
        held = {name: extent.path.name for name, extent in self._extents.items()}
        lost = sorted(name for name, shard in weight_map.items() if held.get(name) != shard)
        if lost:
            raise DonorError(
                f"{weight_map[lost[0]]!r} must hold every tensor that {INDEX_FILE} says it does, "
                f"got no {lost[0]!r} in it ({len(lost)} such tensors in {self.name!r})."
            )

    def _read_header(self, path: Path) -> None:
        with _open(path, self.role):
            pass  # the library has checked the header by now: sizes, overlaps, and that the file is whole
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = _LENGTH_BYTES + length + entry["data_offsets"][0]
                dtype = _DTYPES.get(entry["dtype"], entry["dtype"])
                self._extents[name] = Extent(path, start, dtype, tuple(entry["shape"]))


class ModuleDonor:
    """A model in memory; its parameters and buffers are used in place, without a copy.

    Args:
        module: The fine-tuned model. `DataParallel`, DDP and `torch.compile` wrappers are looked through.

    Attributes:
        name: The name of the module's class.
        config: The module's configuration; None if it has none.

    Raises:
        DonorError: The model has adapters that are not merged.
    """

    def __init__(self, module: nn.Module) -> None:
        while True:
            if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
                module = module.module
            elif isinstance(inner := getattr(module, COMPILED, None), nn.Module):
                module = inner
            else:
                break
        _refuse_unmerged(module)
        self.name, self.config = type(module).__name__, getattr(module, "config", None)
        tensors: dict[str, torch.Tensor] = dict(module.named_parameters(remove_duplicate=False))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        if buffers:  # those that a checkpoint would hold
            kept = module.state_dict().keys()
            tensors |= {name: buffer for name, buffer in buffers.items() if name in kept}
        # Submodules may be compiled too, hence the replacement inside names.
        self._tensors = {name.replace(f"{COMPILED}.", ""): tensor for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        """Return the names of all parameters and buffers; tied ones appear under each of their names."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, detached; on the CPU it shares the module's memory."""
        tensor = self._tensors[name]
        if tensor.is_meta:
            raise DonorError(f"donor tensors must hold values, got {name!r} of {self.name} on the meta device.")
        return tensor.detach().cpu()


class ZerosDonor:
    """A donor whose every entry is zero, so that every delta is -base.

    The mask then says which pretrained entries become 0, as in the supermasks of Radiya-Dixit & Wang 2020
    (arXiv 2004.14129). It has no tensors of its own: each value is a scalar zero that stands for the whole tensor, and
    `stream` gives it the shape and the dtype of the base.
    """

    name = "zeros"

    def names(self) -> list[str]:
        """Return no names: every name of the base will do."""
        return []

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a scalar."""
        return ()

    def get(self, name: str) -> torch.Tensor:
        """Return a scalar zero."""
        return torch.zeros(())


def open_donor(
    donor: str | os.PathLike[str] | nn.Module | Donor,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
) -> Donor:
    """Open a donor in any of the forms that a user may give it in.

    Args:
        donor: A directory, a file, a Hub id, `"zeros"`, a model in memory, or a `Donor`, which is returned as it is.
        revision: Branch, tag or commit, where `donor` is a Hub id.
        token: Token for the Hub.
        subfolder: Folder of the checkpoint in a directory or repository.

    Returns:
        The donor. Files have had their headers read and nothing else.

    Raises:
        DonorError: If `donor` is something else, or cannot be read.
    """
    if isinstance(donor, str) and donor == ZerosDonor.name:
        return ZerosDonor()
    if isinstance(donor, nn.Module):
        return ModuleDonor(donor)
    if isinstance(donor, str | os.PathLike):
        return CheckpointDonor(donor, revision, token=token, subfolder=subfolder)
    if isinstance(donor, Donor):
        return donor
    raise DonorError(
        f"donor must be a directory, a Hub id, 'zeros' or a torch.nn.Module, got {type(donor).__name__}. "
        "A state dict can be saved with safetensors.torch.save_file and given by its path."
    )


def find_subfolder(
    source: str | os.PathLike[str],
    subfolder: str,
    revision: str | None = None,
    role: str = "donor",
    token: str | bool | None = None,
) -> tuple[Path, str | None]:
    """Find a checkpoint in a folder of a directory or of a repository of the Hub, as pipelines of diffusers have it.

    Args:
        source: Directory or Hub id.
        subfolder: Path of the folder in it, with `/` between its parts.
        revision: Branch, tag or commit of a Hub id.
        role: Name of the model in errors.
        token: Token for the Hub.

    Returns:
        The folder on this machine, and the commit of a Hub id.

    Raises:
        DonorError: There is no such folder, or it points out of the directory.
    """
    root, commit = Path(source), None
    if Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
        raise DonorError(f"subfolder must be a folder of the {role}, got {subfolder!r}. Give a relative path.")
    if not root.is_dir():
        if root.is_file() or isinstance(source, os.PathLike) or root.is_absolute():
            raise DonorError(
                f"{role} must be a directory or a Hub id to have the subfolder {subfolder!r}, got "
                f"{os.fspath(source)!r}. Check the path."
            )
        names = [
            f"{glob.escape(subfolder)}/{name}" for name in ("*.json", *_WEIGHTS, f"*-of-{'[0-9]' * 5}.safetensors")
        ]
        try:
            root = Path(snapshot_download(os.fspath(source), revision=revision, allow_patterns=names, token=token))
        except LocalEntryNotFoundError as error:
            raise _unreachable(os.fspath(source), role) from error
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise _no_repository(os.fspath(source), revision, role, error) from error
        commit = root.name
    folder = root / subfolder
    if not folder.is_dir():
        found = sorted(each.name for each in root.iterdir() if each.is_dir()) if root.is_dir() else []
        raise DonorError(
            f"{role} must have the subfolder {subfolder!r}, got {found[:MAX_LISTED] or 'no folders with weights'} in "
            f"{os.fspath(source)!r}. Check its name."
        )
    return folder, commit


def refuse_adapter(directory: Path, role: str, name: str | None = None) -> None:
    """Refuse an adapter in the place of a whole model.

    Args:
        directory: A directory, which may hold `adapter_config.json`.
        role: Name of the model in errors, such as `"donor"`; nothing is refused where an `"adapter"` is wanted.
        name: How the user calls the directory; by default its path.

    Raises:
        DonorError: It holds an adapter; the message says how to merge it.
    """
    file = directory / ADAPTER_CONFIG_FILE
    if role == "adapter" or not file.is_file():
        return
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        fields = {}
    fields = fields if isinstance(fields, dict) else {}
    kind, base, task = (fields.get(key) for key in ("peft_type", "base_model_name_or_path", "task_type"))
    name = str(directory) if name is None else name
    if kind == "GRAFT":
        how = f"peft-graft export {name} --to checkpoint --output-dir merged"
    else:
        auto_class = _AUTO_CLASSES.get(str(task), "AutoPeftModel")
        how = f"peft.{auto_class}.from_pretrained({name!r}).merge_and_unload().save_pretrained('merged')"
    beside = ""
    if any((directory / each).is_file() for each in (WEIGHTS_FILE, INDEX_FILE)):
        beside = f" If the model beside it is meant, move {ADAPTER_CONFIG_FILE} to another directory."
    raise DonorError(
        f"{role} must be a whole model, got an adapter ({ADAPTER_CONFIG_FILE}: {kind or 'unknown type'} of the base "
        f"{base!r}) in {name!r}. Merge it first, and give the result: {how}.{beside}"
    )


def _refuse_unmerged(module: nn.Module) -> None:
    """Refuse a model in memory whose adapters are not merged: its parameters are not the values that it computes with.

    Raises:
        DonorError: Names the first adapted layer.
    """
    layers = [name for name, each in module.named_modules() if isinstance(each, BaseTunerLayer)]
    if layers:
        raise DonorError(
            f"donor must be a whole model, got {type(module).__name__} with an adapter in {layers[0]!r} ({len(layers)} "
            "such layers). Merge it first, and give the result: donor = model.merge_and_unload()."
        )


def _refuse_adapter_on_hub(repo: str, revision: str | None, role: str, token: str | bool | None) -> None:
    try:
        file = hf_hub_download(repo, ADAPTER_CONFIG_FILE, revision=revision, token=token)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return
    refuse_adapter(Path(file).parent, role, repo)


def _pickled(got: str, role: str) -> DonorError:
    return DonorError(
        f"{role} must be a safetensors checkpoint, got {got}. Pickles can run code and are not read: load the model "
        "once from a source you trust and write it again with `save_pretrained(..., safe_serialization=True)`."
    )


def _open(path: Path, role: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DonorError(
            f"{role} file must be a whole safetensors file, got {str(path)!r} ({error}). "
            "Copy or download it again; a Git LFS pointer must be replaced by the file (git lfs pull)."
        ) from error


def _find_in_directory(path: Path, role: str) -> Path:
    if (path / WEIGHTS_FILE).is_file() and (path / INDEX_FILE).is_file():
        warnings.warn(
            f"{role} directory should hold one checkpoint, got {WEIGHTS_FILE} and {INDEX_FILE} in {str(path)!r}. "
            f"{WEIGHTS_FILE} is read, as transformers does; delete the one that is left over from another save.",
            stacklevel=2,
        )
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    files = sorted(file.name for file in path.iterdir())
    pickles = [name for name in files if name.startswith("pytorch_model")]
    if pickles:
        raise _pickled(f"{pickles[0]!r} in {str(path)!r}", role)
    raise DonorError(
        f"{role} directory must hold {WEIGHTS_FILE} or {INDEX_FILE}, got {files[:MAX_LISTED] or 'nothing'} in "
        f"{str(path)!r}. Write it with save_pretrained, or give the path of one .safetensors file."
    )


def _find_on_hub(repo: str, revision: str | None, role: str, token: str | bool | None = None) -> Path:
    for name in _WEIGHTS:
        path = _download(repo, name, revision, role, token)
        if path is not None:
            return path
        _refuse_adapter_on_hub(repo, revision, role, token)
    try:
        pickles = [name for name in _PICKLE_FILES if file_exists(repo, name, revision=revision, token=token)]
    except (HfHubHTTPError, OfflineModeIsEnabled):
        pickles = []
    if pickles:
        raise _pickled(f"{pickles[0]!r} in {repo!r}", role)
    raise DonorError(f"{role} repository must hold {WEIGHTS_FILE} or {INDEX_FILE}, got neither in {repo!r}.")


def _download(repo: str, name: str, revision: str | None, role: str, token: str | bool | None = None) -> Path | None:
    """Fetch a file from the Hub or its cache; None where the repository does not have it."""
    try:
        return Path(hf_hub_download(repo, name, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        # Neither reached nor cached, but the repository may keep its weights under another name.
        if name != _WEIGHTS[-1]:
            return None
        raise _unreachable(repo, role) from error
    except EntryNotFoundError:
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise _no_repository(repo, revision, role, error) from error


def _download_all(repo: str, names: list[str], commit: str, role: str, token: str | bool | None) -> Path:
    """Fetch files of one commit from the Hub or its cache, several at a time; return the directory they are in."""
    try:
        patterns = [glob.escape(name) for name in names]
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns, token=token))
    except LocalEntryNotFoundError as error:
        raise _unreachable(repo, role) from error


def _no_repository(repo: str, revision: str | None, role: str, error: Exception) -> DonorError:
    at = f" at revision {revision!r}" if revision else ""
    return DonorError(
        f"{role} must be a directory or the id of a Hub repository that you can read, got {repo!r}{at}. {error}"
    )


def _unreachable(repo: str, role: str) -> DonorError:
    return DonorError(
        f"{role} must be a directory, or a Hub id that can be reached or is cached, got {repo!r}. "
        "Check the spelling and the network; when offline, download it beforehand."
    )
