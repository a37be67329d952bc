"""Private names of transformers: how checkpoints are converted while loading, and what a Trainer calls its own."""

from __future__ import annotations

import re

from torch import nn

from .private_names import require_names

require_names("torch", "huggingface_hub", "transformers")

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.models.auto import modeling_auto
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "Concatenate",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "is_experts",
    "is_ignored_on_load",
    "modeling_auto",
    "rename_source_key",
]


# Buffers that older versions of transformers wrote.
_OLD_BUFFERS = (r"position_ids$", r"rotary_emb\.inv_freq$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers runs a module as experts, all of them in one function of their parameters."""
    return "_is_expert_parallel" in vars(module)


def is_ignored_on_load(model: nn.Module, name: str) -> bool:
    """Return whether transformers passes over a checkpoint's tensor that a model has no place for, by intention."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return any(re.search(pattern, name) for pattern in [*patterns, *_OLD_BUFFERS])
