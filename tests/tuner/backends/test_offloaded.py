"""A base placed by accelerate: on one device, offloaded to memory, or on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from grafts import MLP, graft, held, output, same_bits
from models import inputs, perturbed, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_t5, tiny_vit
from peft_graft import GraftConfig, initialize_graft


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.feature("device_map")
def test_a_device_map_of_one_device_changes_nothing(base_folder: Path, tmp_path: Path) -> None:
    base = tiny_llama()
    donor, batch = perturbed(base, scale=0.1), inputs(base)
    wanted = graft(base, donor, density=0.1)
    wanted.save_pretrained(tmp_path / "skill")
    for load in (False, True):
        placed = LlamaForCausalLM.from_pretrained(base_folder, device_map={"": "cpu"})
        if load:
            model = PeftModel.from_pretrained(placed, tmp_path / "skill", device_map={"": "cpu"})
        else:
            model = get_peft_model(placed, GraftConfig(donor=donor, density=0.1))
        assert same_bits(output(model, batch), output(wanted, batch))
        model.merge_adapter()
        assert same_bits(output(model, batch), output(wanted, batch))


@pytest.mark.feature("a base offloaded to memory")
@pytest.mark.parametrize("load", [False, True], ids=["made", "loaded"])
@pytest.mark.parametrize(
    ("make", "values"),
    [*((make, "donor") for make in (tiny_llama, tiny_gpt2, tiny_t5, tiny_vit, tiny_mixtral)), (tiny_gpt2, "sign")],
)
def test_an_offloaded_base_is_grafted_bit_for_bit(
    make: Callable[..., nn.Module], values: str, load: bool, tmp_path: Path
) -> None:
    base = make()
    config = {"donor": perturbed(base, scale=0.1), "density": 0.1, "target_modules": "all", "values": values}
    batch, alone = inputs(base), output(base, inputs(base))
    wanted = graft(base, **config)
    patched = output(wanted, batch)
    wanted.save_pretrained(tmp_path / "skill")
    cpu_offload(base, execution_device="cpu")
    assert all(parameter.is_meta for parameter in base.parameters())
    model = PeftModel.from_pretrained(base, tmp_path / "skill") if load else get_peft_model(base, GraftConfig(**config))
    assert held(model) == held(wanted)
    assert same_bits(output(model, batch), patched)
    with model.disable_adapter():
        assert same_bits(output(model, batch), alone)
    model.save_pretrained(tmp_path / "again")
    names = ("adapter_model.safetensors", "adapter_config.json") if not load else ("adapter_model.safetensors",)
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "skill" / name).read_bytes()
    model.merge_adapter()
    assert same_bits(output(model, batch), patched)
    with model.disable_adapter():
        assert same_bits(output(model, batch), alone)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_bits(output(model, batch), patched)
    assert same_bits(output(model.merge_and_unload(), batch), patched)


@pytest.mark.feature("a base offloaded to memory")
def test_another_offloaded_base_is_refused(tmp_path: Path) -> None:
    base, other = tiny_llama(), tiny_llama(seed=3)
    graft(base, perturbed(base), density=0.1).save_pretrained(tmp_path)
    cpu_offload(other, execution_device="cpu")
    with pytest.raises(ValueError, match="base must be the model that this patch was made for"):
        PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.feature("a base offloaded to memory")
@pytest.mark.parametrize("grad", [False, True])
def test_a_patch_goes_where_the_module_runs(grad: bool) -> None:
    """The meta device stands for an accelerator: torch refuses to mix it with the CPU, and tells shapes only."""
    base = MLP()
    donor = perturbed(base)
    cpu_offload(base, execution_device="meta")
    model = get_peft_model(base, GraftConfig(donor=donor, density=0.5, selection="learned")).train(grad)
    with torch.set_grad_enabled(grad):
        result = model(torch.randn(5, 4, device="meta"))
    assert result.device.type == "meta" and result.shape == (5, 3)
    assert not [name for name, tensor in model.named_buffers() if tensor.is_meta]


@pytest.mark.feature("data-driven rules on an offloaded base", "no: gradients do not reach offloaded parameters")
@pytest.mark.parametrize("selection", ["taylor", "path_taylor", "fisher", "sigmoid"])
def test_gradients_of_offloaded_parameters_are_not_to_be_had(selection: str) -> None:
    base = tiny_llama()
    donor = perturbed(base)
    cpu_offload(base, execution_device="cpu")
    model = get_peft_model(base, GraftConfig(donor=donor, density=0.1, selection=selection))
    with pytest.raises(
        ValueError, match="base must not be offloaded to be scored, got 'model.layers.0.input_layernorm"
    ):
        initialize_graft(model, [inputs(tiny_llama(), seed=seed) for seed in range(2)], show_progress_bar=False)


@pytest.mark.feature("a base offloaded to disk", "no: reading it for every forward, and no merge would last")
@pytest.mark.parametrize("placed_by", ["accelerate", "transformers"])
@pytest.mark.parametrize("load", [False, True], ids=["made", "loaded"])
def test_a_base_on_disk_is_refused(placed_by: str, load: bool, base_folder: Path, tmp_path: Path) -> None:
    base = tiny_llama()
    donor = perturbed(base)
    graft(base, donor, density=0.1).save_pretrained(tmp_path / "skill")
    if placed_by == "accelerate":
        disk_offload(base, str(tmp_path / "offload"), execution_device="cpu")
        first = "model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight"
    else:
        names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
        places = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
        base = LlamaForCausalLM.from_pretrained(base_folder, device_map=places, offload_folder=tmp_path / "offload")
        first = "model.layers.1"
    with pytest.raises(ValueError, match=f"base must be in memory to be grafted, got parameters on disk: {first}"):
        if load:
            PeftModel.from_pretrained(base, tmp_path / "skill")
        else:
            get_peft_model(base, GraftConfig(donor=donor, density=0.1))


@pytest.mark.feature("low_cpu_mem_usage")
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_a_graft_with_a_donor_is_made_whatever_the_memory(way: str) -> None:
    base = tiny_llama()
    donor, batch = perturbed(base), inputs(base)
    config = GraftConfig(donor=donor, density=0.1)
    wanted = output(graft(base, donor, density=0.1), batch)
    if way == "get_peft_model":
        model = get_peft_model(base, config, low_cpu_mem_usage=True)
    else:
        model = graft(base, perturbed(base, seed=5), density=0.1)
        model.add_adapter("second", config, low_cpu_mem_usage=True)
        model.set_adapter("second")
    assert same_bits(output(model, batch), wanted)


@pytest.mark.feature("torch_device")
def test_a_file_is_loaded_to_a_device_by_name(tmp_path: Path) -> None:
    base = tiny_llama()
    model = graft(base, perturbed(base), density=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, torch_device="cpu")
    loaded.load_adapter(tmp_path, "second", torch_device="cpu")
    loaded.set_adapter("second")
    assert {tensor.device for tensor in loaded.state_dict().values()} == {torch.device("cpu")}
    assert same_bits(output(loaded, inputs(tiny_llama())), output(model, inputs(tiny_llama())))
