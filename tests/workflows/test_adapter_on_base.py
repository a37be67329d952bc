"""A saved adapter on its base's files writes what the grafted model holds, and refuses a base that is not its own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

import models
from grafts import output, same_bits
from models import perturbed, tiny_llama
from peft_graft import DonorError, GraftConfig, PatchError, export, extract, stitch
from peft_graft.workflows.adapter_on_base import AdapterOnBase


def make(tmp_path: Path, family: str = "tiny_gpt2", alpha: float = 1.0) -> type:
    """Save a base and an adapter; return the class that loads the base."""
    base = getattr(models, family)(torch.bfloat16)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    perturbed(base).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.05, alpha=alpha)
    return type(base)


@pytest.mark.parametrize(("family", "alpha"), [("tiny_gpt2", 1.0), ("tiny_mixtral", 0.7)])
def test_edits_are_what_merging_changes(family: str, alpha: float, tmp_path: Path) -> None:
    cls = make(tmp_path, family, alpha)
    graft = AdapterOnBase(tmp_path / "skill")
    files = {file.name: load_file(file) for file in (tmp_path / "base").glob("*.safetensors")}
    for edit in graft.edits():
        tensor = files[edit.extent.path.name][edit.name]
        assert edit.extent.shape == tuple(tensor.shape) and edit.values.dtype == tensor.dtype
        tensor.flatten()[edit.indices] = edit.values
    merged = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "skill").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    expected = {name: t for file in (tmp_path / "merged").glob("*.safetensors") for name, t in load_file(file).items()}
    found = {name: tensor for tensors in files.values() for name, tensor in tensors.items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_deltas_and_values_are_those_of_the_equation(tmp_path: Path) -> None:
    make(tmp_path, alpha=0.7)
    graft = AdapterOnBase(tmp_path / "skill")
    for name, part in graft.patch.tensors.items():
        before = graft.base_values(name).float()
        expected = (before + 0.7 * (part.values.float() - before)).bfloat16()
        assert torch.equal(graft.values(name), expected)
        assert torch.equal(graft.deltas(name), expected.float() - before)


def test_tied_tensors_have_all_their_names(tmp_path: Path) -> None:
    base = models.tiny_gpt2(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.5, target_modules="all")
    graft = AdapterOnBase(tmp_path / "skill")
    assert {"transformer.wte.weight", "lm_head.weight"} in [{*graft.aliases(name)} for name in graft.patch.tensors]


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / "skill" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(PatchError, match="base must be given for .*, whose configuration names none"):
        AdapterOnBase(tmp_path / "skill")
    assert AdapterOnBase(tmp_path / "skill", tmp_path / "base").patch.num_params > 0


def test_another_base_and_no_base_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(PatchError, match="base"):
        AdapterOnBase(tmp_path / "skill", tmp_path / "donor")
    models.tiny_llama().save_pretrained(tmp_path / "llama")
    with pytest.raises((PatchError, DonorError)):
        AdapterOnBase(tmp_path / "skill", tmp_path / "llama")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(DonorError, match="the base that the adapter names"):
        AdapterOnBase(tmp_path / "skill")


# Resized vocabularies


@pytest.fixture(params=["targeted", "whole", "other"])
def resized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter `skill` of a base that was resized in memory, beside `base`, and `larger`, the resized base."""
    options = {"targeted": {"target_modules": "all"}, "whole": {"modules_to_save": ["embed_tokens", "lm_head"]}}
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    base.save_pretrained(tmp_path / "larger")
    perturbed(base).save_pretrained(tmp_path / "donor")
    config = GraftConfig(
        donor=str(tmp_path / "donor"), density=0.5, task_type="CAUSAL_LM", **options.get(request.param, {})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT tells that it stores the embeddings
        get_peft_model(base, config).save_pretrained(tmp_path / "skill")
    return tmp_path


MESSAGE = (
    r"base must have as many rows as when the adapter was made, got 64 where the adapter stores 70 in "
    r"'lm_head.weight', 'model.embed_tokens.weight'.*resize_token_embeddings\(70\).*--base"
)


def test_a_vocabulary_of_another_size_is_told_by_every_way_to_load(resized: Path) -> None:
    with pytest.raises(PatchError, match=MESSAGE):
        AutoPeftModelForCausalLM.from_pretrained(resized / "skill")
    with pytest.raises(PatchError, match=MESSAGE):
        PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(resized / "base"), resized / "skill")
    for to in ("checkpoint", "vllm", "lora"):
        with pytest.raises(PatchError, match=MESSAGE):
            export(resized / "skill", to, resized / "out")
    with pytest.raises(PatchError, match=MESSAGE):
        stitch([resized / "skill"], resized / "out")


def test_the_remedies_work(resized: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(resized / "base")
    base.resize_token_embeddings(70, mean_resizing=False)
    base.load_state_dict(LlamaForCausalLM.from_pretrained(resized / "larger").state_dict())
    model = PeftModel.from_pretrained(base, resized / "skill")
    export(resized / "skill", "checkpoint", resized / "out", base=resized / "larger")
    batch = {"input_ids": torch.tensor([[1, 2, 69]])}
    assert same_bits(output(LlamaForCausalLM.from_pretrained(resized / "out"), batch), output(model, batch))
