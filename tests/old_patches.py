"""Patches in the form of version 1 of the format, two tensors of a file for each patched one, which is still read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from peft_graft.patch.index_codec import encode_indices
from peft_graft.patch.patch import PEFT_PREFIX, Patch, file_key


def to_old_tensors(patch: Patch) -> dict[str, torch.Tensor]:
    state = {}
    for name, part in sorted(patch.plain.items()):
        module, _, param = name.rpartition(".")
        blob, values = encode_indices(part.indices), part.values
        if 0 < values.numel() <= 8 * blob.numel() and not values.contiguous().view(torch.uint8).any():
            values = values.new_empty(values.numel(), 0)
        state[file_key(module, param, "indices")] = blob
        state[file_key(module, param, "values")] = values.contiguous()
    return state


def load_apart(path: Path) -> dict[str, torch.Tensor]:
    """Return what an adapter's file holds, with its patch in the form of version 1."""
    state = {key: tensor for key, tensor in load_file(path).items() if ".graft_patch." not in key}
    return state | {f"{PEFT_PREFIX}{key}": tensor for key, tensor in to_old_tensors(Patch.load(path)).items()}
