"""Names under wrappers: the same checkpoint, whatever torch.compile, DDP, FSDP, PEFT or a pipeline put before it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from grafts import MLP, graft, output
from models import inputs, perturbed, tiny_bert, tiny_llama, tiny_mixtral
from peft_graft import DonorError, GraftConfig
from peft_graft.checkpoints.wrappers import look_through, plain_key, plain_names
from peft_graft.workflows.diff import diff
from peft_graft.workflows.extract import extract

PREFIXES = [
    "_orig_mod.",
    "module.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
    "submod_1.",
    "module._orig_mod.base_model.model.",
    "_fsdp_wrapped_module._orig_mod.module.",
]


def save_wrapped(model: nn.Module, directory: Path, prefix: str, role: str = "model") -> Path:
    """Save a checkpoint whose names all begin with a prefix."""
    model.save_pretrained(directory)
    file = directory / "model.safetensors"
    save_file({f"{prefix}{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    return directory


class TestNames:
    def test_wrappers_within_a_model(self) -> None:
        assert plain_key("_orig_mod.layers.0._fsdp_wrapped_module._orig_mod.weight") == "layers.0.weight"
        assert plain_key("my_orig_mod.weight") == "my_orig_mod.weight"

    @pytest.mark.parametrize("prefix", PREFIXES)
    def test_prefixes_of_all_names(self, prefix: str) -> None:
        assert plain_names([f"{prefix}a.b", f"{prefix}c"]) == {"a.b": f"{prefix}a.b", "c": f"{prefix}c"}

    def test_a_submodule_of_that_name_is_no_wrapper(self) -> None:
        for names in (["module.a", "head.b"], ["submod_0.a", "norm.b"]):
            assert plain_names(names) == {name: name for name in names}
        assert look_through(["module.a"], ["module.a", "module.b"]) == {"module.a": "module.a"}

    def test_names_that_would_fall_together_stay(self) -> None:
        names = ["_orig_mod.a", "a"]
        assert plain_names(names) == {name: name for name in names}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_a_wrapped_donor_in_files_is_the_donor(build, prefix: str, tmp_path: Path) -> None:
    base = build()
    donor = perturbed(base)
    save_wrapped(donor, tmp_path / "donor", prefix)
    grafted = graft(base, str(tmp_path / "donor"), density=1.0, target_modules="all")
    assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))


@pytest.mark.parametrize("prefix", PREFIXES[:4])
def test_extract_and_diff_look_through_wrappers_on_both_sides(prefix: str, tmp_path: Path) -> None:
    base = tiny_bert()
    donor = perturbed(base)
    save_wrapped(base, tmp_path / "base", prefix)
    save_wrapped(donor, tmp_path / "donor", f"module.{prefix}")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=1.0, target_modules="all")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")
    assert torch.equal(output(loaded, inputs(base)), output(donor, inputs(base)))
    found = diff(tmp_path / "base", tmp_path / "donor")
    assert len(found.tensors) == len(dict(base.named_parameters()))
    assert found.only_in_base == found.only_in_donor == found.not_compared == []


def test_a_model_with_a_module_of_that_name_keeps_it(tmp_path: Path) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = MLP()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.module(x)

    base = Holder()
    donor = perturbed(base)
    save_file(donor.state_dict(), tmp_path / "donor.safetensors")
    save_file(donor.module.state_dict(), tmp_path / "inner.safetensors")
    x = torch.randn(2, 4)
    for given in (donor, str(tmp_path / "donor.safetensors")):
        assert torch.equal(output(graft(base, given, density=1.0), x), output(donor, x))


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: nn.DataParallel(torch.compile(model))])
def test_a_wrapped_donor_in_memory_is_the_donor(wrap) -> None:
    base = tiny_llama()
    donor = perturbed(base)
    grafted = graft(base, wrap(copy.deepcopy(donor)), density=1.0, target_modules="all")
    assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))


def test_an_engine_that_is_no_module_of_torch_is_looked_through() -> None:
    """DeepSpeed's engine and many trainers keep the model in an attribute of this name."""
    base = tiny_llama()
    donor = perturbed(base)
    engine = nn.Module()
    engine.module = donor
    grafted = graft(base, engine, density=1.0, target_modules="all", modules_to_save=["lm_head"])
    assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))
    values = dict(donor.named_parameters())
    own = SimpleNamespace(
        name="own",
        names=lambda: [f"module.{name}" for name in values],
        shape=lambda name: tuple(values[name.removeprefix("module.")].shape),
        get=lambda name: values[name.removeprefix("module.")].detach(),
    )
    grafted = graft(base, own, density=1.0, target_modules="all")
    assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))


def test_a_compiled_base_has_plain_names_in_its_adapter(tmp_path: Path) -> None:
    base = tiny_llama()
    donor = perturbed(base)
    partly = copy.deepcopy(base)
    partly.model.layers[0] = torch.compile(partly.model.layers[0])
    config = GraftConfig(donor=donor, density=1.0, target_modules="all", modules_to_save=["lm_head"])
    get_peft_model(partly, config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(output(loaded, inputs(base)), output(donor, inputs(base)))


def test_a_base_in_a_wrapper_for_several_devices_is_refused() -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match=r"base must come without its wrapper, got DataParallel.*get_peft_model\(base"):
        graft(nn.DataParallel(base), perturbed(base), density=0.1)


class TestUnmergedAdapters:
    def test_in_memory(self) -> None:
        base = tiny_llama()
        donor = get_peft_model(perturbed(base), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        with pytest.raises(DonorError, match=r"donor must be a whole model.*with an adapter.*merge_and_unload"):
            graft(base, donor, density=0.1)
        merged = donor.merge_and_unload()
        grafted = graft(base, merged, density=1.0, target_modules="all")
        assert torch.equal(output(grafted, inputs(base)), output(merged, inputs(base)))

    @pytest.mark.parametrize("side", ["base", "donor"])
    def test_in_files(self, side: str, tmp_path: Path) -> None:
        base = tiny_llama()
        base.save_pretrained(tmp_path / "base")
        perturbed(base).save_pretrained(tmp_path / "donor")
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        file = tmp_path / side / "model.safetensors"
        save_file({key: value.contiguous() for key, value in adapted.state_dict().items()}, file, {"format": "pt"})
        with pytest.raises(DonorError, match=f"{side} must be a plain model.*of a PEFT adapter"):
            extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=0.1)
