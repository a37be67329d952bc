"""Recognize a Trainer that saves a grafted model, and keep card and names right where the model is published.

transformers has no hook by which a model could learn that a Trainer is saving it, and a callback among its default ones
would come with every Trainer of the process. A save therefore looks at the functions that it was called from: where
`Trainer.train` of this very model is among them, the save is a checkpoint, which training must be able to go on from.
Nothing is registered, no other Trainer is touched, and a training that an exception ended leaves nothing behind.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from torch import nn

from ..adapter_files.card import CARD_FILE, refresh_card
from ..adapter_files.hub_names import strip_local_paths
from ..adapter_files.summary import read_saved

if TYPE_CHECKING:
    from transformers import Trainer


def _trainers(model: nn.Module) -> Iterator[tuple[Trainer, set[str]]]:
    """Yield each Trainer of the model that has called this function, with the names of the functions in between."""
    module = sys.modules.get("transformers.trainer")  # nobody has a Trainer who has not imported it
    names: set[str] = set()
    frame = inspect.currentframe() if module else None
    while module and frame is not None:
        names.add(frame.f_code.co_name)
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.Trainer) and any(part is model for part in caller.model.modules()):
            yield caller, names
        frame = frame.f_back


def is_trainer_checkpoint(model: nn.Module) -> bool:
    """Return whether a Trainer is saving the model in the midst of its training.

    Args:
        model: The model that is being saved.

    Returns:
        True inside of `Trainer.train`, up to the callbacks of its end, which see a finished model.
    """
    return any(trainer.is_in_train and "on_train_end" not in names for trainer, names in _trainers(model))


def is_for_hub(model: nn.Module) -> bool:
    """Return whether a Trainer is saving the model into a directory that it uploads to the Hub.

    Args:
        model: The model that is being saved.

    Returns:
        True where a Trainer saves it that has a repository, because of `push_to_hub=True` or its method of this name.
    """
    return any(trainer.hub_model_id is not None for trainer, _ in _trainers(model))


def keep_card(model: nn.Module) -> None:
    """Have a model complete its card wherever PEFT, transformers or a Trainer write another one over it.

    `push_to_hub` saves into a temporary directory, puts a card of its own there, and uploads; a Trainer writes its own
    card into its output directory and has `create_or_update_model_card` complete it. Neither has a hook, so the model
    gets two methods on the instance: no class of another library is changed.
    """
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
    # The live configuration, because the names of local models are gone from one that is for the Hub.
    records = [config.record for config in getattr(self, "peft_config", {}).values() if config.record]
    hub_ids = {name: found for record in records for name, found in (record.hub_ids or {}).items()}
    refresh_card(output_dir, tags=tags, hub_ids=hub_ids)
