"""The peft_type GRAFT: PEFT's list of methods is a closed enum, so the member is added by hand, once."""

from __future__ import annotations

import inspect

import peft
from peft.tuners import tuners_utils
from peft.utils import save_and_load
from peft.utils.peft_types import PeftType

SUPPORTED = ">=0.20"
_NAME = "GRAFT"


def _extend_enum() -> PeftType:
    if _NAME in PeftType.__members__:
        return PeftType[_NAME]
    member = str.__new__(PeftType, _NAME)
    member._name_ = _NAME
    member._value_ = _NAME
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(_NAME)
    PeftType._member_map_[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    type.__setattr__(PeftType, _NAME, member)
    return member


def check_peft() -> None:
    """Check that the PEFT found has the internals that the tuner leans on.

    Raises:
        ImportError: Names everything that is missing, and the supported versions.
    """
    base, layer = tuners_utils.BaseTuner, tuners_utils.BaseTunerLayer
    needed = {
        "BaseTuner._replace_module": hasattr(base, "_replace_module"),
        "BaseTuner._inject_parameters": hasattr(base, "_inject_parameters"),
        "save_and_load.get_peft_model_state_dict": hasattr(save_and_load, "get_peft_model_state_dict"),
        "save_and_load.set_peft_model_state_dict": hasattr(save_and_load, "set_peft_model_state_dict"),
        "BaseTuner._prepare_adapter_config": hasattr(base, "_prepare_adapter_config"),
        "BaseTuner.inject_adapter(state_dict=)": "state_dict" in inspect.signature(base.inject_adapter).parameters,
        "BaseTunerLayer._move_adapter_to_device_of_base_layer": hasattr(layer, "_move_adapter_to_device_of_base_layer"),
        "tuners_utils.check_adapters_to_merge": hasattr(tuners_utils, "check_adapters_to_merge"),
        "PeftType": all(hasattr(PeftType, name) for name in ("_member_map_", "_member_names_", "_value2member_map_")),
    }
    missing = sorted(name for name, found in needed.items() if not found)
    if missing:
        raise ImportError(
            f"peft must be {SUPPORTED}, got {peft.__version__}, which lacks {', '.join(missing)}. "
            f"Install a supported version: pip install 'peft{SUPPORTED}'."
        )


check_peft()
GRAFT = _extend_enum()
