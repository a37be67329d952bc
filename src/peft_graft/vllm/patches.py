"""Patches in the forms that vLLM takes, and the calls that apply them in a running engine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..checkpoints.donor import CheckpointDonor
from ..patch.patch import PatchError
from ..workflows.adapter_on_base import AdapterOnBase
from ..workflows.checkpoint_patch import VLLM_FILE, CheckpointEdit, CheckpointPatch
from .switch import positions

if TYPE_CHECKING:
    from vllm import LLM

BACKEND = "peft_graft"


def graft(llm: LLM, adapter: str | os.PathLike[str], *, revision: str | None = None) -> None:
    """Apply a skill to a running engine, in place of the one that is applied.

    The engine must be started with `weight_transfer_config=WeightTransferConfig(backend="peft_graft")`. Its workers
    read the adapter themselves, so a directory must be visible to them under this path. Nothing may be running: call it
    between calls of `generate`. The engine reports the adapter as its weight version.

    Args:
        llm: The engine, of the adapter's base, not quantized.
        adapter: Directory or Hub id of the adapter, or directory of its `export` to `"vllm"`.
        revision: Branch, tag or commit of an adapter on the Hub.

    Raises:
        RuntimeError: A request is running. The weights have changed; wait, and reset the prefix cache.
    """
    _update(llm, {"adapter": os.fspath(adapter), "revision": revision}, os.fspath(adapter))


def ungraft(llm: LLM) -> None:
    """Take the applied skill out of a running engine: every weight has the base's bits again.

    Args:
        llm: The engine.

    Raises:
        RuntimeError: A request is running. The weights have changed; wait, and reset the prefix cache.
    """
    _update(llm, {"adapter": None}, "base")


def read_patch(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> CheckpointPatch:
    """Read a skill in the coordinates of its base's files.

    Args:
        adapter: Directory or Hub id of the adapter, or directory of its `export` to `"vllm"`. The export is read in
            time proportional to the patch; the adapter needs the base's tensors.
        base: Directory or Hub id of the base that the patch is for. Default: the base that the adapter names, and for
            an export no check of the base.
        base_revision: Branch, tag or commit of a base on the Hub.
        revision: Branch, tag or commit of an adapter on the Hub.
        token: Token for the Hub.
        trust_remote_code: Run the code that comes with a base that transformers does not know.

    Returns:
        The patch.

    Raises:
        PatchError: It is no finished graft, or belongs to another base.
        DonorError: The base cannot be read.
        OSError: The adapter or the base does not exist.
    """
    exported = Path(adapter) / VLLM_FILE
    if not exported.is_file():
        return CheckpointPatch.from_adapter(
            AdapterOnBase(adapter, base, base_revision, revision, token, trust_remote_code)
        )
    patch = CheckpointPatch.load(exported)
    if base is not None:
        patch.require_base(CheckpointDonor(base, base_revision, "base", token))
    return patch


def checkpoint_weight_patches(
    edits: CheckpointPatch | Mapping[str, CheckpointEdit], device: torch.device | str = "cpu"
) -> list[Any]:
    """Return vLLM's `CheckpointWeightPatch` of every changed tensor, for `load_checkpoint_weight_patches`.

    Tensors stored whole are given with the indices of all their entries. So all go into one call, and all are written
    in place; vLLM would reload a layer for a tensor without indices.

    Args:
        edits: A patch, or the edits of `plan`.
        device: Device of the tensors: the model's.
    """
    from vllm.model_executor.model_loader.checkpoint_weight_patch import CheckpointWeightPatch

    return [
        CheckpointWeightPatch(
            name=name,
            shape=edit.shape,
            dtype=edit.values.dtype,
            values=edit.values.to(device),
            indices=positions(edit).to(device),
        )
        for name, edit in _edits(edits).items()
    ]


def sparse_weight_patches(
    edits: CheckpointPatch | Mapping[str, CheckpointEdit], device: torch.device | str = "cpu"
) -> list[Any]:
    """Return vLLM's `SparseWeightPatch` of every changed tensor, for `send_weights` of its `sparse_nccl` backend.

    Args:
        edits: A patch, or the edits of `plan`: with these, a trainer's process reverts and switches skills.
        device: Device of the tensors: the sender's.

    Raises:
        PatchError: A tensor has 2^31 entries or more, and vLLM sends indices as int32.
    """
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

    found = []
    for name, edit in _edits(edits).items():
        indices = positions(edit)
        if indices.numel() and int(indices[-1]) >= 2**31:
            raise PatchError(
                f"indices must be below 2^31 for vLLM's sparse_nccl, got {int(indices[-1])} in {name!r}. "
                f"Use the backend {BACKEND!r}."
            )
        found.append(SparseWeightPatch(name, indices.to(device, torch.int32), edit.values.to(device), edit.shape))
    return found


def _edits(edits: CheckpointPatch | Mapping[str, CheckpointEdit]) -> Mapping[str, CheckpointEdit]:
    return edits.edits if isinstance(edits, CheckpointPatch) else edits


def _update(llm: LLM, info: dict[str, Any], version: str) -> None:
    llm.start_weight_update()
    llm.update_weights({"update_info": info})
    llm.finish_weight_update(weight_version=version)
    # Cached keys and values of a prompt are those of other weights.
    if not llm.reset_prefix_cache():
        raise RuntimeError(
            f"no request may run while weights change, got blocks in use after the change to {version!r}. "
            "Wait for the requests, then call llm.reset_prefix_cache()."
        )
