"""Distances between checkpoints agree with those of whole tensors, and tensors that cannot be compared are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM

from models import perturbed, tiny_bert, tiny_llama
from peft_graft import DonorError, diff
from peft_graft.checkpoints import block_reader
from peft_graft.workflows.diff import DiffResult, Distance


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_reader, "READ_ENTRIES", 500)
    monkeypatch.setattr(block_reader, "BLOCK_ENTRIES", 77)


def save_pair(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    base = tiny_llama(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    donor = perturbed(base)
    with torch.no_grad():
        donor.model.layers[1].mlp.down_proj.weight.copy_(base.model.layers[1].mlp.down_proj.weight)
        donor.model.norm.weight[:3] = base.model.norm.weight[:3]
    donor.save_pretrained(tmp_path / "donor")
    return tmp_path / "base", tmp_path / "donor"


def read(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t.double() for file in directory.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_those_of_whole_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    base, donor = save_pair(tmp_path, dtype)
    found, before, after = diff(base, donor), read(base), read(donor)
    assert {each.name for each in found.tensors} == before.keys()
    for each in found.tensors:
        b, d = before[each.name].flatten(), after[each.name].flatten()
        assert each.entries == b.numel() and each.differing == int((b != d).sum())
        assert each.l1_mean == pytest.approx(float((d - b).abs().mean()), rel=1e-12)
        assert each.l2 == pytest.approx(float((d - b).norm()), rel=1e-12)
        assert each.l2_relative == pytest.approx(float((d - b).norm() / b.norm()), rel=1e-12)
        cosine = float(torch.nn.functional.cosine_similarity(b, d, dim=0))
        assert each.cosine == pytest.approx(cosine, rel=1e-12)
        assert each.angle == pytest.approx(math.acos(min(1.0, cosine)) / math.pi, abs=1e-7)
        assert each.largest == float((d - b).abs().max())


def test_layers_sum_their_tensors_in_order(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path)
    found, before, after = diff(base, donor), read(base), read(donor)
    layers = {layer.name: layer for layer in found.by_layer()}
    assert list(layers) == ["lm_head", "model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"]
    names = sorted(name for name in before if name.startswith("model.layers.1."))
    b, d = (torch.cat([side[name].flatten() for name in names]) for side in (before, after))
    assert layers["model.layers.1"].l2 == pytest.approx(float((d - b).norm()), rel=1e-12)
    assert layers["model.layers.1"].differing == int((b != d).sum()) < layers["model.layers.1"].entries
    assert layers["model.norm"].differing == 13
    assert found.total.entries == sum(layer.entries for layer in layers.values())
    ten = DiffResult([Distance("h.10.w", 1), Distance("h.9.w", 1)])
    assert [layer.name for layer in ten.by_layer()] == ["h.9", "h.10"]


def test_everything_goes_into_json(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path)
    found = diff(base, donor)
    fields = json.loads(json.dumps(found.to_dict()))
    assert fields["total"]["entries"] == found.total.entries
    assert len(fields["tensors"]) == len(found.tensors) and len(fields["layers"]) == 5


def test_zeros_have_no_angle(tmp_path: Path) -> None:
    for side in ("base", "donor"):
        save_file({"x": torch.zeros(3)}, tmp_path / side)
    found = diff(tmp_path / "base", tmp_path / "donor")
    assert math.isnan(found.total.cosine) and found.to_dict()["total"]["cosine"] is None


def test_other_heads_shapes_and_prefixes(tmp_path: Path) -> None:
    base = BertForMaskedLM(tiny_bert().config)
    base.save_pretrained(tmp_path / "base")
    donor = tiny_bert()
    state = {name.removeprefix("bert."): tensor for name, tensor in donor.state_dict().items()}
    state["embeddings.word_embeddings.weight"] = torch.zeros(70, 16)
    state["encoder.steps"] = torch.zeros(2, dtype=torch.int64)
    (tmp_path / "donor").mkdir()
    save_file(state, tmp_path / "donor" / "model.safetensors")
    found = diff(tmp_path / "base", tmp_path / "donor")
    assert "bert.encoder.layer.0.output.dense.weight" in {each.name for each in found.tensors}
    assert found.not_compared == []
    assert "bert.embeddings.word_embeddings.weight" in found.only_in_base
    assert {"classifier.bias", "encoder.steps"} <= {*found.only_in_donor}


def test_nothing_in_common_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "base")
    save_file({"y": torch.zeros(3), "x": torch.zeros(2)}, tmp_path / "donor")
    with pytest.raises(DonorError, match="donor must have tensors in common with the base"):
        diff(tmp_path / "base", tmp_path / "donor")
    with pytest.raises(DonorError, match="base must be a directory, or a Hub id"):
        diff("nobody/nothing", tmp_path / "donor")
