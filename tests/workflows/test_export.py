"""Exports hold exactly what they say: merged bits, coordinates of files, and what stock PEFT can load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, PreTrainedModel

import models
from grafts import output, same_bits
from models import inputs, perturbed
from old_patches import load_apart
from peft_graft import PatchError
from peft_graft.workflows import export as export_module
from peft_graft.workflows.checkpoint_patch import VLLM_FILE, CheckpointPatch
from peft_graft.workflows.export import EXPORTS, HEAD_FILE, export, low_rank
from peft_graft.workflows.extract import extract

FAMILIES = sorted(name for name in vars(models) if name.startswith("tiny_"))


def make(tmp_path: Path, family: str, dtype: torch.dtype = torch.float32, shards: str = "8KB", **options: Any) -> type:
    """Save a base, a donor and the adapter between them; return the class that loads them."""
    model = getattr(models, family)(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size=shards)
    perturbed(model).save_pretrained(tmp_path / "donor", max_shard_size=shards)
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", **{"density": 0.05, **options})
    return type(model)


def merged(tmp_path: Path, cls: type[PreTrainedModel]) -> PreTrainedModel:
    return PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "skill").merge_and_unload()


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


# A merged checkpoint


@pytest.mark.parametrize(
    ("family", "alpha"), [*((family, 1.0) for family in FAMILIES), ("tiny_bert", 0.7), ("tiny_mixtral", 0.7)]
)
def test_a_checkpoint_is_what_merging_gives(family: str, alpha: float, tmp_path: Path) -> None:
    cls = make(tmp_path, family, torch.bfloat16, alpha=alpha)
    done = export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    assert done.carried == done.entries > 0
    expected, found = merged(tmp_path, cls), cls.from_pretrained(tmp_path / "out")
    for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert same_bits(one.to(other.dtype), other), name  # PEFT keeps heads in float32
    before, after = all_tensors(tmp_path / "base"), all_tensors(tmp_path / "out")
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    heads = sum(value.numel() for key, value in all_tensors(tmp_path / "skill").items() if "graft_patch" not in key)
    assert 0 < changed <= done.entries + heads
    assert {file.name for file in (tmp_path / "base").iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}


def test_alpha_by_tensor_is_written(tmp_path: Path) -> None:
    cls = make(tmp_path, "tiny_llama")
    path = tmp_path / "skill" / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["alpha"] = {"model.layers.0.mlp.down_proj.weight": 0.25}
    path.write_text(json.dumps(fields))
    export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    expected, found = merged(tmp_path, cls), cls.from_pretrained(tmp_path / "out")
    assert all(same_bits(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


@pytest.mark.parametrize("shards", ["8KB", "1GB"])
def test_a_head_that_the_base_lacks_gets_a_file_and_the_class_its_name(shards: str, tmp_path: Path) -> None:
    donor = models.tiny_bert(num_labels=5)
    donor.save_pretrained(tmp_path / "donor")
    base = BertForMaskedLM(donor.config)
    base.bert.load_state_dict(perturbed(donor).bert.state_dict(), strict=False)
    base.save_pretrained(tmp_path / "base", max_shard_size=shards)
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.1, exclude_modules=["pooler.dense"])
    done = export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    assert HEAD_FILE in done.notes[0]
    found = type(donor).from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 5 and found.config.architectures == ["BertForSequenceClassification"]
    assert same_bits(found.classifier.weight, donor.classifier.weight)
    after = all_tensors(tmp_path / "out")
    assert all(name in after for name in all_tensors(tmp_path / "base"))


def test_a_head_of_another_shape_than_the_bases_is_refused(tmp_path: Path) -> None:
    model = models.tiny_bert(num_labels=2)
    model.save_pretrained(tmp_path / "base")
    donor = models.tiny_bert(num_labels=3)
    donor.bert.load_state_dict(perturbed(model).bert.state_dict())
    donor.save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.1)
    with pytest.raises(
        PatchError, match=r"module to save must have the base's shape, got \(3,\) for \(2,\) in 'classifier\.bias'"
    ):
        export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# A patch for vLLM


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_mixtral", "tiny_gpt2", "tiny_bert"])
def test_a_vllm_patch_turns_the_bases_files_into_the_merged_ones_and_back(family: str, tmp_path: Path) -> None:
    """Also where the files hold experts one by one: indices are of the files, not of the model."""
    make(tmp_path, family, torch.bfloat16, alpha=0.9)
    export(tmp_path / "skill", "checkpoint", tmp_path / "merged")
    done = export(tmp_path / "skill", "vllm", tmp_path / "out")
    before, expected = all_tensors(tmp_path / "base"), all_tensors(tmp_path / "merged")
    after = {name: tensor.clone() for name, tensor in before.items()}
    patch, taken = CheckpointPatch.load(tmp_path / "out" / VLLM_FILE), 0
    for name, edit in patch.edits.items():
        chosen = slice(None) if edit.indices is None else edit.indices
        assert edit.shape == tuple(after[name].shape) and edit.base_values is not None
        assert edit.base_values.dtype == after[name].dtype
        assert same_bits(after[name].view(-1)[chosen], edit.base_values)
        after[name].view(-1)[chosen] = edit.values.to(after[name].dtype)
        taken += 0 if edit.indices is None else len(edit.indices)
    assert taken == done.carried == done.entries
    assert all(same_bits(after[name], expected[name]) for name in expected)
    assert patch.base == str(tmp_path / "base")
    assert ("whole" in "".join(done.notes)) == (family == "tiny_bert")
    keys = load_file(tmp_path / "out" / VLLM_FILE)
    assert all(tensor.dtype == torch.int32 for key, tensor in keys.items() if key.endswith(".indices"))


def test_a_vllm_patch_has_the_bits_of_the_files_where_the_base_loads_in_another_dtype(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama", torch.float32)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "bfloat16"}))
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.05, overwrite=True)
    export(tmp_path / "skill", "vllm", tmp_path / "out")
    before = all_tensors(tmp_path / "base")
    for name, edit in CheckpointPatch.load(tmp_path / "out" / VLLM_FILE).edits.items():
        assert same_bits(before[name].flatten()[edit.indices], edit.base_values)


# Adapters of others


def linear_only(tmp_path: Path, **options: Any) -> type[PreTrainedModel]:
    return make(tmp_path, "tiny_llama", target_modules=["q_proj", "v_proj", "down_proj"], **options)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_a_shira_adapter_computes_what_the_graft_does(tmp_path: Path) -> None:
    cls = linear_only(tmp_path)
    done = export(tmp_path / "skill", "shira", tmp_path / "out")
    assert done.carried == done.entries and not done.left_out
    batch = inputs(models.tiny_llama())
    graft, shira = (
        PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / name) for name in ("skill", "out")
    )
    assert shira.peft_config["default"].peft_type == "SHIRA"
    torch.testing.assert_close(output(shira, batch), output(graft, batch), rtol=1e-6, atol=1e-7)
    assert not torch.equal(output(shira, batch), output(cls.from_pretrained(tmp_path / "base"), batch))


def test_what_shira_cannot_hold_is_told(tmp_path: Path) -> None:
    cls = make(tmp_path, "tiny_bert")
    done = export(tmp_path / "skill", "shira", tmp_path / "out")
    assert done.left_out.keys() == {"LayerNorm.bias", "LayerNorm.weight", "Linear.bias"}
    assert done.carried + sum(done.left_out.values()) == done.entries
    shira = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out").merge_and_unload()
    expected = merged(tmp_path, cls)
    names = [n for n, p in expected.named_parameters() if p.dim() == 2 and "embeddings" not in n]
    for name in names:  # heads included
        torch.testing.assert_close(shira.get_parameter(name), expected.get_parameter(name), rtol=1e-6, atol=1e-7)


def test_a_patch_too_dense_for_shira_is_refused(tmp_path: Path) -> None:
    linear_only(tmp_path, density=0.9)
    with pytest.raises(PatchError, match=r"must fit SHiRA's r\(m \+ n\) entries a layer"):
        export(tmp_path / "skill", "shira", tmp_path / "out")


@pytest.mark.parametrize("to", ["shira", "lora"])
def test_a_patch_without_weights_to_hold_is_refused(to: str, tmp_path: Path) -> None:
    make(tmp_path, "tiny_bert", target_modules=["LayerNorm"], density=0.5)
    with pytest.raises(PatchError, match=r"must have entries in Linear\.weight.*'LayerNorm\.(weight|bias)'"):
        export(tmp_path / "skill", to, tmp_path / "out")


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_lora_adapter_of_full_rank_is_the_graft(family: str, tmp_path: Path) -> None:
    """Conv1D (GPT-2) stores weights the other way round."""
    cls = make(tmp_path, family, target_modules=["q_proj", "down_proj"] if family == "tiny_llama" else ["c_fc"])
    done = export(tmp_path / "skill", "lora", tmp_path / "out", rank=32)
    assert max(done.errors.values()) < 1e-5
    lora = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "out").merge_and_unload()
    for (name, one), other in zip(merged(tmp_path, cls).named_parameters(), lora.parameters(), strict=True):
        if name.endswith(".weight"):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_lora_errors_are_those_of_the_best_approximation(tmp_path: Path) -> None:
    linear_only(tmp_path)
    done = export(tmp_path / "skill", "lora", tmp_path / "out", rank=2)
    base, skill = all_tensors(tmp_path / "base"), all_tensors(tmp_path / "out")
    export(tmp_path / "skill", "checkpoint", tmp_path / "merged")
    after = all_tensors(tmp_path / "merged")
    for module, error in done.errors.items():
        delta = after[f"{module}.weight"] - base[f"{module}.weight"]
        sizes = torch.linalg.svdvals(delta.double())
        best = (sizes[2:].square().sum() / sizes.square().sum()).sqrt()  # Eckart-Young
        assert error == pytest.approx(float(best), rel=1e-4, abs=1e-6)
        product = skill[f"base_model.model.{module}.lora_B.weight"] @ skill[f"base_model.model.{module}.lora_A.weight"]
        assert float((delta - product).norm() / delta.norm()) == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_large_layers_are_decomposed_by_iteration_nearly_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(60, 90, generator=generator) * (torch.rand(60, 90, generator=generator) < 0.3)
    down, up = low_rank(delta, 8)
    best = float((delta - up @ down).norm())
    monkeypatch.setattr(export_module, "FULL_SVD_UP_TO", 1)
    again = [low_rank(delta, 8) for _ in range(2)]
    assert torch.equal(again[0][0], again[1][0])  # of known random numbers
    assert best <= float((delta - again[0][1] @ again[0][0]).norm()) < 1.01 * best


def test_nothing_has_rank_zero() -> None:
    down, up = low_rank(torch.zeros(3, 4), 2)
    assert not down.any() and not up.any() and down.shape == (2, 4) and up.shape == (3, 2)


@pytest.mark.slow
def test_adapters_of_others_load_without_this_package(tmp_path: Path) -> None:
    linear_only(tmp_path)
    for to in ("shira", "lora"):
        export(tmp_path / "skill", to, tmp_path / to)
    code = """
import sys, torch
from peft import AutoPeftModelForCausalLM
for to in ("shira", "lora"):
    model = AutoPeftModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{to}")
    print(to, model(torch.arange(5)[None]).logits.abs().sum().item() > 0, "peft_graft" in sys.modules)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert ran.stdout.splitlines() == ["shira True False", "lora True False"], ran.stderr


# Whose base, and what is refused


def test_another_base_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    for to in EXPORTS:
        with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
            export(tmp_path / "skill", to, tmp_path / "out", base=tmp_path / "donor")
    models.tiny_gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(PatchError, match="must be parameters of the base, got 'model.layers"):
        export(tmp_path / "skill", "checkpoint", tmp_path / "out", base=tmp_path / "other")
    assert not (tmp_path / "out").exists()


def test_a_moved_base_is_given(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    (tmp_path / "base").rename(tmp_path / "moved")
    done = export(tmp_path / "skill", "vllm", tmp_path / "out", base=tmp_path / "moved")
    assert done.carried == done.entries


def test_an_adapter_that_names_no_base_needs_one(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    path = tmp_path / "skill" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(PatchError, match="base must be given"):
        export(tmp_path / "skill", "vllm", tmp_path / "out")


def test_what_is_there_stays_unless_told(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output_dir must be empty, got 'mine\.txt'"):
        export(tmp_path / "skill", "vllm", tmp_path / "out")
    export(tmp_path / "skill", "vllm", tmp_path / "out", overwrite=True)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"mine.txt", VLLM_FILE}


@pytest.mark.parametrize(
    ("to", "rank", "message"), [("gguf", 8, "to must be one of"), ("lora", 0, "rank must be an integer >= 1")]
)
def test_unknown_forms_and_ranks_are_refused(to: str, rank: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export(tmp_path, to, tmp_path / "out", rank=rank)


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    file = tmp_path / "skill" / "adapter_model.safetensors"
    tensors = load_apart(file)
    key = next(key for key in tensors if key.endswith("_values"))
    tensors[key][0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(PatchError, match="values must be finite"):
        export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    with pytest.raises(PatchError, match="adapter must be a finished graft, with .*, got none"):
        export(tmp_path / "base", "checkpoint", tmp_path / "out")
    (tmp_path / "skill" / "adapter_config.json").write_text("{")
    with pytest.raises(PatchError, match="adapter config must be JSON, got .*adapter_config.json"):
        export(tmp_path / "skill", "checkpoint", tmp_path / "out")


# Files of the user


@pytest.mark.parametrize("to", ["checkpoint", "vllm", "lora"])
def test_the_adapter_and_the_base_are_no_output(to: str, tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    before = {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()}
    with pytest.raises(FileExistsError, match="which holds the adapter"):
        export(tmp_path / "skill", to, tmp_path / "skill", overwrite=True)
    with pytest.raises(FileExistsError, match="which holds the base|must hold no model"):
        export(tmp_path / "skill", to, tmp_path / "base", overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "base").iterdir()} == before


def test_a_checkpoint_replaces_an_earlier_one(tmp_path: Path) -> None:
    make(tmp_path, "tiny_llama")
    export(tmp_path / "skill", "checkpoint", tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("mine")
    export(tmp_path / "skill", "checkpoint", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    with pytest.raises(FileExistsError, match="output_dir must hold no model"):
        export(tmp_path / "skill", "lora", tmp_path / "out", overwrite=True)
