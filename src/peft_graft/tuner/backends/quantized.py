"""GraftQuantizedLinear: a patch made on the float base, on a Linear that bitsandbytes or torchao has quantized."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend
from torch import nn
from torch.nn import functional as F

from ..layer import GraftLayer, GraftLinear
from ..mask import GraftStates


def find_backend(module: nn.Module) -> QuantizationBackend | None:
    """Find how PEFT reads the weight of a quantized Linear.

    Args:
        module: Any module.

    Returns:
        The way; None where the module is no quantized Linear, or one that cannot be read.
    """
    if not isinstance(module, nn.Linear) or type(module.weight) is nn.Parameter:
        return None  # without asking PEFT, which imports every library for quantization that is installed
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=_not_needed)
    return backend if backend is not None and backend.supports_merge else None


def _not_needed() -> None:
    """Stands for how torchao would quantize a merged weight: none is merged."""


def _keep_readable(module: Any, name: str) -> None:
    """Keep bitsandbytes from packing 4 bits for the CPU (AVX-512) in the first forward: that order cannot be read.

    Raises:
        ValueError: A forward has packed them already.
    """
    if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            f"base in 4 bits must be grafted before it runs on a CPU, got {name!r}, which bitsandbytes has packed for "
            "this CPU in a forward. Load the base anew, and the graft right after it."
        )
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False


def require_float(layers: Iterable[GraftLayer], done: str) -> None:
    """Refuse what needs the base's exact values.

    Args:
        layers: Grafted layers.
        done: What cannot be done, such as "merged".

    Raises:
        ValueError: Names the first quantized layers.
    """
    names = [layer.tensor_prefix for layer in layers if layer.quantization_backend is not None]
    if names:
        raise ValueError(
            f"base must be in a float dtype for grafts to be {done}, got quantized {', '.join(names[:3])}"
            f"{' and more' if names[3:] else ''}. Leave them apart here, or do it on the base before it is quantized."
        )


class GraftQuantizedLinear(GraftLinear):
    """GraftLinear over a quantized weight: x W'^T + b, W' the weight as it reads in floats, with the patch's values.

    Without an active patch the wrapped module runs as it is, in its own arithmetic.
    """

    def __init__(self, base_layer: nn.Module, name: str, states: GraftStates) -> None:
        super().__init__(base_layer, name, states)
        self.quantization_backend = find_backend(base_layer)
        _keep_readable(base_layer, name)

    def base_parameter(self, param: str) -> torch.Tensor:
        """The bias, or a copy of the weight in floats."""
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
