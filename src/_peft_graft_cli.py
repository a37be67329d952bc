"""Start the command `peft-graft` without waiting for torch and PEFT.

Importing `peft_graft.cli` the usual way would first run `peft_graft/__init__.py`, which registers GRAFT with PEFT and
takes seconds: too long for `--help`. This entry point loads the room `cli` by its path instead. A command imports
`peft_graft` when it runs, so the library never has to know how its process was started.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> int:
    """Run the command line; see `peft_graft.cli.main`."""
    spec = spec_from_file_location("peft_graft.cli", Path(__file__).with_name("peft_graft") / "cli" / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError("peft_graft.cli must be installed beside _peft_graft_cli.py. Install peft-graft again.")
    room = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(room)
    return room.main()
