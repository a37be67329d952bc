"""Private names of transformers: how checkpoints are converted while loading, and what a Trainer calls its own."""

from __future__ import annotations

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
    "modeling_auto",
    "rename_source_key",
]


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers runs a module as experts, all of them in one function of their parameters."""
    return "_is_expert_parallel" in vars(module)
