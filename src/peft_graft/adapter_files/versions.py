"""The versions of the packages that make a patch, for the record and for the card."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("peft-graft", "peft", "transformers", "torch")


def installed_versions() -> dict[str, str]:
    """Return the versions of `PACKAGES` by name, without those that are not installed as packages."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
