"""Private names of accelerate: the hooks that fetch an offloaded module's parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from .private_names import require_names

require_names("torch", "huggingface_hub", "accelerate")


def offloading_hook(module: nn.Module) -> Any:
    """Return the hook that fetches a module's parameters when it runs.

    Args:
        module: The module that owns them.

    Returns:
        An `accelerate.hooks.AlignDevicesHook` with its `weights_map` and `execution_device`; None where nothing is
        offloaded.
    """
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])  # a sequence of hooks, or one
    return next((each for each in hooks if getattr(each, "offload", False)), None)
