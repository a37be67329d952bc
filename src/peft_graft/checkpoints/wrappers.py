"""Look through what wrappers put before a model's own names: torch.compile, FSDP, DataParallel, PEFT, pipelines."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from ..peft_compat.torch_names import COMPILED, FSDP_WRAPPED
from .donor import Donor, DonorError

# These stand before any submodule; the others only before the whole model, where they may also be a model's own names.
_ANYWHERE = re.compile(rf"(?:^|(?<=\.))(?:{COMPILED}|{FSDP_WRAPPED})\.")
_ROOTS = re.compile(r"(?:module|base_model\.model|submod_\d+)\.")
GRAFTED_PARAMETERS = "grafted_parameters"  # must not begin with "graft_": PEFT would take it for adapter internals
_ADAPTER_PARTS = {"graft_patch", "modules_to_save", GRAFTED_PARAMETERS}
_AROUND_MODULES = {COMPILED, FSDP_WRAPPED, "base_layer", "original_module"}
# What PEFT adds to the names of a model that it has changed.
_ADAPTED = re.compile(r"\.(?:base_layer|lora_[A-Za-z_]+|modules_to_save|original_module|graft_patch)\.")


def plain_key(key: str) -> str:
    """Remove the names that torch.compile and FSDP add, anywhere in a module's or tensor's name."""
    return _ANYWHERE.sub("", key)


def plain_name(key: str) -> str | None:
    """Return the name that a module or tensor has without adapters and wrappers; None where an adapter owns it."""
    parts = plain_key(key).split(".") if key else []
    if _ADAPTER_PARTS & {*parts}:
        return None
    return ".".join(part for part in parts if part not in _AROUND_MODULES)


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Remove the names of wrappers.

    Args:
        names: Names of all tensors of a model, such as `module._orig_mod.lm_head.weight`.

    Returns:
        Each name by its plain form, `lm_head.weight`; by itself where two names would have one plain form.
    """
    given = list(names)
    plain = [plain_key(name) for name in given]
    while plain and all(_ROOTS.match(name) for name in plain):
        plain = [plain_key(_ROOTS.sub("", name, count=1)) for name in plain]
    return dict(zip(plain if len({*plain}) == len(plain) else given, given, strict=True))


def look_through(names: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """Remove the names of wrappers, unless names are a model's own as they are.

    Args:
        names: Names of all tensors of a checkpoint or a model.
        wanted: Names that the model has, without wrappers or with one of its own, such as an attribute `module`.

    Returns:
        Name by the name to use for it.
    """
    given = list(names)
    as_given = {name: name for name in given}
    return as_given if as_given.keys() & {*wanted} else plain_names(given)


class UnwrappedDonor:
    """A donor under the names that its tensors have without wrappers.

    Args:
        donor: The donor.
        names: The donor's name by the plain one.

    Attributes:
        name: The donor's name.
    """

    def __init__(self, donor: Donor, names: dict[str, str]) -> None:
        self.name = donor.name
        self._donor, self._names = donor, names

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._donor.shape(self._names[name])

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._donor.get(self._names[name])


def unwrap(donor: Donor, wanted: Iterable[str]) -> Donor:
    """Give a donor's tensors the names that they have without wrappers.

    Args:
        donor: The donor.
        wanted: Names of the base's tensors.

    Returns:
        The donor itself, if no name changes.

    Raises:
        DonorError: The donor carries an adapter that is not merged.
    """
    names, own = donor.names(), {*wanted}  # a model may have a module of its own that is named as an adapter's
    refuse_adapted({*names} - own, donor.name, getattr(donor, "role", "donor"))
    plain = look_through(names, own)
    return donor if all(one == other for one, other in plain.items()) else UnwrappedDonor(donor, plain)


def refuse_adapted(names: Iterable[str], source: str, role: str = "donor") -> None:
    """Refuse the tensors of a model that carries a PEFT adapter.

    Args:
        names: Names of all tensors.
        source: Where they come from.
        role: `"donor"` or `"base"`.

    Raises:
        DonorError: Some names are those of an adapter.
    """
    found = sorted(name for name in names if _ADAPTED.search(name))
    if found:
        raise DonorError(
            f"{role} must be a plain model, got {source!r} with the tensor {found[0]!r} of a PEFT adapter "
            f"({len(found)} such). Merge it first: model = model.merge_and_unload(), then pass the model or the "
            "directory that model.save_pretrained(...) wrote."
        )
