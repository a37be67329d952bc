"""Keep the card and the names right where PEFT, transformers and the Trainer publish a graft.

`push_to_hub` saves into a temporary directory, puts a card of its own over the adapter's, and uploads; a Trainer writes
its own card into its output directory and has `create_or_update_model_card` complete it. Neither has a hook, so a model
that is saved or loaded gets two methods of its own, on the instance: no class of another library is changed.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from torch import nn
from transformers import TrainerCallback

from ..adapter_files.card import CARD_FILE, refresh_card
from ..adapter_files.hub_names import strip_local_paths
from ..adapter_files.summary import read_saved
from .config import GraftConfig
from .trainer import register_with_trainer


def watch_trainers() -> None:
    """Register with the Trainer, unless nobody has imported it: that takes a second, and a script imports it first."""
    if "transformers.trainer" in sys.modules:
        register_with_trainer(PublicNames)


def keep_card(model: nn.Module) -> None:
    """Give a model that can be published the two methods."""
    for method in (_upload_modified_files, create_or_update_model_card):
        if hasattr(type(model), method.__name__):
            setattr(model, method.__name__, types.MethodType(method, model))


def _upload_modified_files(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Complete the card that push_to_hub has put in place of the adapter's (a stock one, or the repository's own)."""
    saved = read_saved(working_dir)
    if saved is not None:
        strip_local_paths(working_dir)
        refresh_card(saved.copied_to(working_dir), repo_id=repo_id, tags=getattr(self, "model_tags", None) or ())
    return type(self)._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)


def create_or_update_model_card(self: Any, output_dir: str | os.PathLike[str]) -> None:
    """Complete a card as PEFT does, but keep the tags that are there, which PEFT replaces."""
    path = Path(output_dir) / CARD_FILE
    tags = (ModelCard.load(path, ignore_metadata_errors=True).data.tags or []) if path.is_file() else []
    type(self).create_or_update_model_card(self, output_dir)
    refresh_card(output_dir, tags=tags)


class PublicNames(TrainerCallback):
    """Have a Trainer that pushes save names that others can follow, in all it saves: it uploads its whole directory."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the first checkpoint."""
        if getattr(args, "push_to_hub", False):
            _save_for_hub(model)

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before `Trainer.push_to_hub` saves."""
        _save_for_hub(model)


def _save_for_hub(model: Any) -> None:
    for config in getattr(model, "peft_config", {}).values():
        if isinstance(config, GraftConfig):
            config.for_hub = True
