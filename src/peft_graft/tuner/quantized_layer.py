"""GraftQuantizedLinear: a patch made on the float base, on a Linear that bitsandbytes or torchao has quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .backends.quantized import find_backend, keep_readable, require_float
from .layer import GraftLinear
from .mask import GraftStates


class GraftQuantizedLinear(GraftLinear):
    """Run a quantized Linear with a patch: y = x W'^T + b, where W' is the dequantized weight with the patch's values.

    Without an active patch the wrapped module runs as it is, in its own arithmetic.
    """

    def __init__(self, base_layer: nn.Module, name: str, states: GraftStates) -> None:
        super().__init__(base_layer, name, states)
        self.quantization_backend = find_backend(base_layer)
        keep_readable(base_layer, name)

    def base_parameter(self, param: str) -> torch.Tensor:
        """Return the bias itself, or a dequantized copy of the weight [out_features, in_features]."""
        return self.get_base_weight().detach() if param == "weight" else super().base_parameter(param)

    def run_patched(self, adapter_names: list[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.check(adapter_names)
        patched = {param: self.effective(param, adapter_names) for param in self.keys}
        if all(tensor is None for tensor in patched.values()):
            return self.base_layer(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        tensors = [self.base_parameter(param) if tensor is None else tensor for param, tensor in patched.items()]
        values = dict(zip(patched, (tensor.to(x.dtype) for tensor in tensors), strict=True))
        return F.linear(x, values["weight"], values.get("bias"))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge.

        Raises:
            ValueError: Always: to quantize the patched weight anew would round all of it.
        """
        require_float([self], "merged")
