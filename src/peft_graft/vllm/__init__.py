"""Apply, switch and revert skills in a running vLLM engine, through its weight updates and without a reload."""

from .patches import checkpoint_weight_patches, graft, read_patch, sparse_weight_patches, ungraft
from .switch import Switch, plan

__all__ = [
    "Switch",
    "checkpoint_weight_patches",
    "graft",
    "plan",
    "read_patch",
    "sparse_weight_patches",
    "ungraft",
]
