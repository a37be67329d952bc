"""PEFT 0.20 has no hooks for the tensors of an adapter's file: the two functions that hold them are wrapped instead.

Only installed where `BaseTuner` lacks these hooks. Every other method is passed through untouched.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import save_and_load

from ..peft_compat.register import GRAFT

_HOLDERS = ("peft", "peft.functional", "peft.peft_model", "peft.utils", "peft.utils.save_and_load")


def install() -> None:
    """Wrap `get_peft_model_state_dict` and `set_peft_model_state_dict` wherever PEFT has imported them."""
    for name, wrap in (("get_peft_model_state_dict", _getter), ("set_peft_model_state_dict", _setter)):
        found = getattr(save_and_load, name)
        function = wrap(getattr(found, "original", found))  # also right when this package is imported a second time
        for holder in _HOLDERS:
            module = sys.modules.get(holder)
            if module is not None and hasattr(module, name):
                setattr(module, name, function)


def _getter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: Any,
        state_dict: dict[str, torch.Tensor] | None = None,
        adapter_name: str = "default",
        unwrap_compiled: bool = False,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        if unwrap_compiled:
            model = getattr(model, "_orig_mod", model)
        config = model.peft_config[adapter_name]
        if config.peft_type != GRAFT:
            return original(model, state_dict, adapter_name, **kwargs)
        state_dict = model.state_dict() if state_dict is None else state_dict
        result = original(model, state_dict, adapter_name, **kwargs)
        others = {key: value for key, value in result.items() if ".graft_patch." not in f".{key}"}
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[GRAFT]
        return others | tuner._get_adapter_state_dict(model, config, adapter_name, state_dict, [])

    get_peft_model_state_dict.original = original  # type: ignore[attr-defined]
    return get_peft_model_state_dict


def _setter(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: dict[str, torch.Tensor], adapter_name: str = "default", **kwargs: Any
    ) -> Any:
        config = model.peft_config[adapter_name]
        if config.peft_type == GRAFT:
            tuner = PEFT_TYPE_TO_TUNER_MAPPING[GRAFT]
            live = tuner._remap_adapter_state_dict_for_load(model, config, adapter_name, peft_model_state_dict)
            # The original puts the adapter's name in.
            peft_model_state_dict = {
                key.replace(f"graft_patch.{adapter_name}.", "graft_patch."): value for key, value in live.items()
            }
        return original(model, peft_model_state_dict, adapter_name, **kwargs)

    set_peft_model_state_dict.original = original  # type: ignore[attr-defined]
    return set_peft_model_state_dict
