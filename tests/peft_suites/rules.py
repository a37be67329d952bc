"""How PEFT's suites are run: what does not apply to a graft and why, exemptions, and tests with LoRA as an example."""

from __future__ import annotations

from typing import Any, NamedTuple

from cases import Graft


class Rule(NamedTuple):
    """Tests, by a regular expression searched in `file::Class::test[case]`, and what is to be said about them."""

    tests: str
    reason: str


class Exemption(NamedTuple):
    """A method that PEFT's tests treat in a way of its own, whose name stands for a graft in some tests."""

    tests: str
    module: str
    name: str
    reason: str
    stand_in: Any = Graft


_FIXED = "a fixed patch has no parameters, so there is nothing to train; the learned cases run it"

DESELECTED = [
    Rule(r"::test_adapter_name\[.*fixed", "looks for the adapter among the parameters: " + _FIXED),
    Rule(r"::test_add_adapter_no_autocast_adapter_dtype\[.*fixed", "asks for the dtype of parameters: " + _FIXED),
    Rule(
        r"::test_(training(_\w+)?|only_params_are_updated|disable_adapters|disable_adapters_with_merging|"
        r"inference_safetensors|parameters_after_loading_model)\[(True-|False-)?fixed (?!MLP modules_to_save)",
        _FIXED,
    ),
    Rule(
        r"::test_(save_pretrained|save_pretrained_pickle|save_pretrained_selected_adapters|"
        r"save_pretrained_selected_adapters_pickle|parameters_after_loading_model)\[learned",
        "compares all tensors before and after a save; saving packs a learned mask, and what is loaded is a fixed "
        "patch with fewer entries (its outputs are compared in test_save_load_roundtrip, test_inference_safetensors)",
    ),
    Rule(
        r"::test_save_load_roundtrip_(direct_injection|fsdp_wrapped)\[learned",
        "puts the packed patch into an adapter whose mask is being trained; a graft refuses that, because a resumed "
        "training would have nothing left to train",
    ),
    Rule(
        r"::test_from_pretrained_config_construction\[",
        "wants the very object of the config that the user passes; a graft keeps a copy, because it records the "
        "budget, alpha and the fingerprint of the base in it",
    ),
    Rule(
        r"::test_adapter_dtype_autocast\[\w+-False-dtype[01]-learned|::test_add_adapter_no_autocast_adapter_dtype\[",
        "wants trainable parameters in half precision; mask logits are float32 always, or small steps would be lost",
    ),
    Rule(
        r"::test_safe_merge\[\w+ tied weights",
        "writes the state dict with safetensors' save_file, which refuses tied weights of any model",
    ),
    Rule(
        r"::test_disable_adapters(_with_merging)?\[learned MLP zeros",
        "wants another output after three small steps; with donor='zeros' the entries differ too much in size for "
        "these to change the mask",
    ),
    Rule(r"::test_default_target_modules_", "wants an error without target_modules; a graft has a default"),
    Rule(
        r"::test_add_adapter_rejects_duplicate_name_without_mutation\[True|test_mixed_model|PeftMixedModel",
        "uses PeftMixedModel, whose list of methods is closed",
    ),
    Rule(
        r"::test_multiple_adapters_(same_modules_to_save|seq_cls_mixed_modules_to_save)_merging_adapters",
        "wants a refusal of two adapters with the same head; a graft refuses heads that differ "
        "(tests/tuner/test_weighted.py), and these are equal",
    ),
    Rule(r"::test_add_weighted_adapter_cat_with_rank_pattern", "about ranks"),
    Rule(
        r"::test_multiple_adapters_no_needless_copy_modules_to_save",
        "wants embeddings saved without the head that is tied to them; a graft takes both, as logits need both",
    ),
    Rule(r"::TestHotSwapping", "hot-swapping is closed to all methods but LoRA"),
    Rule(
        r"::test_get_peft_model_state_dict_removes_adapter_name_when_same_as_module_name",
        "looks for modules in the keys of an adapter's file; a patch has two keys, of which one is the table of names",
    ),
    Rule(
        r"::test_save_pretrained_targeting_lora_to_embedding_layer\[.*-auto",
        "wants the whole embedding in the file when it is targeted; a graft stores the entries that it changes",
    ),
    Rule(r"prompt_learning|prompt_tuning", "about prompt learning"),
    Rule(
        r"test_config.*::test_(from_pretrained|from_pretrained_cache_dir|save_pretrained_with_runtime_config)\[",
        "loads an adapter of LoRA from the Hub",
    ),
    Rule(
        r"::test_(merge_layers_multi|(generate_with_)?mixed_adapter_batches)\[fixed zeros",
        "wants two adapters of the same config to differ; with donor='zeros' nothing is drawn at random",
    ),
    Rule(
        r"::test_(generate_with_)?mixed_adapter_batches\[\w+ everything",
        "runs every module row by row; the patched position embeddings have no rows, and a graft says so",
    ),
    Rule(
        r"::test_prepare_for_training_parametrized\[learned everything",
        "wants embeddings that do not train; this case trains their mask",
    ),
    Rule(
        r"::test_merge_layers_nan\[",
        "puts NaN into the parameters and wants merging to refuse them in LoRA's words; a graft has mask logits there, "
        "if anything, and refuses those that are NaN (tests/tuner/test_mask.py)",
    ),
    Rule(
        r"target_parameters.*::test_(generate_with_)?mixed_adapter_batches\[",
        "wants a refusal in LoRA's words; a graft runs experts row by row, and refuses those that repeat rows in its "
        "own (tests/tuner/apply/test_per_row.py)",
    ),
    Rule(
        r"::test_training_gradient_checkpointing\[True-learned everything.*Deberta",
        "reentrant checkpointing cannot go back twice through a tensor that is computed outside and read in every "
        "layer, as DeBERTa reads its embeddings of distances; the other kind can",
    ),
    Rule(
        r"tuners_utils.*::test_(requires_grad_irregular|model_requires_grad_model_irregular|module_type|peft_types|"
        r"adapter_model_type|nb_params|(model_)?target_parameters|model_status_with_modules_to_save|transformers_model|"
        r"model_with_injected)|ModuleNames::test_realistic_example",
        "wants LoRA's names, numbers of parameters or default targets",
    ),
    Rule(
        r"::test_(target_module_and_target_parameter_on_same_layer|adding_multiple_adapters_with_different_target_para)|"
        r"target_parameters.*::test_weighted_combination_of_adapters",
        "wants a refusal of what LoRA cannot do; a graft can",
    ),
    Rule(
        r"::test_target_parameters_wrong_type_raises",
        "wants a TypeError in LoRA's words; a graft raises a ValueError (tests/tuner/test_config.py)",
    ),
    Rule(
        r"::test_no_infinite_recursion\[PeftModelFor(QuestionAnswering|TokenClassification)",
        "makes the class of a task with a config that names no task, so that the graft cannot know of the head",
    ),
    Rule(
        r"::test_(get_peft_model(_with_task_type)?|inject_adapter)_low_cpu_mem_usage_works|"
        r"::test_inject_from_state_dict_(?!.*raises)",
        "wants the tensors of an adapter whose file has not been read; a graft has none before, and says so",
    ),
    Rule(
        r"::test_prefix_removal_is_undone|::test_get_no_split_modules_recursive", "loads a model that is not made here"
    ),
    Rule(r"::test_get_peft_model_revision_warning", "loads a revision from the Hub"),
    Rule(r"::test_targeting_trainable_tokens", "about trainable tokens"),
    Rule(
        r"::TestLowLevelFunctional::test_(?!.*rejects)|::test_base_model_module_named_like_peft_prefix|"
        r"::test_save_pretrained_warns_for_unsharded_state_dict",
        "wants LoRA's names of tensors",
    ),
    Rule(
        r"::test_load_resized_embedding",
        "loads onto a resized embedding; a graft refuses every base but its own",
    ),
    Rule(
        r"::test_mixed_adapter_batches_(mha_raises|length_mismatch_raises|training_mode_raises|merged_raises)",
        "wants LoRA's words in the error; a graft refuses too, in its own (tests/tuner/apply/test_per_row.py)",
    ),
]

EXEMPTIONS = [
    Exemption(
        r"::test_disable_adapters(_with_merging)?\[",
        "test_custom_models",
        "DeftConfig",
        "the output changes as soon as the adapter is there, as with DEFT's para=True",
    ),
    Exemption(
        r"::test_load_model_low_cpu_mem_usage\[",
        "testing_common",
        "LNTuningConfig",
        "nothing is on the meta device: how many entries a patch has is known when its file is read",
    ),
    Exemption(
        r"(?i)gpt2|weighted_combination",
        "testing_common",
        "IA3Config",
        "supports transformers' Conv1D, and add_weighted_adapter without ranks, as IA3 does",
    ),
    Exemption(
        r"decoder_models",
        "test_decoder_models",
        "BeftConfig",
        "PEFT means to skip BEFT on models without biases, but skips all methods but instances of BEFT",
        stand_in=type,
    ),
    *(
        Exemption(r"::test_(generate_with_)?mixed_adapter_batches\[", module, "LoraConfig", "has adapter_names")
        for module in ("testing_common", "test_decoder_models", "test_encoder_decoder_models", "test_target_parameters")
    ),
]

# Tests that take LoRA as an example of a method: `LoraConfig` is a graft in them, with a mask that trains ...
BORROWED = [
    r"test_custom_models.*::test_(add_adapter_rejects|delete_adapter_|weight_bias_attributes|multiple_adapters_)(?!.*token)",
    r"test_custom_models.*::test_(existing|non_existing)_model_card",
    r"test_custom_models.*::test_(load_does_not_overwrite|save_embedding_layers|ignore_mismatched|load_resized|"
    r"save_pretrained_targeting|adapter_name_makes|unload_adapter_multihead)",
    r"test_custom_models.*::TestRequiresGrad::test_requires_grad_(modules_to_save|follows|lora)(?!.*token)",
    r"test_custom_models.*::TestMixedAdapterBatches::(?!.*(_dora|timing|wrong_adapter_name))",
    r"test_tuners_utils.*::Test(TargetedModuleNames|TargetedParameterNames|ExcludedModuleNames|ModelAndLayerStatus)::"
    r"(?!.*(ia3|tokens|loha|vera|transformer_model|vanilla|prefix|adaption|mixed|hierarchy))",
    r"test_vision_models.*::TestResnet",
]

# ... or with a fixed patch.
BORROWED_FIXED = [
    r"test_initialization.*::Test(LowCpuMemUsage|NamingConflictWarning|CustomModelConfigWarning|NoInfiniteRecursion)",
    r"test_initialization.*::TestLoraInitialization::test_.*target_parameter",
    r"test_low_level_api.*::(?!.*rejects_shared_state)",
    r"test_other\.py::(?!.*(uninitialized|self_targeting|split_modules_simple|TestPrepareModel|embedding\[|tying_disabled))",
    r"test_mapping.*::",
]

# Tests that make the same random base twice and do not notice: it is the same base here.
SAME_BASE = [
    r"::test_loading_model_(with_modules_to_save_)?requires_grad_set_correctly",
    r"::test_load_does_not_overwrite_similarly_named_sibling",
    r"::test_ignore_mismatched_sizes_with_scalar_modules_to_save",
    r"::test_loading_multiple_adapters_with_target_parameters_works",
]
