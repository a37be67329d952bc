"""One method in one base: PEFT would wrap the layers of one in the other's, and lose a patch when it merges these."""

from __future__ import annotations

from collections.abc import Mapping

from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import GraftConfig
from .layer import GraftLayer


class GraftConfigs(dict[str, PeftConfig]):
    """The configs of a grafted model by adapter name, where PEFT enters a new one before it wraps any module."""

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        """Enter a config.

        Raises:
            ValueError: It is of another method.
        """
        self.update({adapter_name: config})

    def update(self, configs: Mapping[str, PeftConfig]) -> None:  # type: ignore[override]
        """Enter several configs, as `__setitem__`."""
        others = sorted({type(config).__name__ for config in configs.values() if not isinstance(config, GraftConfig)})
        if others:
            raise ValueError(
                f"adapters of a grafted model must be grafts, got {', '.join(others)}. "
                "Write the graft into the base first, base = model.merge_and_unload(), and add the other one to that."
            )
        super().update(configs)


def require_no_other_method(model: nn.Module) -> None:
    """Refuse a base that carries another PEFT method already.

    Raises:
        ValueError: Names the first layers of it.
    """
    found = [
        f"{name} ({type(module).__module__.split('.')[-2]}.{type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, GraftLayer)
    ]
    if found:
        raise ValueError(
            f"base must carry no other PEFT method, got {', '.join(found[:3])}{' and more' if found[3:] else ''}. "
            "Merge and unload that one first, base = model.merge_and_unload(), and graft the result."
        )
