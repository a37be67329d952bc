"""GRAFT as a PEFT method: importing this package registers it."""

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from ..peft_compat.register import GRAFT
from .config import GraftConfig
from .layer import GraftLayer, GraftLinear
from .model import GraftModel
from .parameter_hooks import ParameterHooks

__all__ = ["GraftConfig", "GraftLayer", "GraftLinear", "GraftModel", "ParameterHooks"]

if GRAFT not in PEFT_TYPE_TO_TUNER_MAPPING:
    register_peft_method(name="graft", config_cls=GraftConfig, model_cls=GraftModel)
