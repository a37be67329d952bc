"""A graft and PEFT's other methods: one after the other works; one inside the other is refused at once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from grafts import assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2
from peft_graft import GraftConfig, PatchError

# PEFT warns too, in words that depend on the way in.
pytestmark = pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|You are trying to modify):UserWarning")
LORA = {"target_modules": ["query"], "init_lora_weights": False}


def lora(model: nn.Module) -> PeftModel:
    return get_peft_model(model, LoraConfig(**LORA))


@pytest.mark.feature("a graft merged into the base, then a LoRA")
def test_a_lora_on_a_merged_graft_starts_from_it_and_loads_on_it_again(tmp_path: Path) -> None:
    base = tiny_bert()
    donor, batch = perturbed(base, scale=0.3), inputs(base)
    skill = graft(base, donor, density=0.05)
    patched = output(skill, batch)
    skill.save_pretrained(tmp_path / "skill")
    model = get_peft_model(skill.merge_and_unload(), LoraConfig(target_modules=["query"]))
    assert same_bits(output(model, batch), patched)
    model.train()(**batch).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if ".lora_" in name
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    wanted = output(model, batch)
    model.save_pretrained(tmp_path / "lora")
    # The file of a LoRA does not say that a graft was below it: both are loaded, in this order.
    again = PeftModel.from_pretrained(tiny_bert(), tmp_path / "skill").merge_and_unload()
    again = PeftModel.from_pretrained(again, tmp_path / "lora")
    assert same_bits(output(again, batch), wanted)
    assert not same_bits(output(PeftModel.from_pretrained(tiny_bert(), tmp_path / "lora"), batch), wanted)


@pytest.mark.feature("a graft merged into the base, then a LoRA")
def test_after_a_merge_the_base_is_another_one(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05).save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(tiny_bert(), tmp_path).merge_and_unload()
    with pytest.raises(PatchError, match="base must be the model that this patch was made for.*before any fine-tuning"):
        PeftModel.from_pretrained(merged, tmp_path)


@pytest.mark.feature("a LoRA merged into the base, then a graft")
def test_a_merged_lora_is_a_base_like_any(tmp_path: Path) -> None:
    adapted = lora(tiny_bert())
    trained = adapted.merge_and_unload()
    donor, batch = perturbed(trained), inputs(trained)
    model = graft(trained, donor, density=0.05)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(trained), tmp_path)
    assert same_bits(output(loaded, batch), output(model, batch))
    with pytest.raises(PatchError, match="base must be the model"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


@pytest.mark.feature("a fine-tuned LoRA as the donor")
def test_a_merged_lora_is_a_donor_like_any() -> None:
    base, batch = tiny_bert(), inputs(tiny_bert())
    donor = lora(tiny_bert()).merge_and_unload()
    model = graft(base, donor, density=1.0, target_modules=["query"])
    # A LoRA leaves the biases as they are, and entries that equal the base's are not taken.
    assert set(held(model)) == {f"bert.encoder.layer.{i}.attention.self.query.weight" for i in (0, 1)}
    assert same_bits(output(model, batch), output(donor, batch))


INSERTIONS = {
    "get_peft_model": lambda model, config: get_peft_model(model.get_base_model(), config),
    "get_peft_model of a PeftModel": get_peft_model,
    "inject_adapter_in_model": lambda model, config: inject_adapter_in_model(config, model.get_base_model(), "second"),
    "transformers": lambda model, config: model.get_base_model().add_adapter(config, "second"),
    "mixed": lambda model, config: get_peft_model(model.get_base_model(), config, mixed=True),
}


@pytest.mark.feature("a LoRA around or inside a graft", "no: PEFT would drop the patch when it merges; merge one first")
@pytest.mark.parametrize("way", sorted(INSERTIONS))
def test_a_lora_does_not_enter_a_grafted_model(way: str) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.05)
    before, names = output(model, inputs(base)), list(model.state_dict())
    with pytest.raises(
        ValueError, match="adapters of a grafted model must be grafts, got LoraConfig.*merge_and_unload"
    ):
        INSERTIONS[way](model, LoraConfig(**LORA))
    assert list(model.state_dict()) == names and list(model.peft_config) == ["default"]
    assert same_bits(output(model, inputs(base)), before)


@pytest.mark.feature("a LoRA around or inside a graft")
@pytest.mark.parametrize("way", sorted(INSERTIONS)[:3])
@pytest.mark.parametrize("targets", [["query"], ["output.dense"]], ids=["same layers", "others"])
def test_a_graft_does_not_enter_a_model_with_a_lora(way: str, targets: list[str]) -> None:
    model = lora(tiny_bert())
    before, names = output(model, inputs(tiny_bert())), list(model.state_dict())
    config = GraftConfig(donor="zeros", density=0.1, target_modules=targets)
    with pytest.raises(ValueError, match=r"base must carry no other PEFT method, got \S*query \(lora.Linear\)"):
        INSERTIONS[way](model, config)
    assert list(model.state_dict()) == names and list(model.peft_config) == ["default"]
    assert same_bits(output(model, inputs(tiny_bert())), before)


@pytest.mark.feature("a LoRA around or inside a graft")
def test_a_model_holds_adapters_of_one_method() -> None:
    base = tiny_bert()
    message = "Cannot combine adapters with different peft types"
    with pytest.raises(ValueError, match=message):
        graft(base, "zeros", density=0.1).add_adapter("second", LoraConfig(**LORA))
    with pytest.raises(ValueError, match=message):
        lora(base).add_adapter("second", GraftConfig(donor="zeros", density=0.1))


@pytest.mark.feature("PeftMixedModel", "no: PEFT mixes a fixed list of methods; merge the graft, then add the others")
def test_mixed_models_name_the_methods_they_take() -> None:
    message = "GRAFT' is not compatible with the `PeftMixedModel`. Compatible types are"
    config = GraftConfig(donor="zeros", density=0.1)
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_bert(), config, mixed=True)
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_bert(), LoraConfig(**LORA), mixed=True).add_adapter("second", config)


@pytest.mark.feature("prompt tuning of a grafted model")
def test_soft_prompts_go_before_a_grafted_model() -> None:
    base = tiny_gpt2()
    model = graft(base, perturbed(base, scale=0.3), density=0.1)
    batch = inputs(base)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned = get_peft_model(model.get_base_model(), config)
    with torch.no_grad():
        prompt = tuned.prompt_encoder["default"].embedding.weight.expand(len(batch["input_ids"]), -1, -1)
        embedded = torch.cat([prompt, base.get_input_embeddings()(batch["input_ids"])], dim=1)
        wanted = copy.deepcopy(model).merge_and_unload()(inputs_embeds=embedded).logits
    assert torch.equal(output(tuned, batch), wanted)
    tuned.train()(**batch).loss.backward()
    assert [name for name, p in tuned.named_parameters() if p.grad is not None] == [
        "prompt_encoder.default.embedding.weight"
    ]
    assert_same(parameters(model.unload()), parameters(base))


# What PEFT offers LoRA alone


@pytest.fixture
def loaded(tmp_path: Path) -> tuple[PeftModel, Path]:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05).save_pretrained(tmp_path)
    return PeftModel.from_pretrained(base, tmp_path), tmp_path


@pytest.mark.feature("hot-swapping", "no: PEFT swaps LoRA only; load_adapter and set_adapter switch in O(patch)")
def test_hot_swapping_names_the_methods_it_takes(loaded: tuple[PeftModel, Path]) -> None:
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but GRAFT was passed"):
        hotswap_adapter(loaded[0], loaded[1], "default")


@pytest.mark.feature("convert_to_lora", "no: a patch of single entries has no low rank")
def test_a_graft_does_not_become_a_lora(loaded: tuple[PeftModel, Path]) -> None:
    assert loaded[0].supports_lora_conversion() is False
    with pytest.raises(TypeError, match="do not support LoRA conversion.*Graft"):
        convert_to_lora(loaded[0], 4)


@pytest.mark.feature("rescale_adapter_scale", "no: PEFT rescales LoRA only; set alpha in the adapter's config")
def test_only_a_lora_is_rescaled(loaded: tuple[PeftModel, Path]) -> None:
    with pytest.raises(ValueError, match="scaling is only supported for models with `LoraLayer`s"):
        with rescale_adapter_scale(loaded[0], 0.5):
            pass


@pytest.mark.feature("LoRA's own options in a config", "no: TypeError names the option")
@pytest.mark.parametrize("option", ["r", "lora_alpha", "layer_replication", "trainable_token_indices", "use_dora"])
def test_options_of_other_methods_are_refused(option: str) -> None:
    config: Callable[..., GraftConfig] = GraftConfig
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        config(donor="zeros", density=0.1, **{option: 1})
