"""Private names of PEFT: how it matches, replaces and reads the modules of a base."""

from .private_names import require_names

require_names()

from peft.tuners.tuners_utils import _find_minimal_target_modules as find_minimal_target_modules
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers as include_all_linear_layers
from peft.tuners.tuners_utils import check_adapters_to_merge, check_target_module_exists
from peft.utils.other import _get_submodules as get_submodules
from peft.utils.quantization_utils import QuantizationBackend, resolve_quantization_backend

__all__ = [
    "QuantizationBackend",
    "check_adapters_to_merge",
    "check_target_module_exists",
    "find_minimal_target_modules",
    "get_submodules",
    "include_all_linear_layers",
    "resolve_quantization_backend",
]
