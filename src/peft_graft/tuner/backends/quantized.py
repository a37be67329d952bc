"""Quantized bases: find how a Linear of bitsandbytes or torchao is read, and refuse what needs exact floats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import nn

from ...peft_compat.bitsandbytes_names import is_packed_for_cpu, keep_packing_readable
from ...peft_compat.peft_names import QuantizationBackend, resolve_quantization_backend


class Quantizable(Protocol):
    """A grafted layer, as far as this module looks at it."""

    tensor_prefix: str
    quantization_backend: QuantizationBackend | None


def find_backend(module: nn.Module) -> QuantizationBackend | None:
    """Find how PEFT reads the weight of a quantized Linear.

    Args:
        module: Any module.

    Returns:
        PEFT's backend; None where the module is no quantized Linear, or one that cannot be read.
    """
    if not isinstance(module, nn.Linear) or type(module.weight) is nn.Parameter:
        return None  # without asking PEFT, which imports every library for quantization that is installed
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=_quantize_nothing)
    return backend if backend is not None and backend.supports_merge else None


def _quantize_nothing() -> None:
    """Stand in for torchao's way to quantize a merged weight: none is merged."""


def keep_readable(module: nn.Module, name: str) -> None:
    """Keep bitsandbytes from packing 4 bits for the CPU (AVX-512) in the first forward: that order cannot be read.

    Args:
        module: A quantized Linear.
        name: Its name, for the error message.

    Raises:
        ValueError: A forward has packed them already.
    """
    if is_packed_for_cpu(module):
        raise ValueError(
            f"base in 4 bits must be grafted before it runs on a CPU, got {name!r}, which bitsandbytes has packed for "
            "this CPU in a forward. Load the base anew, and the graft right after it."
        )
    keep_packing_readable(module)


def require_float(layers: Iterable[Quantizable], done: str) -> None:
    """Refuse what needs the base's exact values.

    Args:
        layers: Grafted layers.
        done: What cannot be done, as a participle such as "merged".

    Raises:
        ValueError: Some layers are quantized; the message names the first three.
    """
    names = [layer.tensor_prefix for layer in layers if layer.quantization_backend is not None]
    if names:
        raise ValueError(
            f"base must be in a float dtype for grafts to be {done}, got quantized {', '.join(names[:3])}"
            f"{' and more' if names[3:] else ''}. Leave them apart here, or do it on the base before it is quantized."
        )
