"""A saved adapter in the forms of others: a merged checkpoint, a patch for vLLM, a SHiRA or LoRA adapter."""

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
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, ShiraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..checkpoints.donor import INDEX_FILE, WEIGHTS_FILE
from ..patch.atomic import atomic_directory, check_output_dir
from ..patch.patch import PEFT_PREFIX, PatchError
from .adapter_on_base import StoredGraft

VLLM_FILE = "checkpoint_patch.safetensors"
HEAD_FILE = "model-head.safetensors"
# From here on, a layer's singular values are found by iteration instead of a full decomposition.
EXACT_UP_TO = 1024

# What goes along with a checkpoint: configuration, tokenizer, licence; no other weights, and not the base's card.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")


@dataclass
class Exported:
    """What `export` has written.

    Attributes:
        directory: Where it is.
        entries: Entries of the patch.
        carried: How many of them the export holds.
        left_out: Entries that it cannot hold, by class and parameter: `LayerNorm.weight`.
        errors: Of LoRA: |delta - B A| / |delta| by module; the norms are Frobenius norms.
        notes: What whoever uses it should know.
    """

    directory: Path
    entries: int
    carried: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
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
    overwrite: bool = False,
) -> Exported:
    """Write a saved adapter in another form.

    Args:
        adapter: The adapter's directory, or a Hub id.
        to: One of `EXPORTS`: `"checkpoint"`, `"vllm"`, `"shira"` or `"lora"`.
        output_dir: Where to write; it appears when all is whole.
        base: The base's directory or Hub id; by default the one that the adapter names.
        base_revision: Branch, tag or commit of a base on the Hub.
        revision: Branch, tag or commit of an adapter on the Hub.
        rank: Rank of a LoRA adapter, >= 1.
        overwrite: Write into a directory that is not empty.

    Returns:
        What was written, and what could not be.

    Raises:
        PatchError: There is no finished graft at `adapter`, it belongs to another base, or the form cannot hold any
            of it.
        DonorError: The base cannot be read.
        FileExistsError: `output_dir` is not empty, and `overwrite` is not set.
        ValueError: There is no such form, or the rank is not positive.
    """
    if to not in EXPORTS:
        raise ValueError(f"to must be one of {sorted(EXPORTS)}, got {to!r}. Choose a form of the list.")
    if rank < 1:
        raise ValueError(f"rank must be an integer >= 1, got {rank!r}. 8 is usual.")
    target = Path(output_dir)
    check_output_dir(target, overwrite)
    graft = StoredGraft(adapter, base, base_revision, revision)
    with atomic_directory(target) as directory:
        done = EXPORTS[to].write(graft, directory, rank)
    done.directory = target
    return done


def to_checkpoint(graft: StoredGraft, directory: Path, rank: int) -> Exported:
    """Copy the base's files and write the patch into the copies: bit-equal to the base outside of the patch."""
    source = Path(graft.base)
    if not source.is_dir():
        patterns = [*_COMPANIONS, "*.safetensors"]
        source = Path(snapshot_download(graft.base, revision=graft.base_revision, allow_patterns=patterns))
    companions = {file for pattern in _COMPANIONS for file in source.glob(pattern) if file.is_file()}
    for file in sorted(companions | {extent.path for extent in graft.view.all_extents().values()}):
        shutil.copyfile(file, directory / file.name)
    done = Exported(directory, graft.patch.num_params)
    for part in graft.written():
        _write(directory, part.extent.path.name, part.extent, part.values, part.indices)
        done.carried += part.indices.numel()
    _write_heads(graft, directory, done)
    return done


def to_vllm(graft: StoredGraft, directory: Path, rank: int) -> Exported:
    """Write one file with `<name>.indices` and `<name>.values` for every tensor of the base's files that changes."""
    done = Exported(directory, graft.patch.num_params)
    tensors: dict[str, torch.Tensor] = {}
    described: dict[str, dict[str, Any]] = {}
    for part in graft.written():
        small = math.prod(part.extent.shape) < 2**31
        tensors[f"{part.name}.indices"] = part.indices.to(torch.int32 if small else torch.int64)
        tensors[f"{part.name}.values"] = part.values.contiguous()
        described[part.name] = {"shape": list(part.extent.shape), "dtype": _dtype_name(part.values.dtype)}
        done.carried += part.indices.numel()
    for name, head in graft.heads.items():
        tensors[f"{name}.values"] = head.flatten()
        described[name] = {"shape": list(head.shape), "dtype": _dtype_name(head.dtype)}
    if graft.heads:
        done.notes.append(f"{', '.join(graft.heads)}: whole, without indices; they load in a call of their own.")
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, directory / VLLM_FILE, {"format": "pt", "tensors": json.dumps(described, sort_keys=True)})
    return done


def to_shira(graft: StoredGraft, directory: Path, rank: int) -> Exported:
    """Write a SHiRA adapter that stock PEFT loads: the deltas of Linear weights, padded with zeros to r(m + n)."""
    done, names = _sort_out(graft, (nn.Linear,))
    shapes = {name: graft.shape(name) for name in names}
    r = max(math.ceil(graft.patch.tensors[name].indices.numel() / sum(shapes[name])) for name in names)
    crowded = sorted(name for name in names if r * sum(shapes[name]) > math.prod(shapes[name]))
    if crowded:
        raise PatchError(
            f"patch must fit SHiRA's r(m + n) entries a layer, got a densest layer that needs r = {r}, which is more "
            f"than all entries of {crowded[0]!r} ({len(crowded)} such). Export to a checkpoint, or graft fewer entries."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        part, (rows, columns) = graft.patch.tensors[name], shapes[name]
        count = r * (rows + columns)
        free = np.setdiff1d(np.arange(count), part.indices.numpy())[: count - part.indices.numel()]
        flat = torch.cat([part.indices, torch.from_numpy(free)])
        flat, order = flat.sort()
        module = name.rpartition(".")[0]
        weights = torch.cat([graft.deltas(name), torch.zeros(len(free))])[order]
        tensors[f"{PEFT_PREFIX}{module}.shira_weight"] = weights
        tensors[f"{PEFT_PREFIX}{module}.shira_indices"] = torch.stack([flat // columns, flat % columns]).int()
    done.notes.append("SHiRA adds deltas, so an entry may differ from the donor's value in its last bit.")
    # Any type but "random" spares whoever loads it the drawing of a mask that is not used.
    config = ShiraConfig(r=r, mask_type="graft", inference_mode=True, **_common(graft, names))
    _save_adapter(graft, directory, config, tensors)
    return done


def to_lora(graft: StoredGraft, directory: Path, rank: int) -> Exported:
    """Write a LoRA adapter: the best rank-r approximation of each layer's delta (Eckart & Young 1936)."""
    done, names = _sort_out(graft, (nn.Linear, Conv1D))
    tensors: dict[str, torch.Tensor] = {}
    left = total = 0.0
    for name in names:
        part, shape = graft.patch.tensors[name], graft.shape(name)
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
        r=rank, lora_alpha=rank, fan_in_fan_out=transposing, inference_mode=True, **_common(graft, names)
    )
    _save_adapter(graft, directory, config, tensors)
    return done


@dataclass(frozen=True)
class Form:
    """One row of the table of exports.

    Args:
        write: Writes a graft into a directory.
        summary: One line for `--help` and the docs.
    """

    write: Callable[[StoredGraft, Path, int], Exported]
    summary: str


EXPORTS: dict[str, Form] = {
    "checkpoint": Form(to_checkpoint, "a full merged checkpoint, bit-equal to the base outside of the patch"),
    "vllm": Form(to_vllm, "flat indices and values in the base's checkpoint, for vLLM's CheckpointWeightPatch"),
    "shira": Form(to_shira, "a SHiRA adapter for PEFT without this package; Linear weights only"),
    "lora": Form(to_lora, "the best LoRA adapter of a given rank, with its error; Linear and Conv1D weights only"),
}


def low_rank(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Approximate a matrix by a product of two thin ones: delta ~ up @ down, the best of this rank in any unitary norm.

    Rows and columns without entries are left out of the decomposition. Where more than `EXACT_UP_TO` of both remain,
    the singular vectors come from a randomized subspace iteration, close to the best.

    Args:
        delta: float32 [out, in].
        rank: Number of columns of `up`, >= 1.

    Returns:
        down float32 [rank, in] and up float32 [out, rank], of equal norms; zeros where the matrix has a lower rank.
    """
    rows, columns = delta.any(1).nonzero().flatten(), delta.any(0).nonzero().flatten()
    down, up = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
    if not rows.numel():
        return down, up
    core = delta[rows][:, columns]
    if min(core.shape) <= EXACT_UP_TO:
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


def _sort_out(graft: StoredGraft, classes: tuple[type[nn.Module], ...]) -> tuple[Exported, list[str]]:
    """The names of the weights that a form with only these modules can hold."""
    done, names, left_out = Exported(Path(), graft.patch.num_params), [], Counter[str]()
    for name, part in graft.patch.tensors.items():
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
            f"patch must have entries in {kinds} for this form, got {done.left_out}. Export to a checkpoint."
        )
    return done, names


def _common(graft: StoredGraft, names: list[str]) -> dict[str, Any]:
    return {
        "task_type": graft.config.task_type,
        "auto_mapping": graft.config.auto_mapping,
        "base_model_name_or_path": graft.base,
        "revision": graft.base_revision,
        "target_modules": sorted(name.rpartition(".")[0] for name in names),
        "modules_to_save": graft.config.modules_to_save if graft.heads else None,
    }


def _save_adapter(graft: StoredGraft, directory: Path, config: PeftConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    heads = {f"{PEFT_PREFIX}{name}": head for name, head in graft.heads.items()}
    whole = {key: tensor.contiguous() for key, tensor in {**tensors, **heads}.items()}
    save_file(whole, directory / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config.save_pretrained(str(directory))


def _write(directory: Path, file: str, extent: Any, values: torch.Tensor, indices: torch.Tensor | None = None) -> None:
    """Write values into a copy of the base's file, at the indices of a tensor, or over all of it."""
    count = math.prod(extent.shape)
    width = values.dtype.itemsize
    mapped = np.memmap(directory / file, np.uint8, mode="r+", offset=extent.offset, shape=count * width)
    rows = mapped.reshape(count, width)
    coded = values.contiguous().view(torch.uint8).numpy().reshape(-1, width)
    rows[slice(None) if indices is None else indices.numpy()] = coded
    mapped.flush()


def _write_heads(graft: StoredGraft, directory: Path, done: Exported) -> None:
    """Write modules stored whole over the base's, or into a file of their own where the base has none."""
    extra: dict[str, torch.Tensor] = {}
    held = {*graft.view.names()}
    for name, head in graft.heads.items():
        if name not in held:
            extra[name] = head
            continue
        (extent,) = graft.view.extents(name)
        if extent.shape != tuple(head.shape):
            raise PatchError(
                f"head must have the base's shape, got {tuple(head.shape)} for {extent.shape} in {name!r}. "
                "Use a base without this head, such as the pretrained model."
            )
        _write(directory, extent.path.name, extent, head.to(extent.dtype))
    if extra:
        _add_file(graft, directory, extra)
        done.notes.append(f"the base has no {', '.join(sorted(extra))}; they are in {HEAD_FILE}.")


def _add_file(graft: StoredGraft, directory: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add a file of tensors to a checkpoint, and name the class that has them in its configuration."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / HEAD_FILE, {"format": "pt"})
    index = directory / INDEX_FILE
    if index.is_file():
        fields = json.loads(index.read_text(encoding="utf-8"))
    else:
        # A checkpoint in one file of the usual name would be read without its index.
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


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
