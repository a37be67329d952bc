"""Run the command line: `python -m peft_graft` is `peft-graft`, but loads the library before it shows help."""

import sys

from .cli import main

sys.exit(main())
