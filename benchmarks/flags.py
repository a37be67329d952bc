"""Command-line flags of the benchmarks: written with hyphens, accepted with underscores too."""

from __future__ import annotations

import argparse
import sys
from typing import Any


class Flags(argparse.ArgumentParser):
    """A parser that shows a module's docstring in `--help` and takes `--new-tokens` also as `--new_tokens`.

    Args:
        doc: Docstring of the benchmark.
    """

    def __init__(self, doc: str | None) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Spell every flag with hyphens, then parse."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args([_hyphens(word) for word in words], namespace)


def _hyphens(word: str) -> str:
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word
