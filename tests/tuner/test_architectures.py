"""Every kind of transformers model: the donor exactly at density 1, the same logits merged, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from grafts import assert_same, graft, held, output, parameters, same_bits
from models import (
    inputs,
    perturbed,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mamba,
    tiny_mixtral,
    tiny_qwen,
    tiny_roberta,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
)

MODELS = [
    tiny_bert,
    tiny_roberta,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen,
    tiny_mixtral,
    tiny_mamba,
    tiny_t5,
    tiny_vit,
    tiny_whisper,
]
GENERATING = [tiny_gpt2, tiny_llama, tiny_qwen, tiny_mixtral, tiny_mamba, tiny_t5, tiny_whisper]
SHARED = Path(__file__).parents[3] / "shared" / "models"
EVERY_MODEL = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__.removeprefix("tiny_"))


@pytest.mark.feature("BERT, RoBERTa, GPT-2, Llama, Qwen, Mixtral, Mamba, T5, ViT, Whisper")
@EVERY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_everything_is_the_donor(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    base = make(dtype)
    donor, batch = perturbed(base), inputs(base)
    model = graft(base, donor, density=1.0, target_modules="all")
    assert set(model.base_model.targets("default")) == set(parameters(base))
    assert same_bits(output(model, batch), output(donor, batch))
    assert_same(parameters(model.merge_and_unload()), parameters(donor))


@pytest.mark.feature("BERT, RoBERTa, GPT-2, Llama, Qwen, Mixtral, Mamba, T5, ViT, Whisper")
@EVERY_MODEL
@pytest.mark.parametrize("targets", [None, "all"])
def test_a_patch_survives_merging_saving_and_loading(
    make: Callable[..., nn.Module], targets: str | None, tmp_path: Path
) -> None:
    base = make()
    donor, batch = perturbed(base, scale=0.1), inputs(base)
    alone = output(base, batch)
    model = graft(base, donor, density=0.05, target_modules=targets)
    patched = output(model, batch)
    assert not same_bits(patched, alone)
    plain, after = make(), parameters(donor)
    for name, index in held(model).items():
        plain.get_parameter(name).data.view(-1)[index] = after[name].view(-1)[index]
    assert same_bits(output(plain, batch), patched)
    model.save_pretrained(tmp_path)
    assert same_bits(output(PeftModel.from_pretrained(make(), tmp_path), batch), patched)
    model.merge_adapter()
    assert same_bits(output(model, batch), patched)
    model.unmerge_adapter()
    assert same_bits(output(model, batch), patched)
    assert_same(parameters(model.unload()), parameters(base))


@EVERY_MODEL
def test_a_learned_mask_gets_gradients_everywhere(make: Callable[..., nn.Module]) -> None:
    base, batch = make(), inputs(make())
    model = graft(base, perturbed(base), density=0.05, target_modules="all", selection="learned").train()
    model(**batch).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.endswith("_logits") for name in trained)
    unused = {name for name, p in trained.items() if p.grad is None}
    assert all("position" in name or "pooler" in name for name in unused), unused


@pytest.mark.feature("generate")
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "top_k": 9}], ids=str)
@pytest.mark.parametrize("make", GENERATING, ids=lambda make: make.__name__.removeprefix("tiny_"))
def test_generation_is_the_same_merged(make: Callable[..., nn.Module], options: dict[str, object]) -> None:
    base = make()
    model = graft(base, perturbed(base, scale=0.5), density=0.2, target_modules="all").eval()
    batch = {key: value for key, value in inputs(base).items() if key != "labels"}

    def tokens(model: nn.Module) -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**batch, max_new_tokens=8, **{"do_sample": False} | options)

    wanted = tokens(model)
    assert not torch.equal(wanted, tokens(base))
    model.merge_adapter()
    assert torch.equal(tokens(model), wanted)
    model.unmerge_adapter()
    assert torch.equal(tokens(model.merge_and_unload()), wanted)


@pytest.mark.feature("generate")
@pytest.mark.parametrize("name", ["stories260k", "tinystories-656k"])
def test_a_pretrained_model_tells_the_same_story_merged(name: str, tmp_path: Path) -> None:
    """Models of the folder PEFT_GRAFT_MODELS: karpathy/tinyllamas stories260K, and TinyStories-656K of the Hub."""
    folder = Path(os.environ.get("PEFT_GRAFT_MODELS", SHARED)) / name
    if not folder.is_dir():
        pytest.skip(f"no model in {name}: set PEFT_GRAFT_MODELS to the folder that holds it")
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    batch = tokenizer("Once upon a time, there was a", return_tensors="pt", return_token_type_ids=False)

    def story(model: nn.Module) -> str:
        return tokenizer.decode(model.generate(**batch, max_new_tokens=40, do_sample=False)[0])

    model = graft(base, perturbed(base, scale=0.1), density=0.02, task_type="CAUSAL_LM")
    logits, told = output(model, dict(batch)), story(model)
    assert told != story(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    assert same_bits(output(loaded, dict(batch)), logits) and story(loaded) == told
    loaded.merge_adapter()
    assert same_bits(output(loaded, dict(batch)), logits) and story(loaded) == told
    loaded.unmerge_adapter()
    assert_same(parameters(loaded.unload()), parameters(base))
