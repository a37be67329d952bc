"""Tensors and models of odd kinds: the donor exactly, or told by name what is missing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations
from transformers import AlbertConfig, AlbertForSequenceClassification

from grafts import Single, graft, output
from models import inputs, perturbed, tiny_llama
from peft_graft import GraftConfig
from peft_graft.workflows.extract import extract


class Odd(nn.Module):
    """A 0-d parameter, one without entries, and a module without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.zeros(0, 4))
        self.linear = nn.Linear(4, 3)
        self.empty = nn.Linear(4, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.linear(x), self.empty(x), x[:, : self.nothing.shape[0]]], 1) * self.logit_scale


class Holder(nn.Module):
    """A module that runs what another one only holds."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.ParameterList([torch.randn(4)])
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x * self.held[0])


def test_parameters_of_a_container_that_never_runs_are_named() -> None:
    base = Holder()
    with pytest.warns(UserWarning, match=r"cannot carry a patch: \['held'\]"):
        graft(base, perturbed(base), density=1.0, target_modules="all")
    with pytest.raises(ValueError, match="got 'held'.*it has no forward of its own"):
        graft(base, perturbed(base), density=1.0, target_modules=["held"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
@pytest.mark.parametrize("in_file", [False, True])
def test_parameters_without_dimensions_and_without_entries(in_file: bool, tmp_path: Path) -> None:
    base, x = Single(Odd()), torch.randn(2, 4)
    donor = perturbed(base)
    save_file(donor.state_dict(), tmp_path / "donor.safetensors")
    given = str(tmp_path / "donor.safetensors") if in_file else donor
    grafted = graft(base, given, density=1.0, target_modules="all")
    assert "unit.logit_scale" in grafted.base_model.targets("default")
    assert torch.equal(output(grafted, x), output(donor, x))
    grafted.save_pretrained(tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(output(loaded, x), output(donor, x))
    assert torch.equal(output(loaded.merge_and_unload(), x), output(donor, x))


def test_shared_layers_of_albert(tmp_path: Path) -> None:
    config = AlbertConfig(
        vocab_size=64, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32, num_labels=2,
    )  # fmt: skip
    base = AlbertForSequenceClassification(config).eval()
    donor = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    batch = inputs(tiny_llama())
    batch["labels"] = torch.zeros(3, dtype=torch.long)
    assert torch.equal(output(graft(base, donor, density=1.0, target_modules="all"), batch), output(donor, batch))
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=1.0, target_modules="all")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(output(loaded, batch), output(donor, batch))


class TestWeightNorm:
    """The weights of these convolutions are computed from others, which a patch does not reach."""

    def test_a_parametrization_is_named_and_can_travel_whole(self) -> None:
        base = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), Single(nn.Conv1d(3, 2, 1)))
        donor, x = perturbed(base), torch.randn(1, 2, 5)
        with pytest.warns(UserWarning, match=r"cannot carry a patch: \['0'\].*modules_to_save=\['0'\]"):
            graft(base, donor, density=1.0, target_modules="all")
        whole = graft(base, donor, density=1.0, target_modules="all", modules_to_save=["0"])
        assert torch.equal(output(whole, x), output(donor, x))

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    def test_the_old_form_is_the_donor(self) -> None:
        base = Single(nn.utils.weight_norm(nn.Conv1d(2, 3, 2)))
        donor, x = Single(nn.utils.weight_norm(nn.Conv1d(2, 3, 2))), torch.randn(1, 2, 5)
        grafted = get_peft_model(base, GraftConfig(donor=donor, density=1.0, target_modules="all"))
        assert torch.equal(output(grafted, x), output(donor, x))


class Times(nn.Module):
    def __init__(self, factor: torch.Tensor) -> None:
        super().__init__()
        self.factor = nn.Parameter(factor, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.phase = Times(torch.randn(4, dtype=torch.complex64))
        self.steps = Times(torch.tensor([2, 3, 4, 5]))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.steps(self.phase(x).real))


def test_complex_and_integer_parameters_are_named() -> None:
    base = Complex()
    donor = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(1)
    with pytest.warns(UserWarning, match=r"cannot carry a patch: \['phase', 'steps'\].*modules_to_save=\['phase'\]"):
        graft(base, donor, density=1.0, target_modules="all")
    whole = graft(base, donor, density=1.0, target_modules="all", modules_to_save=["phase"], exclude_modules=["steps"])
    held = whole.base_model.model.phase.modules_to_save["default"].factor
    assert torch.equal(held, donor.phase.factor)
    with pytest.raises(ValueError, match=r"got 'steps'.*hold no floating-point values"):
        graft(base, donor, density=1.0, target_modules=["steps"])


class TestStrayFiles:
    """What lies beside the files of a sharded donor is not read."""

    @staticmethod
    def sharded(tmp_path: Path) -> tuple[nn.Module, nn.Module, Path]:
        base = tiny_llama()
        donor = perturbed(base)
        donor.save_pretrained(tmp_path / "donor", max_shard_size="8KB")
        return base, donor, tmp_path / "donor"

    def test_other_shards_and_optimizer_states(self, tmp_path: Path) -> None:
        base, donor, files = self.sharded(tmp_path)
        save_file({"model.norm.weight": torch.zeros(16)}, files / "model-00001-of-00009.safetensors")
        save_file({"exp_avg": torch.zeros(3)}, files / "optimizer.safetensors")
        grafted = graft(base, str(files), density=1.0, target_modules="all")
        assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))

    def test_tensors_of_a_shard_that_the_index_does_not_name(self, tmp_path: Path) -> None:
        base, donor, files = self.sharded(tmp_path)
        index = json.loads((files / "model.safetensors.index.json").read_text())["weight_map"]
        name, shard = "model.norm.weight", index["model.norm.weight"]
        other = next(file for file in sorted({*index.values()}) if file != shard)
        stale = {**load_file(files / other), name: torch.zeros(16)}  # a second copy of a tensor, from another save
        save_file(stale, files / other, {"format": "pt"})
        grafted = graft(base, str(files), density=1.0, target_modules="all")
        assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))

    def test_a_single_file_beside_the_index_is_told(self, tmp_path: Path) -> None:
        base, _, files = self.sharded(tmp_path)
        other = perturbed(base, seed=7)
        save_file(other.state_dict(), files / "model.safetensors", {"format": "pt"})
        with pytest.warns(UserWarning, match=r"donor directory should hold one checkpoint, got model\.safetensors and"):
            grafted = graft(base, str(files), density=1.0, target_modules="all")
        assert torch.equal(output(grafted, inputs(base)), output(other, inputs(base)))
