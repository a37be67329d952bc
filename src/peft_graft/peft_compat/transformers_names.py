"""Private names of transformers: how checkpoints are converted while loading, and what a Trainer starts with."""

from __future__ import annotations

from torch import nn

from .private_names import NAMES, is_there, raise_missing, require_names

require_names("torch", "huggingface_hub", "transformers")

from transformers import TrainerCallback
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
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "Concatenate",
    "ExportableState",
    "MergeModulelist",
    "WeightConverter",
    "WeightRenaming",
    "default_callbacks",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "is_experts",
    "modeling_auto",
    "rename_source_key",
]


def default_callbacks() -> list[type[TrainerCallback]]:
    """Return the list of the callbacks that every Trainer starts with, to be appended to.

    Raises:
        ImportError: This transformers has none.
    """
    # Imported late, which takes seconds: only who trains needs it.
    row = next(row for row in NAMES if row.name == "transformers.trainer.DEFAULT_CALLBACKS")
    raise_missing([] if is_there(row) else [row])
    from transformers import trainer

    return trainer.DEFAULT_CALLBACKS  # type: ignore[return-value]


def is_experts(module: nn.Module) -> bool:
    """Return whether transformers runs a module as experts, all of them in one function of their parameters."""
    return "_is_expert_parallel" in vars(module)
