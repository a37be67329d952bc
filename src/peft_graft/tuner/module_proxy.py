"""ModuleProxy: a wrapper that reads and writes like the module in it, with the patch on its parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .apply.per_row import OnlyMetadata, Rows
from .backends.sharded import is_sharded

# Widths of a Linear, a convolution, an embedding, a Conv1D, attention; PEFT's layers expose the first names.
_WIDTH_IN = ("in_features", "in_channels", "num_embeddings", "nx", "embed_dim")
_WIDTH_OUT = ("out_features", "out_channels", "embedding_dim", "nf", "embed_dim")


class ModuleProxy(nn.Module, BaseTunerLayer):
    """Attributes of the wrapped module, patched parameters included, for code that reads them without calling it."""

    keys: dict[str, str]
    tied: set[str]
    base_layer: nn.Module

    def base_parameter(self, param: str) -> torch.Tensor:
        """Return the base's parameter itself."""
        raise NotImplementedError

    @property
    def rows(self) -> Rows | None:
        """Return the adapter of each row of the batch, while they differ."""
        raise NotImplementedError

    def has_entries(self, adapter_name: str, param: str) -> bool:
        """Return whether an adapter patches this parameter."""
        raise NotImplementedError

    def effective(self, param: str) -> torch.Tensor | None:
        """Return the parameter with the active patches on it, or None where that is the parameter as it stands."""
        raise NotImplementedError

    def _read(self, param: str) -> torch.Tensor:
        if self.rows is not None and any(self.has_entries(name, param) for name in self.rows.names):
            return self.base_parameter(param).as_subclass(OnlyMetadata)
        # Tied names must stay the parameter itself, or tie_weights would tie a copy.
        base = self.base_parameter(param)
        patched = None if param in self.tied or is_sharded(base) else self.effective(param)
        return base if patched is None else patched

    @property
    def weight(self) -> torch.Tensor:
        """Return the patched weight, for code that reads another module's weight."""
        return self._read("weight") if "weight" in self.keys else self.get_base_layer().weight

    @property
    def bias(self) -> torch.Tensor | None:
        """Return the patched bias, or None."""
        return self._read("bias") if "bias" in self.keys else self.get_base_layer().bias

    @property
    def in_features(self) -> int | None:
        """Return the width of the input; None where the module has none, as a norm."""
        return self._width(_WIDTH_IN)

    @property
    def out_features(self) -> int | None:
        """Return the width of the output; None where the module has none."""
        return self._width(_WIDTH_OUT)

    def _width(self, names: tuple[str, ...]) -> int | None:
        base = self.get_base_layer()
        return next((getattr(base, name) for name in names if hasattr(base, name)), None)

    def __getattr__(self, name: str) -> Any:
        """Forward what this wrapper lacks to the wrapped module, patched where it is a parameter."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            if name in self.__dict__.get("keys", {}):
                return self._read(name)
            return self._patched_child(name, getattr(self.base_layer, name))

    def _patched_child(self, name: str, child: Any) -> Any:
        # nn.TransformerEncoderLayer reads self_attn.out_proj.weight without calling self_attn.
        params = [param for param in self.__dict__.get("keys", {}) if param.startswith(f"{name}.")]
        if not params:
            return child
        view = copy.copy(child)  # shares the parameters; an instance attribute shadows them
        view.__dict__.update({param.rpartition(".")[2]: self._read(param) for param in params})
        return view

    def __setattr__(self, name: str, value: Any) -> None:
        """Forward writes of the wrapped module's parameters to it (weight tying, initialisation)."""
        if name in self.__dict__.get("keys", {}):
            setattr(self.get_base_layer(), name, value)
        else:
            super().__setattr__(name, value)
