"""`python -m peft_graft` is `peft-graft`."""

import sys

from .cli import main

sys.exit(main())
