"""Find the graft in a model, and refuse to look at one that would not show."""

from __future__ import annotations

from torch import nn

from ..tuner import GraftModel


def find_tuner(model: nn.Module) -> GraftModel:
    """Find the graft model inside a PeftModel (or a wrapper around one).

    Raises:
        ValueError: There is none.
    """
    for module in model.modules():
        if isinstance(module, GraftModel):
            return module
    raise ValueError(
        f"model must contain a graft, got {type(model).__name__}. Wrap it with get_peft_model(base, GraftConfig(...))."
    )


def require_in_use(tuner: GraftModel, adapter_name: str) -> None:
    """Refuse to look at the loss of a model that would not show the adapter, or not the base.

    Raises:
        ValueError: The adapter is not active, or something is merged.
    """
    if adapter_name not in tuner.active_adapters:
        raise ValueError(
            f"adapter_name must be an active adapter, got {adapter_name!r} while {tuner.active_adapters} are active. "
            f"Call model.set_adapter({adapter_name!r}) first."
        )
    if any(layer.merged for layer in tuner._layers()):
        raise ValueError("model must be unmerged, got a merged one. Call model.unmerge_adapter() first.")
