"""Write a saved adapter in other formats: a merged checkpoint, patches for servers, a SHiRA or LoRA adapter."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, ShiraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.donor import INDEX_FILE, WEIGHTS_FILE
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.patch import PEFT_PREFIX, PatchError
from .adapter_on_base import AdapterOnBase
from .checkpoint_patch import VLLM_FILE, CheckpointPatch
from .weight_delta import write_delta

HEAD_FILE = "model-head.safetensors"
# Larger matrices get a randomized SVD, because a full one takes minutes for each.
FULL_SVD_UP_TO = 1024

# Files copied along with a checkpoint: configuration, code, tokenizer, licence. The base's card would describe another
# model.
_COMPANIONS = (
    *("*.json", "*.py", "*.txt", "*.model", "*.jinja", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "USE_POLICY*"),
)


@dataclass
class ExportResult:
    """Files written by `export`.

    Attributes:
        directory: Directory of the files.
        entries: Number of entries of the patch.
        carried: Number of entries that the export holds.
        left_out: Number of entries that it cannot hold, by class and parameter: `LayerNorm.weight`.
        errors: For LoRA, ||delta - B A|| / ||delta|| by module, in the Frobenius norm.
        notes: Remarks for whoever uses the export.
    """

    directory: Path
    entries: int
    carried: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON."""
        return {**vars(self), "directory": str(self.directory)}


def export(
    adapter: str | os.PathLike[str],
    to: str,
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    revision: str | None = None,
    rank: int = 8,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> ExportResult:
    """Write a saved adapter in another format.

    Args:
        adapter: Directory or Hub id of the adapter.
        to: Format, one of `EXPORTS`: `"checkpoint"`, `"vllm"`, `"weight_delta"`, `"shira"` or
            `"lora"`.
        output_dir: Directory to write; it appears when all files are complete.
        base: Directory or Hub id of the base. Default: the base that the adapter names.
        base_revision: Branch, tag or commit of a base on the Hub.
        revision: Branch, tag or commit of an adapter on the Hub.
        rank: Rank of a LoRA adapter, >= 1.
        token: Token for the Hub. Default: the token of `hf auth login`, or HF_TOKEN; False for none.
        trust_remote_code: Run the code that comes with a base that transformers does not know. Without it, such bases
            are refused; nothing is asked on the terminal.
        overwrite: Write into a directory that is not empty.

    Returns:
        The written directory, and the entries that the format holds and leaves out.

    Raises:
        PatchError: `adapter` holds no finished graft or belongs to another base, or the format can hold none of its
            entries.
        DonorError: The base cannot be read.
        FileExistsError: `output_dir` is not empty, and `overwrite` is not set; or it holds the adapter, the base, a
            model (or, for a checkpoint, an adapter).
        ValueError: The format is unknown, or the rank is not positive.
        OSError: The adapter or the base does not exist.
    """
    if to not in EXPORTS:
        raise ValueError(f"to must be one of {sorted(EXPORTS)}, got {to!r}.")
    if rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}. 8 is usual.")
    target = Path(output_dir)
    inputs, writes_model = {"adapter": adapter, "base": base}, to == "checkpoint"
    check_output_dir(target, overwrite, inputs=inputs, writes_model=writes_model)
    graft = AdapterOnBase(adapter, base, base_revision, revision, token, trust_remote_code)
    check_output_dir(
        target, overwrite, inputs={"base": graft.base, "checkpoint": graft.source}, writes_model=writes_model
    )
    with atomic_directory(target) as directory:
        done = EXPORTS[to].write(graft, directory, rank)
    done.directory = target
    return done


def write_checkpoint(graft: AdapterOnBase, directory: Path, rank: int) -> ExportResult:
    """Copy the base's files and write the patch into the copies; all other bits stay the base's."""
    source = graft.download_base([*_COMPANIONS, "*.safetensors"])
    companions = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in sorted(companions | {extent.path for extent in graft.view.all_extents().values()}):
        shutil.copyfile(file, directory / file.name)
    done = ExportResult(directory, graft.saved_patch.num_params)
    for part in graft.edits():
        _write(directory, part.extent.path.name, part.extent, part.values, part.indices)
        done.carried += part.indices.numel()
    _write_modules_to_save(graft, directory, done)
    return done


def write_vllm(graft: AdapterOnBase, directory: Path, rank: int) -> ExportResult:
    """Write one file of indices, values and the base's values, for every tensor of the base's files that changes."""
    patch = CheckpointPatch.from_adapter(graft)
    patch.save(directory / VLLM_FILE)
    done = ExportResult(directory, graft.saved_patch.num_params)
    done.carried = sum(edit.indices.numel() for edit in patch.edits.values() if edit.indices is not None)
    _note_whole(done, patch)
    return done


def write_weight_delta(graft: AdapterOnBase, directory: Path, rank: int) -> ExportResult:
    """Write the change of every tensor's bytes, compressed, as the first version after the base's."""
    patch = CheckpointPatch.from_adapter(graft)
    patch.require_base_values("a delta of the base's files")
    done = ExportResult(directory, graft.saved_patch.num_params)
    done.carried = sum(edit.indices.numel() for edit in patch.edits.values() if edit.indices is not None)
    write_delta(directory, patch, graft.view.checkpoint)
    return done


def write_shira(graft: AdapterOnBase, directory: Path, rank: int) -> ExportResult:
    """Write a SHiRA adapter that stock PEFT loads: the deltas of Linear weights, padded with zeros to r(m + n)."""
    done, names = _supported(graft, (nn.Linear,))
    shapes = {name: graft.shape(name) for name in names}
    r = max(math.ceil(graft.patch.plain[name].indices.numel() / sum(shapes[name])) for name in names)
    crowded = sorted(name for name in names if r * sum(shapes[name]) > math.prod(shapes[name]))
    if crowded:
        raise PatchError(
            f"patch must fit SHiRA's r(m + n) entries a layer, got a densest layer that needs r = {r}, which is more "
            f"than all entries of {crowded[0]!r} ({len(crowded)} such). Export to a checkpoint, or graft fewer entries."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        part, (rows, columns) = graft.patch.plain[name], shapes[name]
        count = r * (rows + columns)
        free = np.setdiff1d(np.arange(count), part.indices.numpy())[: count - part.indices.numel()]
        flat = torch.cat([part.indices, torch.from_numpy(free)])
        flat, order = flat.sort()
        module = name.rpartition(".")[0]
        weights = torch.cat([graft.deltas(name), torch.zeros(len(free))])[order]
        tensors[f"{PEFT_PREFIX}{module}.shira_weight"] = weights
        tensors[f"{PEFT_PREFIX}{module}.shira_indices"] = torch.stack([flat // columns, flat % columns]).int()
    done.notes.append("SHiRA adds deltas, so an entry may differ from the donor's value in its last bit.")
    # With any type but "random", PEFT draws no mask while loading: it would not be used.
    config = ShiraConfig(r=r, mask_type="graft", inference_mode=True, **_common_fields(graft, names))
    _save_adapter(graft, directory, config, tensors)
    return done


def write_lora(graft: AdapterOnBase, directory: Path, rank: int) -> ExportResult:
    """Write a LoRA adapter: the best rank-r approximation of each layer's delta (Eckart & Young 1936)."""
    done, names = _supported(graft, (nn.Linear, Conv1D))
    tensors: dict[str, torch.Tensor] = {}
    left = total = 0.0
    for name in names:
        part, shape = graft.patch.plain[name], graft.shape(name)
        delta = torch.zeros(math.prod(shape)).index_copy_(0, part.indices, graft.deltas(name)).view(shape)
        module = name.rpartition(".")[0]
        transposed = isinstance(graft.model.get_submodule(module), Conv1D)
        down, up = low_rank(delta.T if transposed else delta, rank)
        rest = float((delta.T if transposed else delta).sub(up @ down).double().square().sum())
        norm = float(delta.double().square().sum())
        done.errors[module] = math.sqrt(rest / norm) if norm else 0.0
        left, total = left + rest, total + norm
        tensors[f"{PEFT_PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PEFT_PREFIX}{module}.lora_B.weight"] = up
    done.notes.append(f"rank {rank} leaves {math.sqrt(left / total) if total else 0.0:.1%} of the deltas' norm out.")
    transposing = any(isinstance(graft.model.get_submodule(name.rpartition(".")[0]), Conv1D) for name in names)
    config = LoraConfig(
        r=rank, lora_alpha=rank, fan_in_fan_out=transposing, inference_mode=True, **_common_fields(graft, names)
    )
    _save_adapter(graft, directory, config, tensors)
    return done


@dataclass(frozen=True)
class ExportFormat:
    """Row of the table of formats.

    Args:
        write: Function (adapter, directory, LoRA rank) that writes the files.
        summary: One line for the documentation.
    """

    write: Callable[[AdapterOnBase, Path, int], ExportResult]
    summary: str


EXPORTS: dict[str, ExportFormat] = {
    "checkpoint": ExportFormat(
        write_checkpoint, "the full merged checkpoint, bit-equal to the base outside of the patch"
    ),
    "vllm": ExportFormat(
        write_vllm, "flat indices and values in the base's checkpoint, for vLLM's CheckpointWeightPatch"
    ),
    "weight_delta": ExportFormat(
        write_weight_delta,
        "the changed bytes of the base's files, compressed, for SGLang's pull_weights; needs zstandard",
    ),
    "shira": ExportFormat(write_shira, "a SHiRA adapter for PEFT without this package; Linear weights only"),
    "lora": ExportFormat(write_lora, "the best LoRA adapter of a given rank; Linear and Conv1D weights only"),
}


def low_rank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix by a product of two thin ones: delta ~ up @ down, the best of its rank in any unitary norm.

    Rows and columns without entries are left out of the decomposition. If more than `FULL_SVD_UP_TO` rows and columns
    remain, the singular vectors come from a randomized subspace iteration, and the result is close to the best.

    Args:
        delta: float32 [out, in].
        rank: Number of columns of `up`, >= 1.

    Returns:
        down float32 [rank, in] and up float32 [out, rank], of equal norms; padded with zeros if the matrix has a lower
            rank.
    """
    rows, columns = delta.any(1).nonzero().flatten(), delta.any(0).nonzero().flatten()
    down, up = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
    if not rows.numel():
        return down, up
    core = delta[rows][:, columns]
    if min(core.shape) <= FULL_SVD_UP_TO:
        left, sizes, right = torch.linalg.svd(core, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            left, sizes, right = torch.svd_lowrank(core, q=min(2 * rank + 16, *core.shape), niter=6)
        right = right.T
    kept = min(rank, len(sizes))
    root = sizes[:kept].sqrt()
    up[rows, :kept] = left[:, :kept] * root
    down[:kept, columns] = root[:, None] * right[:kept]
    return down, up


def _supported(graft: AdapterOnBase, classes: tuple[type[nn.Module], ...]) -> tuple[ExportResult, list[str]]:
    """Return the names of the weights that a format for only these modules can hold, and count the other entries."""
    done, names, left_out = ExportResult(Path(), graft.patch.num_params), [], Counter[str]()
    for name, part in graft.patch.plain.items():
        key, _, param = name.rpartition(".")
        module = graft.model.get_submodule(key)
        if type(module) in classes and param == "weight":
            names.append(name)
            done.carried += part.indices.numel()
        else:
            left_out[f"{type(module).__name__}.{param}"] += part.indices.numel()
    done.left_out = dict(left_out.most_common())
    if not names:
        kinds = " or ".join(f"{cls.__name__}.weight" for cls in classes)
        raise PatchError(
            f"patch must have entries in {kinds} for this format, got {done.left_out}. Export to a checkpoint."
        )
    return done, names


def _common_fields(graft: AdapterOnBase, names: list[str]) -> dict[str, Any]:
    return {
        "task_type": graft.config.task_type,
        "auto_mapping": graft.config.auto_mapping,
        "base_model_name_or_path": graft.base,
        "revision": graft.base_revision,
        "target_modules": sorted(name.rpartition(".")[0] for name in names),
        "modules_to_save": graft.config.modules_to_save if graft.modules_to_save else None,
    }


def _save_adapter(
    graft: AdapterOnBase, directory: Path, config: PeftConfig, tensors: Mapping[str, torch.Tensor]
) -> None:
    whole = {f"{PEFT_PREFIX}{name}": tensor for name, tensor in graft.modules_to_save.items()}
    contiguous = {key: tensor.contiguous() for key, tensor in {**tensors, **whole}.items()}
    save_file(contiguous, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(str(directory))


def _write(directory: Path, file: str, extent: Any, values: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Write values into a copy of the base's file: at these flat indices of a tensor, or over all of it."""
    count = math.prod(extent.shape)
    width = values.dtype.itemsize
    mapped = np.memmap(directory / file, np.uint8, mode="r+", offset=extent.offset, shape=count * width)
    rows = mapped.reshape(count, width)
    coded = values.contiguous().view(torch.uint8).numpy().reshape(-1, width)
    rows[slice(None) if indices is None else indices.numpy()] = coded
    mapped.flush()


def _write_modules_to_save(graft: AdapterOnBase, directory: Path, done: ExportResult) -> None:
    """Write modules stored whole over the base's, or into a file of their own if the base has none."""
    extra: dict[str, torch.Tensor] = {}
    for whole in graft.whole_edits():
        if whole.extent is None:
            extra[whole.name] = whole.values
        else:
            dtype: Any = whole.extent.dtype
            _write(directory, whole.extent.path.name, whole.extent, whole.values.to(dtype))
    if extra:
        _add_file(graft, directory, extra)
        done.notes.append(f"the base has no {', '.join(sorted(extra))}; they are in {HEAD_FILE}.")


def _note_whole(done: ExportResult, patch: CheckpointPatch) -> None:
    """Tell which tensors stand in the file without indices, and which of them the base does not have."""
    if whole := sorted(name for name, edit in patch.edits.items() if edit.indices is None):
        done.notes.append(f"{', '.join(whole)}: stored whole, without indices.")
    if lost := patch.without_base:
        done.notes.append(f"the base has no {', '.join(lost)}; an engine that runs it cannot take them.")


def _add_file(graft: AdapterOnBase, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add a file of tensors to a checkpoint, and put the class that has them into its configuration."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / HEAD_FILE, {"format": "pt"})
    index = directory / INDEX_FILE
    if index.is_file():
        fields = json.loads(index.read_text(encoding="utf-8"))
    else:
        # transformers would read a file of the usual name and not look for an index.
        body = "model-body.safetensors"
        os.rename(directory / WEIGHTS_FILE, directory / body)
        fields = {"metadata": {}, "weight_map": dict.fromkeys(graft.view.all_extents(), body)}
    fields["weight_map"] |= dict.fromkeys(tensors, HEAD_FILE)
    index.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
    config = directory / "config.json"
    fields = json.loads(config.read_text(encoding="utf-8"))
    fields["architectures"] = [type(graft.model).__name__]
    labels = [tensor.shape[0] for tensor in tensors.values() if tensor.dim() == 2]
    if graft.config.task_type in ("SEQ_CLS", "TOKEN_CLS") and labels:
        fields["id2label"] = {str(label): f"LABEL_{label}" for label in range(labels[-1])}
        fields["label2id"] = {f"LABEL_{label}": label for label in range(labels[-1])}
    config.write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")
