"""Private and undocumented names of other libraries: one row for each, and the check that they are there.

Only this package imports such names; other rooms take them from here, without the underscore. Hooks that a subclass
overrides, and the dictionaries of `nn.Module`, must be named where they are used: these rows say `elsewhere=True`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from importlib import import_module
from importlib.metadata import version
from types import CodeType
from typing import Any, NamedTuple

AT_IMPORT = "at import"


class Range(NamedTuple):
    """Versions of a library: those that pyproject.toml allows, and the one that the tests run with."""

    supported: str
    tested: str


class PrivateName(NamedTuple):
    """One name of another library that its documentation does not promise.

    Attributes:
        name: Dotted path. Of an attribute that instances get, the path of the class, then the attribute.
        why: What it is used for.
        parameters: Parameters that the function must have, as this package passes or overrides them.
        set_by: Dotted path of the function that sets the attribute, where no class declares it.
        checked: "at import", or what shows that it is still there.
        elsewhere: Whether other rooms may use the name as it is.
    """

    name: str
    why: str
    parameters: tuple[str, ...] = ()
    set_by: str = ""
    checked: str = AT_IMPORT
    elsewhere: bool = False

    @property
    def library(self) -> str:
        """Return the name of the library, as it is imported."""
        return self.name.partition(".")[0]


# From the ground up: a library imports those above it.
LIBRARIES = {
    "torch": Range(">=2.6", "2.13.0"),
    "huggingface_hub": Range(">=1.31,<3", "2.4.0"),
    "accelerate": Range(">=1.4", "1.15.0"),
    "transformers": Range(">=5", "5.23.0"),
    "peft": Range(">=0.21", "0.21.2"),
}

_TUNER = "peft.tuners.tuners_utils.BaseTuner"
_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_MODULE = "torch.nn.Module"
_AUTO = "transformers.models.auto.modeling_auto"
_LOADING = "transformers.core_model_loading"
_QUANTIZED = "tests/tuner/backends/test_quantized.py"
_SHARDED = "tests/test_distributed.py"

NAMES = (
    # torch
    PrivateName("torch.Tensor._version", "tell whether logits have changed since the mask was made"),
    PrivateName("torch.ops.aten._unsafe_view", "take the mark of a view from what an autograd function returns"),
    PrivateName("torch._C.DisableTorchFunctionSubclass", "read a tensor subclass's metadata without asking it again"),
    PrivateName("torch._dynamo.OptimizedModule._orig_mod", "find the module in what torch.compile returns",
                checked="tests/tuner/test_hosts.py"),
    PrivateName("torch.distributed.fsdp.FullyShardedDataParallel._fsdp_wrapped_module", "find the module in FSDP1",
                checked="tests/peft_compat/test_private_names.py"),
    PrivateName(f"{_MODULE}._parameters", "read parameters without the patch that shadows them", elsewhere=True),
    PrivateName(f"{_MODULE}._buffers", "read buffers by name", elsewhere=True),
    PrivateName(f"{_MODULE}._modules", "read submodules before __getattr__ is of use", elsewhere=True),
    PrivateName(f"{_MODULE}._apply", "resolve patches anew when parameters are moved or cast", ("fn", "recurse"),
                elsewhere=True),
    PrivateName(f"{_MODULE}._forward_hooks", "see who else looks into a module while it runs"),
    PrivateName(f"{_MODULE}._forward_pre_hooks", "see who looks into its inputs"),
    PrivateName(f"{_MODULE}._backward_hooks", "see who looks into its gradients"),
    PrivateName(f"{_MODULE}._backward_pre_hooks", "see who changes its gradients"),
    # huggingface_hub
    PrivateName("huggingface_hub.file_download.repo_folder_name", "find which commit of a base is in the cache",
                ("repo_id", "repo_type")),
    # accelerate
    PrivateName("accelerate.hooks.ModelHook._hf_hook", "find the hook that fetches an offloaded module's parameters",
                set_by="accelerate.hooks.add_hook_to_module"),
    PrivateName("accelerate.hooks.AlignDevicesHook", "read where the parameters are, and where the module runs",
                ("offload", "weights_map", "execution_device")),
    PrivateName("accelerate.hooks.SequentialHook", "look through several hooks on one module", ("hooks",)),
    # transformers
    PrivateName("transformers.conversion_mapping.get_model_conversion_mapping",
                "see a checkpoint's tensors under the model's names", ("model",)),
    PrivateName(f"{_LOADING}.rename_source_key", "rename one key of a checkpoint",
                ("source_key", "weight_renamings", "weight_converters", "meta_state_dict")),
    PrivateName(f"{_LOADING}.dot_natural_key", "sort keys as transformers does before it joins experts", ("s",)),
    PrivateName(f"{_LOADING}.WeightRenaming", "tell renamings from conversions"),
    PrivateName(f"{_LOADING}.WeightConverter", "read what is joined and how", ("source_patterns", "operations")),
    PrivateName(f"{_LOADING}.Concatenate", "know in which order entries are joined", ("dim",)),
    PrivateName(f"{_LOADING}.MergeModulelist", "know in which order experts are joined", ("dim",)),
    PrivateName(f"{_AUTO}.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "find the task of a sequence classifier"),
    PrivateName(f"{_AUTO}.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "the same for causal language models"),
    PrivateName(f"{_AUTO}.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "the same for encoder-decoders"),
    PrivateName(f"{_AUTO}.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", "the same for token classification"),
    PrivateName(f"{_AUTO}.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", "the same for question answering"),
    PrivateName("transformers.Trainer.hub_model_id", "know a Trainer that uploads what it saves",
                checked="tests/tuner/test_trainer.py"),
    PrivateName("transformers.trainer_utils.PREFIX_CHECKPOINT_DIR", "find a Trainer's checkpoints"),
    PrivateName("transformers.utils.PushToHubMixin._upload_modified_files", "complete the card that push_to_hub writes",
                ("working_dir", "repo_id"), elsewhere=True),
    PrivateName("transformers.PretrainedConfig._name_or_path", "read from config.json where a model came from",
                set_by="transformers.PretrainedConfig.name_or_path", elsewhere=True),
    PrivateName("transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
                "know tensors of a donor that the base's class leaves out by intention"),
    PrivateName("transformers.integrations.moe._is_expert_parallel", "know modules of experts, which run in place",
                checked="tests/peft_compat/test_private_names.py; without it they run on patched copies"),
    # peft
    PrivateName("peft.utils.peft_types.PeftType._member_map_", "add GRAFT to PEFT's closed list of methods"),
    PrivateName("peft.utils.peft_types.PeftType._member_names_", "list GRAFT among its names"),
    PrivateName("peft.utils.peft_types.PeftType._value2member_map_", "let PeftType('GRAFT') find it"),
    PrivateName("peft.utils.other._get_submodules", "find a module's parent by the module's name", ("model", "key")),
    PrivateName("peft.tuners.tuners_utils._find_minimal_target_modules", "write short target_modules into the config",
                ("target_modules", "other_module_names")),
    PrivateName("peft.tuners.tuners_utils._maybe_include_all_linear_layers", "resolve target_modules='all-linear'",
                ("peft_config", "model")),
    PrivateName("peft.tuners.tuners_utils.check_target_module_exists", "match modules as every method of PEFT does",
                ("config", "key")),
    PrivateName("peft.tuners.tuners_utils.check_adapters_to_merge", "choose the adapters that merge() merges",
                ("module", "adapter_names")),
    PrivateName("peft.utils.quantization_utils.QuantizationBackend", "read a quantized weight in floats"),
    PrivateName("peft.utils.quantization_utils.resolve_quantization_backend", "find how PEFT reads a weight",
                ("base_layer",)),
    PrivateName("peft.PeftModel._enable_peft_forward_hooks", "begin and end a forward of the whole model",
                elsewhere=True),
    PrivateName(f"{_TUNER}.inject_adapter", "graft after PEFT has wrapped the modules",
                ("model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"), elsewhere=True),
    PrivateName(f"{_TUNER}._prepare_adapter_config", "choose targets that depend on the base",
                ("peft_config", "model_config"), elsewhere=True),
    PrivateName(f"{_TUNER}._create_and_replace", "wrap a module",
                ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"), elsewhere=True),
    PrivateName(f"{_TUNER}._inject_parameters", "wrap the owners of bare parameters",
                ("peft_config", "model", "adapter_name", "low_cpu_mem_usage"), elsewhere=True),
    PrivateName(f"{_TUNER}._replace_module", "put a layer in place: the stock one reads child.weight",
                ("parent", "child_name", "new_module", "child"), elsewhere=True),
    PrivateName(f"{_TUNER}._check_tied_modules", "take tied modules as targets", ("model", "peft_config"),
                elsewhere=True),
    PrivateName(f"{_TUNER}._check_merge_allowed", "refuse to merge into quantized weights", elsewhere=True),
    PrivateName(f"{_TUNER}._get_adapter_state_dict", "pack a patch into the tensors of its file",
                ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"), elsewhere=True),
    PrivateName(f"{_TUNER}._remap_adapter_state_dict_for_load", "unpack a patch from them",
                ("model", "config", "adapter_name", "state_dict"), elsewhere=True),
    PrivateName(f"{_LAYER}._get_base_layer_device_and_dtype", "tell where a layer without `weight` is",
                ("base_layer",), elsewhere=True),
    PrivateName(f"{_LAYER}._move_adapter_to_device_of_base_layer", "move a patch without casting the donor's bits",
                ("adapter_name", "device"), elsewhere=True),
    PrivateName("peft.utils.ModulesToSaveWrapper.adapter_state_dict", "save a head that is the donor's",
                ("adapter_name", "state_dict"), elsewhere=True),
    PrivateName("peft.utils.ModulesToSaveWrapper.delete_adapter", "forget one with its adapter",
                ("adapter_name", "new_active_adapters"), elsewhere=True),
    # Libraries that few need: looked for on the objects themselves, which are as before where they lack them.
    PrivateName("bitsandbytes.nn.Linear4bit.support_avx512bf16_for_cpu", "keep 4 bits in an order that can be read",
                checked=_QUANTIZED),
    PrivateName("bitsandbytes.functional.QuantState.packing_format_for_cpu", "notice 4 bits that are in another order",
                checked=_QUANTIZED),
    PrivateName("deepspeed.zero.Parameter.ds_tensor", "read the part of a parameter that ZeRO-3 keeps on this rank",
                checked=_SHARDED),
    PrivateName("deepspeed.zero.Parameter.ds_shape", "know a partitioned parameter's shape", checked=_SHARDED),
    PrivateName("deepspeed.zero.Parameter.ds_numel", "know how many values it has", checked=_SHARDED),
    PrivateName("deepspeed.zero.Parameter.ds_process_group", "gather its values", checked=_SHARDED),
)  # fmt: skip


def require_names(*libraries: str) -> None:
    """Check that the installed libraries have the names that this package leans on.

    Args:
        libraries: Which ones, as they are imported; all by default.

    Raises:
        ImportError: Some are missing; the message names all of them, and the supported versions.
    """
    wanted = [row for row in NAMES if row.checked == AT_IMPORT and row.library in (libraries or LIBRARIES)]
    raise_missing(row for row in wanted if not is_there(row))


def raise_missing(rows: Iterable[PrivateName]) -> None:
    """Raise for names that are missing, if there are any.

    Raises:
        ImportError: Names all of them, and the versions that have them.
    """
    by_library: dict[str, list[str]] = {}
    for row in rows:
        shown = f"{row.name}({', '.join(row.parameters)})" if row.parameters else row.name
        by_library.setdefault(row.library, []).append(shown)
    if not by_library:
        return
    lacks = [f"{library} {version(library)} lacks {', '.join(names)}" for library, names in by_library.items()]
    ranges = ", ".join(f"{library}{LIBRARIES[library].supported}" for library in by_library)
    tested = " ".join(f"{library}=={LIBRARIES[library].tested}" for library in by_library)
    raise ImportError(
        f"peft-graft needs internals that the installed libraries do not have: {'; '.join(lacks)}. Supported are "
        f"{ranges}; the tests ran with these: pip install {tested}"
    )


def is_there(row: PrivateName) -> bool:
    """Return whether the installed library has a name, with the parameters that this package passes."""
    if row.set_by:
        found = _find(row.set_by)
        function = found.fget if isinstance(found, property) else found
        return callable(function) and row.name.rpartition(".")[2] in _words(inspect.unwrap(function).__code__)
    found = _find(row.name)
    if found is None or not row.parameters:
        return found is not None
    return set(row.parameters) <= set(inspect.signature(found).parameters)


def _find(name: str) -> Any:
    """Return what a dotted path leads to; None where there is no such thing."""
    path, *rest = name.split(".")
    found: Any = import_module(path)
    for part in rest:
        path = f"{path}.{part}"
        if isinstance(found, type) and part in found.__dict__.get("__annotations__", {}):
            found = found.__dict__["__annotations__"][part]  # what instances get
        elif hasattr(found, part) or not inspect.ismodule(found):
            found = getattr(found, part, None)
        else:  # transformers does not show all of its modules as attributes
            try:
                found = import_module(path)
            except ModuleNotFoundError:
                return None
    return found


def _words(code: CodeType) -> Iterator[str]:
    """Iterate over the attributes and the strings of a function, and of those defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        elif isinstance(constant, str):
            yield constant
