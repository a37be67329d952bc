"""The peft_type GRAFT: PEFT's list of methods is a closed enum, so the member is added by hand, once."""

from __future__ import annotations

from peft import PeftType

from .private_names import require_names

_NAME = "GRAFT"


def extend_enum() -> PeftType:
    """Return the member GRAFT of `PeftType`, which is added the first time."""
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


require_names()
GRAFT = extend_enum()
