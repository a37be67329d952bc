"""Every kind of transformers model: the donor exactly at density 1, the same logits merged, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn

from grafts import assert_same, graft, output, parameters, same_bits
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
EVERY_MODEL = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__.removeprefix("tiny_"))


@EVERY_MODEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_everything_is_the_donor(make: Callable[..., nn.Module], dtype: torch.dtype) -> None:
    base = make(dtype)
    donor, batch = perturbed(base), inputs(base)
    model = graft(base, donor, density=1.0, target_modules="all")
    assert set(model.base_model.targets("default")) == set(parameters(base))
    assert same_bits(output(model, batch), output(donor, batch))
    assert_same(parameters(model.merge_and_unload()), parameters(donor))


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
