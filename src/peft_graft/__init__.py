"""peft-graft: turn a fine-tuned checkpoint into a tiny patch adapter. Importing it registers GRAFT with PEFT."""

from .deltas import DonorError
from .patch import Patch, PatchError
from .selection import RULES, SelectionError
from .training import AlphaCallback, fit_alpha, initialize_graft
from .tuner import GraftConfig, GraftModel

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "AlphaCallback",
    "DonorError",
    "GraftConfig",
    "GraftModel",
    "Patch",
    "PatchError",
    "SelectionError",
    "fit_alpha",
    "initialize_graft",
]
