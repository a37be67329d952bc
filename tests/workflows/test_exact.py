"""Lossless patches of whole donors: coded as steps, decoded in a model and on files, and refused on another base."""

from __future__ import annotations

import filecmp
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

import models
from grafts import same_bits
from peft_graft import GraftConfig, Patch, PatchError, export, extract, inspect
from peft_graft.patch import step_tensor
from peft_graft.patch.fingerprint import Fingerprint
from peft_graft.patch.step_tensor import StepTensor
from peft_graft.workflows import exact

FILE = "adapter_model.safetensors"


def moved(model: nn.Module) -> nn.Module:
    """A donor of which every entry was moved by about as much as one step of bfloat16, and one tensor not at all."""
    donor = type(model)(model.config).to(model.dtype)
    donor.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            if name != "model.layers.0.mlp.up_proj.weight":
                parameter += (torch.randn(parameter.shape) * 2e-5).to(parameter.dtype)
        donor.model.norm.weight.view(-1)[3] = -donor.model.norm.weight.view(-1)[3]
    return donor


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def pair(tmp_path: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    base = models.tiny_llama(dtype)
    donor = moved(base)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    return base, donor


def load(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    return type(models.tiny_llama()).from_pretrained(directory, **({"dtype": dtype} if dtype else {}))


def assert_same(one: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert same_bits(parameter, theirs[name]), name


def test_a_loaded_patch_is_the_donor_and_can_be_taken_out(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (step_tensor, exact):  # several blocks a tensor
        monkeypatch.setattr(module, "MAX_ENTRIES", 500)
    base, donor = pair
    done = extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    parts = Patch.load(tmp_path / "out" / FILE).tensors
    assert any(isinstance(part, StepTensor) for part in parts.values())
    assert "model.layers.0.mlp.up_proj.weight" not in parts
    assert done.entries == sum(part.count for part in parts.values())
    model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    assert filecmp.cmp(tmp_path / "out" / FILE, tmp_path / "again" / FILE, shallow=False)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "again")]
    assert configs[0]["record"]["fingerprint"] == configs[1]["record"]["fingerprint"]
    model.merge_adapter()
    model.unmerge_adapter()
    assert_same(model.unload(), base)
    model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    assert_same(model.merge_and_unload(), donor)


def test_the_fingerprint_covers_every_bit_that_is_needed(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, _ = pair
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    parts, ours = Patch.load(tmp_path / "out" / FILE).tensors, dict(base.named_parameters())
    covered = {
        name: ours[name].flatten() if part.indices is None else ours[name].flatten()[part.indices]
        for name, part in parts.items()
    }
    recorded = GraftConfig.from_pretrained(tmp_path / "out").record.fingerprint
    assert Fingerprint.compute(covered).to_dict() == recorded
    assert recorded["count"] == sum(values.numel() for values in covered.values())


def test_an_exported_checkpoint_is_the_donor(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    done = export(tmp_path / "out", "checkpoint", tmp_path / "merged")
    assert done.carried == done.entries
    merged, donor = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "donor"))
    assert merged.keys() == donor.keys() and all(same_bits(merged[name], donor[name]) for name in donor)


def test_another_alpha_acts_on_the_decoded_values(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    base, donor = pair
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    model = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    model.peft_config["default"].alpha = 0.5
    merged, theirs = model.merge_and_unload(), dict(donor.named_parameters())
    for (name, parameter), before in zip(merged.named_parameters(), base.parameters(), strict=True):
        expected = before.float() + 0.5 * (theirs[name].float() - before.float())
        assert torch.equal(parameter, expected.to(before.dtype)), name


def test_inspect_tells_steps_and_their_bytes(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    done = extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    found = inspect(tmp_path / "out")
    assert found.entries == done.entries
    name = f"steps of {str(pair[0].dtype).removeprefix('torch.')}"
    assert found.values[name] > 0 and found.nbytes["steps"] > found.nbytes["table"] > 0
    assert sum(found.nbytes.values()) == done.nbytes


def test_a_base_in_another_dtype_or_with_other_bits_is_refused(
    tmp_path: Path, pair: tuple[nn.Module, nn.Module], dtype: torch.dtype
) -> None:
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    wrong = torch.bfloat16 if dtype == torch.float32 else torch.float32
    with pytest.raises(PatchError, match="base must be loaded in the dtype that a lossless patch was made for"):
        PeftModel.from_pretrained(load(tmp_path / "base", wrong), tmp_path / "out")
    other = load(tmp_path / "base")
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        PeftModel.from_pretrained(other, tmp_path / "out")
    state = load_file(tmp_path / "base" / "model.safetensors")
    state["model.embed_tokens.weight"][0, 0] += 1
    save_file(state, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        export(tmp_path / "out", "checkpoint", tmp_path / "merged")


def test_a_damaged_file_is_refused_by_name(tmp_path: Path, pair: tuple[nn.Module, nn.Module]) -> None:
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    state = load_file(tmp_path / "out" / FILE)
    key = next(name for name in state if name.endswith("packed"))
    state[key][-1] ^= 1
    save_file(state, tmp_path / "out" / FILE, {"format": "pt"})
    with pytest.raises(PatchError, match=r"in 'model\.norm\.weight'"):
        PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")


def test_few_changes_are_indices_and_values_and_need_only_their_entries(tmp_path: Path) -> None:
    base = models.tiny_llama(torch.bfloat16)
    donor = models.tiny_llama(torch.bfloat16)
    donor.load_state_dict(base.state_dict())
    with torch.no_grad():
        donor.model.embed_tokens.weight[1, 2] += 1
        base.model.embed_tokens.weight[1, 3] = donor.model.embed_tokens.weight[1, 3] = float("inf")
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    (part,) = Patch.load(tmp_path / "out" / FILE).plain.values()
    assert part.count == 1 == GraftConfig.from_pretrained(tmp_path / "out").record.fingerprint["count"]
    export(tmp_path / "out", "checkpoint", tmp_path / "merged")
    merged, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "donor"))
    assert all(same_bits(merged[name], wanted[name]) for name in wanted)
