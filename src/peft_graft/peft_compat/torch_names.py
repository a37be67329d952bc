"""Private names of torch: version counters, hooks of modules, what torch.compile leaves in names."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn

from .private_names import require_names

require_names("torch")

COMPILED = "_orig_mod"  # the attribute of what torch.compile returns that holds the module
FSDP_WRAPPED = "_fsdp_wrapped_module"  # the same of FSDP's first version
DisableTorchFunctionSubclass = torch._C.DisableTorchFunctionSubclass
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

version_of = operator.attrgetter("_version")
"""Return the version counter of a tensor, which every write in place raises by one."""


def without_view_mark(result: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same memory that autograd does not take for a view."""
    return torch.ops.aten._unsafe_view(result, result.shape)


def hooks_of(module: nn.Module) -> list[Any]:
    """Return all hooks that look into a module while it runs, forward or backward."""
    return [hook for hooks in _HOOKS for hook in getattr(module, hooks).values()]
