"""Other ways in than get_peft_model and Trainer: bare injection, state dicts, transformers' own methods, Accelerate."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch.nn.functional import mse_loss

from grafts import MLP, graft, held, output, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig, initialize_graft


@pytest.mark.feature("inject_adapter_in_model")
def test_an_adapter_can_be_injected_into_a_plain_model() -> None:
    base = tiny_bert()
    donor, batch = perturbed(base), inputs(base)
    wanted = output(graft(base, donor, density=0.05), batch)
    injected = inject_adapter_in_model(GraftConfig(donor=donor, density=0.05), copy.deepcopy(base))
    assert type(injected) is type(base)
    assert same_bits(output(injected, batch), wanted)


@pytest.mark.feature("get_peft_model_state_dict, set_peft_model_state_dict")
def test_a_state_dict_goes_from_one_model_to_another() -> None:
    base = tiny_bert()
    batch = inputs(base)
    one = graft(base, perturbed(base), density=0.05)
    two = graft(base, perturbed(base, seed=9), density=0.01)
    state = get_peft_model_state_dict(one)
    assert {value.dtype for key, value in state.items() if "graft_patch" in key} == {torch.uint8}
    set_peft_model_state_dict(two, state)
    assert held(two) == held(one)
    assert same_bits(output(two, batch), output(one, batch))
    plain = inject_adapter_in_model(GraftConfig(donor=perturbed(base, seed=9), density=0.01), copy.deepcopy(base))
    set_peft_model_state_dict(plain, state)
    assert same_bits(output(plain, batch), output(one, batch))


@pytest.mark.feature("torch.compile")
def test_a_compiled_base_has_the_names_of_the_plain_one(tmp_path: Path) -> None:
    base = tiny_bert()
    donor, batch = perturbed(base), inputs(base)
    plain, compiled = (graft(model, donor, density=0.05) for model in (base, torch.compile(base)))
    assert held(compiled) == held(plain)
    wanted = output(plain, batch)
    compiled.save_pretrained(tmp_path / "compiled")
    assert same_bits(output(PeftModel.from_pretrained(base, tmp_path / "compiled"), batch), wanted)
    plain.save_pretrained(tmp_path / "plain")
    loaded = PeftModel.from_pretrained(torch.compile(tiny_bert()), tmp_path / "plain")
    assert same_bits(output(loaded.merge_and_unload()._orig_mod, batch), wanted)


@pytest.mark.feature("add_adapter, enable_adapters, save_pretrained of transformers")
def test_transformers_adds_switches_and_saves_a_graft(tmp_path: Path) -> None:
    base = tiny_bert()
    donor, batch = perturbed(base), inputs(base)
    model = copy.deepcopy(base)
    model.add_adapter(GraftConfig(donor=donor, density=0.05))
    wanted = output(graft(base, donor, density=0.05), batch)
    assert same_bits(output(model, batch), wanted)
    model.disable_adapters()
    assert same_bits(output(model, batch), output(base, batch))
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    assert same_bits(output(PeftModel.from_pretrained(tiny_bert(), tmp_path), batch), wanted)


@pytest.mark.feature("load_adapter of transformers", "no: it cannot read a patch; use PeftModel.from_pretrained")
def test_transformers_own_loading_says_that_it_did_not_work(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05).save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    with pytest.raises(RuntimeError, match="adapter 'default' must be loaded from its file.*PeftModel.from_pretrained"):
        base(**inputs(base))


def test_a_saved_config_alone_makes_no_graft(tmp_path: Path) -> None:
    base = MLP()
    config = GraftConfig.from_pretrained(_saved(base, tmp_path))
    model = get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(RuntimeError, match="adapter 'default' must be loaded from its file"):
        model(torch.zeros(1, 4))
    with model.disable_adapter():
        assert same_bits(output(model, torch.ones(1, 4)), output(base, torch.ones(1, 4)))


def _saved(base: MLP, out: Path) -> Path:
    graft(base, perturbed(base), density=0.5).save_pretrained(out)
    return out


@pytest.mark.feature("a loop with Accelerate")
def test_an_accelerate_loop_learns_a_mask(tmp_path: Path) -> None:
    base = MLP()
    model = graft(base, perturbed(base, scale=0.5), density=0.2, selection="learned", alpha="auto")
    rows = [{"x": torch.randn(4), "y": torch.randn(3)} for _ in range(16)]
    loader = torch.utils.data.DataLoader(rows, batch_size=8)

    def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return mse_loss(model(batch["x"]), batch["y"])

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialize_graft(model, loader, loss_fn=loss_fn, show_progress_bar=False)
    before = sum(loss_fn(model.eval(), batch).item() for batch in loader)
    model.train()
    for _ in range(10):
        for batch in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
    assert sum(loss_fn(model.eval(), batch).item() for batch in loader) < before
    x = torch.stack([row["x"] for row in rows])
    wanted = output(model, x)
    accelerator.unwrap_model(model).save_pretrained(tmp_path)
    assert same_bits(output(PeftModel.from_pretrained(base, tmp_path), x), wanted)


@pytest.mark.feature("mixed precision")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_no_dtype_of_the_patch(dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_bert(dtype)
    model = graft(base, perturbed(base), density=0.05, selection="learned").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs(base)).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained if p.grad is not None)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    values = [value.dtype for name, value in model.state_dict().items() if name.endswith("_values")]
    assert set(values) == {dtype}
