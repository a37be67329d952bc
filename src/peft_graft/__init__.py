"""Turn a fine-tuned checkpoint into a small PEFT adapter. Importing this package registers GRAFT with PEFT."""

from .peft_compat import register as register  # first, because it names everything that is missing at once

# isort: split
from .checkpoints.pairing import DonorError
from .patch.combinations import register_combination
from .patch.patch import Patch, PatchError
from .selection.rules import RULES, register_rule
from .selection.topk import SelectionError
from .training.alpha import fit_alpha
from .training.callbacks import AlphaCallback
from .training.donor_objective import DonorObjectiveMixin, donor_loss, store_donor_outputs, use_donor_outputs
from .training.donor_outputs import DonorOutputs
from .training.initialize import initialize_graft
from .tuner import GraftConfig, GraftModel
from .workflows.compress import compress
from .workflows.diff import diff
from .workflows.export import export
from .workflows.extract import extract
from .workflows.inspect import inspect
from .workflows.push import push
from .workflows.stitch import stitch

__version__ = "0.1.0"
__all__ = [
    "RULES",
    "AlphaCallback",
    "DonorError",
    "DonorObjectiveMixin",
    "DonorOutputs",
    "GraftConfig",
    "GraftModel",
    "Patch",
    "PatchError",
    "SelectionError",
    "compress",
    "diff",
    "donor_loss",
    "export",
    "extract",
    "fit_alpha",
    "initialize_graft",
    "inspect",
    "push",
    "register_combination",
    "register_rule",
    "stitch",
    "store_donor_outputs",
    "use_donor_outputs",
]
