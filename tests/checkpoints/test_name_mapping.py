"""A model without values, and checkpoints in its names: exactly what transformers would have loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

import models
from grafts import MLP, graft, same_bits
from models import perturbed
from peft_graft import DonorError
from peft_graft.checkpoints.donor import CheckpointDonor
from peft_graft.checkpoints.name_mapping import RenamedCheckpoint, build_skeleton, model_class, read_config

FAMILIES = sorted(name for name in vars(models) if name.startswith("tiny_"))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_is_the_model_without_its_values(family: str, tmp_path: Path) -> None:
    getattr(models, family)(torch.float16).save_pretrained(tmp_path)
    skeleton = build_skeleton(tmp_path)
    loaded = type(skeleton).from_pretrained(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for one, other in ((skeleton, loaded), (loaded, skeleton)):  # the same names once, so the same ties
        assert {n: (p.shape, p.dtype) for n, p in one.named_parameters()} == {
            n: (p.shape, p.dtype) for n, p in other.named_parameters()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_view_holds_what_the_model_holds(family: str, tmp_path: Path) -> None:
    model: PreTrainedModel = getattr(models, family)()
    model.save_pretrained(tmp_path)
    view = RenamedCheckpoint(CheckpointDonor(tmp_path), build_skeleton(tmp_path))
    for name, parameter in model.named_parameters():
        assert view.shape(name) == tuple(parameter.shape)
        assert same_bits(view.get(name), parameter.detach())
        assert sum(torch.Size(extent.shape).numel() for extent in view.extents(name)) == parameter.numel()


def test_experts_stored_one_by_one_are_one_tensor(tmp_path: Path) -> None:
    models.tiny_mixtral().save_pretrained(tmp_path)
    view = RenamedCheckpoint(CheckpointDonor(tmp_path), build_skeleton(tmp_path))
    root = "model.layers.1.block_sparse_moe.experts"
    assert view.stored_names("model.layers.1.mlp.experts.gate_up_proj") == [
        f"{root}.{expert}.{part}.weight" for expert in range(4) for part in ("w1", "w3")
    ]
    assert view.stored_names("model.layers.1.mlp.experts.down_proj") == [f"{root}.{e}.w2.weight" for e in range(4)]


@pytest.mark.parametrize(
    "rename",
    [lambda key: key.removeprefix("bert."), lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma")],
    ids=["no prefix", "gamma"],
)
def test_names_of_other_saves_are_found(rename: Callable[[str], str], tmp_path: Path) -> None:
    model = models.tiny_bert()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({rename(key): tensor for key, tensor in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    view = RenamedCheckpoint(CheckpointDonor(tmp_path), build_skeleton(tmp_path))
    assert all(same_bits(view.get(name), parameter.detach()) for name, parameter in model.named_parameters())


def test_a_view_through_a_graft_is_the_same(tmp_path: Path) -> None:
    model = models.tiny_mixtral()
    model.save_pretrained(tmp_path)
    grafted = graft(model, perturbed(model), density=0.1, modules_to_save=["lm_head"])
    plain, through = (RenamedCheckpoint(CheckpointDonor(tmp_path), m) for m in (model, grafted.base_model.model))
    assert plain.names() == through.names()
    assert all(same_bits(plain.get(name), through.get(name)) for name in plain.names())


def test_a_model_of_no_library_keeps_its_names(tmp_path: Path) -> None:
    model = MLP()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert RenamedCheckpoint(CheckpointDonor(tmp_path), model).names() == sorted(model.state_dict())


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="no model of transformers 5.0 is split while loading"
)
def test_forms_that_are_split_while_loading_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True))
    model.save_pretrained(tmp_path)  # gate_proj and up_proj in one tensor
    view = RenamedCheckpoint(CheckpointDonor(tmp_path), model)
    with pytest.raises(DonorError, match=r"got 'encoder\.layer\.0\.mlp\.gate_proj\.bias'.*\(Chunk; 2 such tensors"):
        view.require_plain(sorted(model.state_dict()))
    view.require_plain(["layernorm.weight"])
    with pytest.raises(DonorError, match="as they do in the model"):
        graft(model, str(tmp_path), density=0.1)


def test_the_class_is_the_fine_tuned_one_with_its_labels(tmp_path: Path) -> None:
    config = models.tiny_bert().config
    BertForMaskedLM(config).save_pretrained(tmp_path / "base")
    models.tiny_bert(num_labels=5).save_pretrained(tmp_path / "donor")
    skeleton = build_skeleton(tmp_path / "base", like=read_config(tmp_path / "donor"))
    assert type(skeleton) is BertForSequenceClassification
    assert skeleton.classifier.weight.shape == (5, 16)
    assert skeleton.config.name_or_path == str(tmp_path / "base")


def test_a_file_has_no_configuration(tmp_path: Path) -> None:
    models.tiny_bert().save_pretrained(tmp_path)
    assert read_config(tmp_path / "model.safetensors") is None
    with pytest.raises(DonorError, match=r"base must be a directory with config\.json or a Hub id"):
        build_skeleton(tmp_path / "model.safetensors")


def test_bases_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    config = BertConfig(architectures=["SomebodysModel"])
    with pytest.raises(DonorError, match=r"got \['SomebodysModel'\] in config.json of 'x'"):
        model_class(config, "x")
    config.quantization_config = {"quant_method": "fp8"}
    config.save_pretrained(tmp_path)
    with pytest.raises(DonorError, match="base must be in a float dtype, got the quantized"):
        build_skeleton(tmp_path)
