"""Private names of bitsandbytes: the order in which it keeps 4 bits for the CPU. It need not be installed."""

from __future__ import annotations

from typing import Any


def is_packed_for_cpu(module: Any) -> bool:
    """Return whether a forward on the CPU has brought a module's 4 bits into an order that cannot be read."""
    return bool(getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False))


def keep_packing_readable(module: Any) -> None:
    """Keep a module's 4 bits in their order in its next forwards."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
