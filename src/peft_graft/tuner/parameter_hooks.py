"""ParameterHooks: patch the bare parameters of a module that also has submodules, through its forward hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from ..checkpoints.wrappers import GRAFTED_PARAMETERS
from .apply.forward import patched
from .backends.sharded import require_whole
from .layer import GraftLayer
from .mask import GraftStates


class ParameterHooks(GraftLayer):
    """Patch bare parameters of a module that has submodules: a child that acts through the parent's forward hooks."""

    has_rows = False

    def __init__(self, parent: nn.Module, name: str, states: GraftStates) -> None:
        nn.Module.__init__(self)
        self.__dict__["parent"] = parent  # not registered: the parent already contains this module
        self._setup(name, states)
        self._open: list[Any] = []
        self._hooks: list[Any] = []
        self.hook()

    def hook(self) -> None:
        """Act at the parent's forward, after whatever else does."""
        for hook in self._hooks:
            hook.remove()
        parent = self.get_base_layer()
        self._hooks = [
            parent.register_forward_pre_hook(self._enter),
            parent.register_forward_hook(self._leave, always_call=True),
        ]

    def get_base_layer(self) -> nn.Module:
        """Return the parent module, whose parameters are patched."""
        return self.__dict__["parent"]

    def _enter(self, module: nn.Module, args: Any) -> None:
        held = {self.tensor_name(param): self.base_parameter(param) for param in self.keys}
        held |= dict(self.graft_patch.named_parameters())
        require_whole(held, "patched", "Exclude them, or raise stage3_param_persistence_threshold above their size.")
        context = patched(self)
        context.__enter__()
        self._open.append(context)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)

    def detach_from_parent(self) -> None:
        """Remove the hooks and this module from the parent."""
        for hook in self._hooks:
            hook.remove()
        delattr(self.get_base_layer(), GRAFTED_PARAMETERS)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Merge or unmerge; the caller then removes this module."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse to run: the parent's forward is patched through its hooks."""
        raise RuntimeError("a ParameterHooks has no forward of its own. Call the module that contains it.")

    def __getattr__(self, name: str) -> Any:
        """Look up an attribute as any module does: forwarding would search the parent through its own child."""
        return nn.Module.__getattr__(self, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> ParameterHooks:
        """Copy along with the parent, whose hooks are copied with it."""
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return clone
