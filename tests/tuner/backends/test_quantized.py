"""A base that is quantized: a patch from its float twin applies to what the weights read as; it is not merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_model_status, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from grafts import graft, held, output, same_bits
from models import inputs, perturbed
from peft_graft import GraftConfig, Patch, PatchError
from peft_graft.tuner.quantized_layer import GraftQuantizedLinear


def wide_llama(seed: int = 0) -> LlamaForCausalLM:
    """Wide enough for 4 bits, whose kernels take blocks of 64."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(**options)


QUANTIZED = {
    "torchao int8": _torchao,
    "bitsandbytes 8 bits": lambda: _bitsandbytes(load_in_8bit=True),
    "bitsandbytes 4 bits": lambda: _bitsandbytes(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16),
}
EVERY = pytest.mark.parametrize("how", sorted(QUANTIZED))
pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt:UserWarning", "ignore:.*(torch.jit|deprecated):DeprecationWarning"
)


@pytest.fixture(scope="module")
def skill(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PeftModel]:
    """A base on disk beside a graft of it, and that graft live."""
    base = wide_llama()
    folder = tmp_path_factory.mktemp("quantized")
    base.save_pretrained(folder / "base")
    wide_llama(seed=7).save_pretrained(folder / "other")
    donor = perturbed(base, scale=0.3)
    donor.save_pretrained(folder / "donor")
    model = graft(base, str(folder / "donor"), density=0.05)
    model.save_pretrained(folder / "skill")
    return folder, model


def quantized(folder: Path, how: str, name: str = "base") -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / name, quantization_config=QUANTIZED[how](), dtype=torch.bfloat16)


def patched(folder: Path, model: PeftModel) -> LlamaForCausalLM:
    """A float model that holds what the quantized one reads as, with the donor's values of its patch."""
    plain = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    donor = LlamaForCausalLM.from_pretrained(folder / "donor", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, (layer, param) in model.base_model.targets("default").items():
            plain.get_parameter(name).copy_(layer.base_parameter(param))
        for name, index in held(model).items():
            plain.get_parameter(name).view(-1)[index] = donor.get_parameter(name).view(-1)[index]
    return plain


@pytest.mark.feature(
    "a graft of the float base on a quantized one", "works with bitsandbytes (8 and 4 bits) and torchao"
)
@EVERY
def test_a_patch_lies_on_what_the_weights_read_as(how: str, skill: tuple[Path, PeftModel]) -> None:
    folder, live = skill
    base, batch = quantized(folder, how), inputs(live.get_base_model())
    for module in base.modules():  # of two kernels for 4 bits, that which leaves the weights readable
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    alone = output(base, batch)
    model = PeftModel.from_pretrained(quantized(folder, how), folder / "skill")
    layers = [layer for layer in model.modules() if isinstance(layer, GraftQuantizedLinear)]
    assert len(layers) == 7 and held(model) == held(live)
    wanted = output(patched(folder, model), batch)
    for _ in range(2):
        assert same_bits(output(model, batch), wanted)
        with model.disable_adapter():
            assert same_bits(output(model, batch), alone)
    assert not torch.allclose(wanted.float(), alone.float(), atol=0.1)
    clone = copy.deepcopy(model)
    assert same_bits(output(clone, batch), wanted)
    assert get_model_status(model).quantization_backend is not None
    assert same_bits(output(model.unload(), batch), alone)


@pytest.mark.feature("a graft of the float base on a quantized one")
@EVERY
def test_what_is_saved_there_still_fits_the_float_base(how: str, skill: tuple[Path, PeftModel], tmp_path: Path) -> None:
    folder, live = skill
    model = PeftModel.from_pretrained(quantized(folder, how), folder / "skill")
    model.save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert (tmp_path / name).read_bytes() == (folder / "skill" / name).read_bytes()
    plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), tmp_path)
    batch = inputs(live.get_base_model())
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "skill")
    assert same_bits(output(plain, batch), output(again, batch))


@pytest.mark.feature("a graft of the float base on a quantized one")
@EVERY
def test_another_model_is_told_in_spite_of_the_rounding(how: str, skill: tuple[Path, PeftModel]) -> None:
    folder, _ = skill
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        PeftModel.from_pretrained(quantized(folder, how, "other"), folder / "skill")


@pytest.mark.feature("merging into a quantized base", "no: to quantize the patched weight anew would round all of it")
@EVERY
def test_nothing_is_merged_into_a_quantized_base(how: str, skill: tuple[Path, PeftModel]) -> None:
    folder, live = skill
    model = PeftModel.from_pretrained(quantized(folder, how), folder / "skill")
    batch = inputs(live.get_base_model())
    before = output(model, batch)
    message = "base must be in a float dtype for grafts to be {}, got quantized model.layers.0.self_attn.q_proj"
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=message.format("merged")):
            call()
    with pytest.raises(ValueError, match=message.format("combined")):
        model.base_model.add_weighted_adapter(["default"], [1.0], "half")
    assert same_bits(output(model, batch), before)


@pytest.mark.feature("making a graft on a quantized base", "of its float parts; else no: make it on the float base")
@EVERY
def test_a_graft_is_made_of_the_float_parts(how: str, skill: tuple[Path, PeftModel]) -> None:
    folder, _ = skill
    config = {"donor": str(folder / "donor"), "density": 0.5}
    with pytest.warns(UserWarning, match="cannot carry a patch.*q_proj"):
        model = get_peft_model(quantized(folder, how), GraftConfig(**config))
    assert held(model) and all("norm" in name for name in held(model))
    model = PeftModel.from_pretrained(quantized(folder, how), folder / "skill")
    message = "'model.layers.0.self_attn.q_proj'.*its weight is quantized.*load it onto the quantized one"
    for make in (
        lambda: model.add_adapter("second", GraftConfig(target_modules=["q_proj"], **config)),
        lambda: get_peft_model(quantized(folder, how), GraftConfig(target_modules=["q_proj"], **config)),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_four_bits_that_a_forward_has_packed_are_refused(skill: tuple[Path, PeftModel]) -> None:
    folder, live = skill
    base = quantized(folder, "bitsandbytes 4 bits")
    if not base.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("bitsandbytes packs 4 bits on a CPU with AVX-512 only")
    output(base, inputs(live.get_base_model()))
    with pytest.raises(ValueError, match="base in 4 bits must be grafted before it runs on a CPU.*'model.layers.0"):
        PeftModel.from_pretrained(base, folder / "skill")


@EVERY
def test_coded_values_follow_what_the_weights_read_as(how: str, skill: tuple[Path, PeftModel], tmp_path: Path) -> None:
    folder, _ = skill
    base = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    graft(base, str(folder / "donor"), density=0.05, values="sign").save_pretrained(tmp_path / "one")
    model = PeftModel.from_pretrained(quantized(folder, how), tmp_path / "one")
    plain = LlamaForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    with torch.no_grad():
        for name, (layer, param) in model.base_model.targets("default").items():
            plain.get_parameter(name).copy_(layer.base_parameter(param))
        for name, part in Patch.load(tmp_path / "one" / "adapter_model.safetensors").tensors.items():
            flat = plain.get_parameter(name).view(-1)
            flat[part.indices] = part.decode(flat).values.bfloat16()
    assert same_bits(output(model, inputs(plain)), output(plain, inputs(plain)))
    model.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
