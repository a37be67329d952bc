"""What users of PEFT do with any adapter, done with a graft: switches, states, gradients, dtypes, state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, cast_mixed_precision_params, get_model_status, get_peft_model
from peft.helpers import check_if_peft_model, disable_input_dtype_casting
from torch import nn
from transformers import AutoModelForCausalLM, pipeline

from grafts import MLP, assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit, word_tokenizer
from peft_graft import GraftConfig

FIRST = "base_model.model.first.base_layer.weight"
X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def two(**second: object) -> PeftModel:
    """A learned graft "x", active, and a graft "y" of another donor."""
    base = MLP()
    model = graft(base, perturbed(base, scale=0.3), adapter_name="x", density=0.4, selection="learned")
    model.add_adapter("y", GraftConfig(donor=perturbed(base, scale=0.3, seed=5), density=0.4, **second))
    return model


def trained(model: nn.Module) -> set[str]:
    """Which adapters have parameters that require a gradient; "base" for anything else that does."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.split(".graft_patch.")[1].split(".")[0] if ".graft_patch." in name else "base" for name in names}


# What trains


@pytest.mark.feature("gradients for the mask only")
def test_a_step_of_training_moves_the_logits_and_nothing_else() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base, scale=0.3), density=0.1, selection="learned", target_modules="all").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(**inputs(base)).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not same_bits(tensor, before[name])}
    assert moved and all(name.endswith("_logits") for name in moved)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == moved


@pytest.mark.feature("gradients for the mask only")
def test_a_graft_that_learns_nothing_has_nothing_to_train() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.1)
    trainable, everything = model.get_nb_trainable_parameters()
    assert (trainable, everything) == (0, sum(parameter.numel() for parameter in base.parameters()))


@pytest.mark.feature("print_trainable_parameters")
def test_the_number_of_trainable_parameters_is_that_of_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), num_params=10, candidate_ratio=3, selection="learned")
    plain = sum(parameter.numel() for parameter in base.parameters())
    assert model.get_nb_trainable_parameters() == (30, plain + 30)
    model.print_trainable_parameters()
    assert "trainable params: 30 " in capsys.readouterr().out


@pytest.mark.feature("requires_grad of several adapters")
def test_what_trains_follows_what_is_active() -> None:
    model = two(selection="learned")
    assert trained(model) == {"x"}
    model.set_adapter("y")
    assert trained(model) == {"y"}
    model.base_model.set_adapter(["x", "y"])
    assert trained(model) == {"x", "y"}
    model.set_requires_grad("x", False)
    assert trained(model) == {"y"}
    model.set_requires_grad(["x", "y"], True)
    assert trained(model) == {"x", "y"}
    with model.disable_adapter():
        assert trained(model) == set()
    assert trained(model) == {"x", "y"}


@pytest.mark.feature("requires_grad of several adapters")
def test_deleting_the_active_adapter_hands_over_to_the_other() -> None:
    model = two(selection="learned")
    with pytest.warns(UserWarning, match="Setting active adapter to y"):
        model.delete_adapter("x")
    assert model.active_adapters == ["y"] and trained(model) == {"y"}


@pytest.mark.feature("inference_mode")
def test_inference_mode_trains_nothing() -> None:
    base = MLP()
    donor = perturbed(base)
    model = graft(base, donor, adapter_name="x", density=0.4, selection="learned", inference_mode=True)
    assert trained(model) == set()
    model = two(selection="learned")
    model.set_adapter("y", inference_mode=True)
    assert trained(model) == set()
    model.set_adapter("y")
    assert trained(model) == {"y"}


@pytest.mark.feature("is_trainable")
def test_a_saved_patch_has_nothing_to_train(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.1).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    assert trained(model) == set() and model.peft_config["default"].inference_mode is False
    model.load_adapter(tmp_path, "second", is_trainable=True)
    model.set_adapter("second")
    assert trained(model) == set()


# Switches and states


@pytest.mark.feature("active adapters and their order")
def test_the_active_adapters_are_those_that_were_set_in_that_order() -> None:
    model = two()
    for names in (["x"], ["y"], ["x", "y"], ["y", "x"]):
        model.base_model.set_adapter(names)
        assert model.active_adapters == names
        status = get_model_status(model)
        assert (status.active_adapters, status.available_adapters) == (names, ["x", "y"])
    model.set_adapter("y")
    assert model.active_adapter == "y" and model.active_peft_config is model.peft_config["y"]


@pytest.mark.feature("disable_adapter, disable_adapter_layers")
def test_layers_are_switched_off_and_on() -> None:
    model = two()
    before, alone = output(model, X), output(copy.deepcopy(model).unload(), X)
    model.base_model.disable_adapter_layers()
    assert get_model_status(model).enabled is False
    assert same_bits(output(model, X), alone) and not same_bits(alone, before)
    model.base_model.enable_adapter_layers()
    assert get_model_status(model).enabled is True
    assert same_bits(output(model, X), before)


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
def test_names_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = two()
    before = output(model, X)
    with pytest.raises(ValueError, match="Adapter z not found"):
        model.set_adapter("z")
    with pytest.raises(ValueError, match="Adapter z does not exist"):
        model.delete_adapter("z")
    for name, message in (("y", "already exists"), ("a.b", "contain")):
        with pytest.raises((ValueError, KeyError), match=message):
            model.add_adapter(name, GraftConfig(donor="zeros", density=0.1))
    assert list(model.peft_config) == ["x", "y"]
    assert same_bits(output(model, X), before)


@pytest.mark.feature("loading under another name")
def test_an_adapter_is_renamed_by_loading_it_under_another_name(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), adapter_name="old", density=0.1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path / "old", adapter_name="new")
    assert list(loaded.peft_config) == ["new"] and held(loaded, "new") == held(model, "old")
    assert same_bits(output(loaded, inputs(tiny_bert())), output(model, inputs(tiny_bert())))


@pytest.mark.feature("get_layer_status, get_model_status")
def test_the_status_says_what_is_so() -> None:
    model = two()
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert set(layers) == {"model.first", "model.norm", "model.second"}
    assert [layers[name].module_type for name in layers] == [
        "graft.GraftLinear",
        "graft.GraftLayer",
        "graft.GraftLinear",
    ]
    assert all(layer.available_adapters == ["x", "y"] for layer in layers.values())
    status = model.get_model_status()
    assert (status.adapter_model_type, status.peft_types) == ("GraftModel", {"x": "GRAFT", "y": "GRAFT"})
    assert status.num_adapter_layers == 3 and status.enabled is True and status.merged_adapters == []
    # A mask that trains has parameters, a patch that is made has none.
    assert status.requires_grad == {"x": True} and status.devices == {"x": ["cpu"], "y": []}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.merge_adapter(["y"])
    assert model.get_model_status().merged_adapters == ["y"]
    model.unmerge_adapter()
    assert model.get_model_status().merged_adapters == []


# Around the model


@pytest.mark.feature("forward hooks on base and wrapped modules")
@pytest.mark.parametrize("selection", ["magnitude", "learned"])
@pytest.mark.parametrize("make", [tiny_bert, tiny_vit], ids=["bert", "vit"])
def test_hooks_see_every_call(make: Callable[[], nn.Module], selection: str) -> None:
    base, batch = make(), inputs(make())
    model = graft(base, perturbed(base, scale=0.3), density=0.2, target_modules="all", selection=selection).eval()
    wanted = output(model, batch)
    seen: list[tuple[str, torch.Tensor]] = []

    def watch(name: str) -> object:
        return lambda module, args, out: seen.append((name, out.detach().clone()))

    layers = [m for m in model.modules() if hasattr(m, "base_layer") and isinstance(m.base_layer, nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(watch("outer"))
        layer.base_layer.register_forward_hook(watch("inner"))
    assert same_bits(output(model, batch), wanted)
    outer, inner = ([out for name, out in seen if name == which] for which in ("outer", "inner"))
    assert len(outer) == len(inner) >= len(layers) - 1  # BERT's pooler is not called without a head
    assert all(torch.equal(one, other) for one, other in zip(inner, outer, strict=True))
    with torch.enable_grad():
        assert torch.allclose(model.eval()(**batch).logits, wanted, atol=1e-6)
    doubled = layers[0].base_layer.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(output(model, batch), wanted)
    doubled.remove()
    assert same_bits(output(model, batch), wanted)


@pytest.mark.feature("state_dict and load_state_dict of the whole model")
def test_a_state_dict_of_the_whole_model_goes_in_again(tmp_path: Path) -> None:
    base, batch = tiny_llama(), inputs(tiny_llama())
    model = graft(base, perturbed(base), density=0.1)
    wanted = output(model, batch)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for layer in model.base_model._layers():
        for name, tensor in layer.graft_patch.named_buffers():
            if name.endswith("_values"):
                tensor.zero_()
    assert not same_bits(output(model, batch), wanted)
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert same_bits(output(model, batch), wanted)
    other = graft(base, perturbed(base), density=0.05)
    with pytest.raises(RuntimeError, match="size mismatch for base_model.model.model.layers.0.*graft_patch"):
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.feature("merge_and_unload, unload")
def test_the_merged_model_is_saved_like_any(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, batch = tiny_gpt2(), inputs(tiny_gpt2())
    model = graft(base, perturbed(base), density=0.1, target_modules="all")
    wanted = output(model, batch)
    merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert "Unloading and merging model" in capfd.readouterr().err
    assert type(merged) is type(base) and not hasattr(merged, "peft_config")
    assert list(merged.state_dict()) == list(base.state_dict())
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(output(again, batch), wanted)
    assert again.lm_head.weight is again.transformer.wte.weight


@pytest.mark.feature("merge_adapter, unmerge_adapter, safe_merge")
def test_a_safe_merge_is_a_merge() -> None:
    model = two()
    before = parameters(model)
    wanted = output(model, X)
    model.merge_adapter(["x"], safe_merge=True)
    assert same_bits(output(model, X), wanted) and not same_bits(parameters(model)[FIRST], before[FIRST])
    model.unmerge_adapter()
    assert_same(parameters(model), before)


@pytest.mark.feature("resize_token_embeddings", "works where the embeddings are not grafted; else TypeError")
def test_the_vocabulary_of_a_grafted_model_may_grow() -> None:
    base = tiny_gpt2()
    model = graft(base, perturbed(base, scale=0.3), density=0.1)
    before = output(model, inputs(base))
    model.get_base_model().resize_token_embeddings(70)
    assert same_bits(output(model, inputs(base))[..., :64], before)
    everywhere = graft(base, perturbed(base), density=0.1, target_modules="all")
    with pytest.raises(TypeError, match="Old embeddings are of type.*GraftLayer"):
        everywhere.get_base_model().resize_token_embeddings(70)


@pytest.mark.feature("torch.export")
def test_an_exported_graft_gives_the_same() -> None:
    base = MLP()
    model = graft(base, perturbed(base, scale=0.3), density=0.5).eval()
    exported = torch.export.export(model, (X,)).module()
    assert torch.equal(exported(X), model(X)) and not torch.equal(exported(X), base(X))


@pytest.mark.feature("check_if_peft_model")
def test_a_saved_graft_is_known_as_an_adapter(tmp_path: Path) -> None:
    graft(MLP(), "zeros", density=0.1).save_pretrained(tmp_path)
    assert check_if_peft_model(str(tmp_path))


@pytest.mark.feature("pipeline of transformers")
def test_a_pipeline_runs_a_graft() -> None:
    base = tiny_llama()
    model = graft(base, perturbed(base, scale=0.5), density=0.2, task_type="CAUSAL_LM")

    def told(model: nn.Module) -> str:
        run = pipeline("text-generation", model=model, tokenizer=word_tokenizer(), device="cpu")
        return run("t1 t2 t3", max_new_tokens=8, do_sample=False)[0]["generated_text"]

    wanted = told(copy.deepcopy(model).merge_and_unload())
    assert told(model) == wanted != told(base)


# Dtypes


@pytest.mark.feature("the base in another float dtype")
@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("made", [torch.bfloat16, torch.float16], ids=str)
def test_a_graft_of_a_rounded_base_fits_the_exact_one(made: torch.dtype, alpha: float, tmp_path: Path) -> None:
    donor = perturbed(tiny_bert(made), scale=0.3)
    graft(tiny_bert(made), donor, density=0.1, alpha=alpha).save_pretrained(tmp_path)
    base = tiny_bert()
    before = parameters(base)
    model = PeftModel.from_pretrained(base, tmp_path)
    chosen, merged = held(model), parameters(model.merge_and_unload())
    for name, wanted in before.items():
        index = chosen.get(name, [])
        start, end = wanted.view(-1)[index], donor.get_parameter(name).detach().view(-1)[index].float()
        wanted.view(-1)[index] = end if alpha == 1 else start + alpha * (end - start)
        assert same_bits(merged[name], wanted)


@pytest.mark.feature("autocast_adapter_dtype")
@pytest.mark.parametrize("autocast", [True, False])
def test_logits_are_float32_and_values_the_donors_whatever_is_asked(autocast: bool, tmp_path: Path) -> None:
    base = tiny_llama(torch.bfloat16)
    donor, batch = perturbed(base), inputs(base)
    config = GraftConfig(donor=donor, density=0.1, selection="learned")
    model = get_peft_model(tiny_llama(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    wanted = output(model, batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast)
    for one in (model, loaded):
        assert {t.dtype for name, t in one.named_buffers() if name.endswith("_values")} == {torch.bfloat16}
        assert same_bits(output(one, batch), wanted)


@pytest.mark.feature("cast_mixed_precision_params")
def test_a_model_cast_for_mixed_precision_keeps_the_donors_values() -> None:
    base = tiny_llama()
    donor = perturbed(base)
    model = graft(base, donor, density=0.1, selection="learned")
    cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    merged = parameters(model.merge_and_unload())
    for name, index in held(graft(base, donor, density=0.1)).items():
        assert same_bits(merged[name].view(-1)[index], donor.get_parameter(name).detach().view(-1)[index].bfloat16())


@pytest.mark.feature("mixed precision")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_mask_is_learned_on_half_precision_weights(dtype: torch.dtype) -> None:
    base = tiny_llama(dtype)
    model = graft(base, perturbed(base, scale=0.3), density=0.1, selection="learned").train()
    loss = model(**inputs(base)).loss
    loss.backward()
    logits = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in logits)
    assert all(p.grad.isfinite().all() for p in logits) and any(p.grad.abs().sum() > 0 for p in logits)
    reference = tiny_llama()
    exact = graft(reference, perturbed(reference, scale=0.3), density=0.1, selection="learned").train()
    assert loss.item() == pytest.approx(exact(**inputs(reference)).loss.item(), rel=0.02)


@pytest.mark.feature("disable_input_dtype_casting")
def test_inputs_are_the_wrapped_modules_own_business() -> None:
    model = two()
    wanted = output(model, X)
    with disable_input_dtype_casting(model):
        assert same_bits(output(model, X), wanted)
    assert same_bits(output(model, X), wanted)
