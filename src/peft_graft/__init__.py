"""peft-graft: turn a fine-tuned checkpoint into a tiny patch adapter. Importing it registers GRAFT with PEFT."""

import sys
from pathlib import Path

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "AlphaCallback",
    "DonorError",
    "GraftConfig",
    "GraftModel",
    "Patch",
    "PatchError",
    "SelectionError",
    "fit_alpha",
    "initialize_graft",
]


def _is_command_line() -> bool:
    """Whether this process is `peft-graft` or `python -m peft_graft`."""
    program = Path(sys.argv[0] if sys.argv else "").stem
    return program in ("peft-graft", "peft-graft-script") or (
        program == "-m" and sys.orig_argv[sys.orig_argv.index("-m") + 1] == __name__
    )


# The command line imports what a command needs, when it runs: `peft-graft --help` must not wait for torch and peft.
if not _is_command_line():
    from .peft_compat import register as register  # first, because it names everything that is missing at once

    # isort: split
    from .checkpoints.pairing import DonorError
    from .patch.patch import Patch, PatchError
    from .selection.rules import RULES, SelectionError
    from .training.initialize import AlphaCallback, fit_alpha, initialize_graft
    from .tuner import GraftConfig, GraftModel
