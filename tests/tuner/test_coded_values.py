"""Grafts whose values are coded: what is saved is what runs, and the base's bits survive."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import models
from grafts import MLP, assert_same, graft, held, output, parameters, same_bits
from learning import BASE, DONOR, Rows, learner, trainer
from models import inputs, perturbed, tiny_bert, tiny_gpt2
from peft_graft import GraftConfig, PatchError, SelectionError, export, extract, inspect, stitch
from peft_graft.patch.packing import read_table
from peft_graft.patch.value_codes import VALUE_CODES

CODES = sorted(VALUE_CODES)
FILE = "adapter_model.safetensors"


def own_bits(model: PeftModel) -> dict[str, torch.Tensor]:
    """The base's parameters inside of a grafted model."""
    found = parameters(model.base_model.model)
    return {name.replace("base_layer.", ""): value for name, value in found.items() if "graft_" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alpha", [1.0, -2.5])
@pytest.mark.parametrize("code", CODES)
def test_what_is_saved_is_loaded_and_saved_again(code: str, alpha: float, dtype: torch.dtype, tmp_path: Path) -> None:
    base = tiny_gpt2(dtype)
    batch = inputs(base)
    model = graft(base, perturbed(base), density=0.05, values=code, alpha=alpha, target_modules="all")
    wanted = output(model, batch)
    model.save_pretrained(tmp_path / "one")
    loaded = PeftModel.from_pretrained(tiny_gpt2(dtype), tmp_path / "one")
    assert same_bits(output(loaded, batch), wanted) and not same_bits(output(tiny_gpt2(dtype), batch), wanted)
    loaded.save_pretrained(tmp_path / "two")
    assert (tmp_path / "one" / FILE).read_bytes() == (tmp_path / "two" / FILE).read_bytes()
    loaded.merge_adapter()
    assert same_bits(output(loaded, batch), wanted)
    loaded.unmerge_adapter()
    assert_same(own_bits(loaded), parameters(tiny_gpt2(dtype)))


@pytest.mark.parametrize("code", CODES)
def test_the_equation_holds_entry_by_entry(code: str) -> None:
    base = tiny_bert(torch.bfloat16)
    donor = perturbed(base)
    for alpha in (1.0, 3.0):
        model = graft(base, donor, density=0.1, values=code, alpha=alpha)
        patch = model.base_model.patch()
        model.merge_adapter()
        for name, part in patch.plain.items():
            layer, param = model.base_model.targets("default")[name]
            before = base.get_parameter(name).flatten()[part.indices].float()
            wanted = part.values if alpha == 1 else before + alpha * (part.values - before)
            assert same_bits(layer.base_parameter(param).detach().flatten()[part.indices], wanted.bfloat16())
        assert part.values.dtype == torch.float32


def test_only_the_signs_and_the_mean_of_the_donor_count() -> None:
    base = MLP()
    donor = perturbed(base)
    model = graft(base, donor, density=0.5, values="sign")
    for name, part in model.base_model.patch().plain.items():
        before, after = (side.get_parameter(name).detach().flatten()[part.indices] for side in (base, donor))
        size = (after.double() - before.double()).abs().mean().float()
        assert torch.equal(part.values, before + size * (after - before).sign())


def test_a_cast_moves_the_base_and_not_the_scales(tmp_path: Path) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, values="sign")
    model.save_pretrained(tmp_path / "one")
    model.to(torch.bfloat16).to(torch.float32)
    model.save_pretrained(tmp_path / "two")
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_base_in_another_dtype_gets_the_same_deltas(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05, values="sign").save_pretrained(tmp_path)
    wide, narrow = (PeftModel.from_pretrained(tiny_bert(dtype), tmp_path) for dtype in (torch.float32, torch.bfloat16))
    ours, theirs = (model.base_model.patch().plain for model in (wide, narrow))
    for name, part in ours.items():
        before = base.get_parameter(name).detach().flatten()[part.indices]
        deltas = part.values - before, theirs[name].values - before.bfloat16().float()
        assert torch.allclose(*deltas, atol=1e-7)


def test_several_adapters_together_and_a_copy(tmp_path: Path) -> None:
    base = tiny_bert()
    batch = inputs(base)
    graft(base, perturbed(base), density=0.05, values="sign").save_pretrained(tmp_path / "a")
    graft(base, perturbed(base, seed=5), density=0.05, values="donor").save_pretrained(tmp_path / "b")
    model = PeftModel.from_pretrained(tiny_bert(), tmp_path / "a", "a")
    model.load_adapter(tmp_path / "b", "b")
    model.base_model.set_adapter(["a", "b"])
    both = output(model, batch)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mean", combination_type="mean")
    model.set_adapter("mean")
    assert same_bits(output(model, batch), both)
    assert same_bits(output(copy.deepcopy(model), batch), both)
    rows = model.eval()(**batch, adapter_names=["a", "__base__", "b"]).logits
    for row, name in ((0, "a"), (2, "b")):
        model.set_adapter(name)
        assert torch.allclose(rows[row], output(model, batch)[row], atol=1e-6)


# Learned masks


@pytest.mark.parametrize("code", CODES)
def test_a_mask_is_trained_with_the_values_that_are_saved(code: str, tmp_path: Path) -> None:
    model = learner(values=code, alpha=4.0)
    run = trainer(model, tmp_path, steps=12)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    model.save_pretrained(tmp_path / "final")
    rows = read_table(load_file(tmp_path / "final" / FILE)["base_model.model.graft_patch.table"])
    assert {found for found, _ in rows.values()} == {code}
    loaded = PeftModel.from_pretrained(copy.deepcopy(BASE), tmp_path / "final")
    assert same_bits(output(loaded, Rows().batch), output(model, Rows().batch))
    live, stored = model.base_model.patch().plain, loaded.base_model.patch().plain
    assert_same({n: p.values for n, p in live.items()}, {n: p.values for n, p in stored.items()})


def test_training_goes_on_from_a_checkpoint_with_the_same_code(tmp_path: Path) -> None:
    whole, first, second = (learner(values="sign") for _ in range(3))
    trainer(whole, tmp_path / "whole", steps=4).train()
    trainer(first, tmp_path / "half", steps=2).train()
    trainer(second, tmp_path / "half", steps=4).train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert same_bits(output(second, Rows().batch), output(whole, Rows().batch))
    assert second.peft_config["default"].values == "sign"


def test_the_gradient_of_a_candidate_is_that_of_its_coded_delta() -> None:
    base, x = MLP(), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    donor = perturbed(base)
    model = graft(base, donor, num_params=6, candidate_ratio=3, selection="learned", values="sign", alpha=2.0)
    model.train()(x).square().sum().backward()
    state = model.base_model.states["default"]
    for name, logits in state.logits().items():
        layer, param = model.base_model.targets("default")[name]
        index, mask = layer.slot("default").indices(layer.keys[param]), state.mask(name)
        before, after = (side.get_parameter(name).detach().flatten()[index] for side in (base, donor))
        delta = after.double() - before.double()
        coded = ((delta[mask] if mask.any() else delta).abs().mean() * delta.sign()).float()
        # d loss / d logit = d loss / d entry * alpha * coded delta, with the gradient of a plain model
        plain, at_mask = copy.deepcopy(base), dict(model.base_model.patch(with_alpha=True).plain)
        for patched, part in at_mask.items():
            plain.get_parameter(patched).data.view(-1)[part.indices] = part.values
        plain(x).square().sum().backward()
        gradient = plain.get_parameter(name).grad
        assert logits.grad is not None and gradient is not None
        assert torch.allclose(logits.grad, gradient.flatten()[index] * 2.0 * coded, rtol=1e-3, atol=1e-6)


# Files


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_gpt2", "tiny_llama", "tiny_t5"])
@pytest.mark.parametrize("code", CODES)
def test_files_give_what_models_give(code: str, family: str, tmp_path: Path) -> None:
    base = getattr(models, family)(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    done = extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.05, values=code, alpha=2.0)
    live = type(base).from_pretrained(tmp_path / "base")
    options: dict[str, Any] = {"density": 0.05, "values": code, "alpha": 2.0}
    task = json.loads((tmp_path / "skill" / "adapter_config.json").read_text())["task_type"]
    model = graft(live, str(tmp_path / "donor"), task_type=task, **options)
    model.save_pretrained(tmp_path / "live")
    assert (tmp_path / "live" / FILE).read_bytes() == (tmp_path / "skill" / FILE).read_bytes()
    assert done.entries == model.peft_config["default"].record.entries
    export(tmp_path / "skill", "checkpoint", tmp_path / "merged")
    merged = model.merge_and_unload()
    again = type(base).from_pretrained(tmp_path / "merged")
    for (name, one), other in zip(merged.named_parameters(), again.parameters(), strict=True):
        assert same_bits(one.to(other.dtype), other), name


def test_the_estimated_scale_is_that_of_the_coded_deltas(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    perturbed(base).save_pretrained(tmp_path / "donor")
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.05, values="sign", alpha="norm")
    found = json.loads((tmp_path / "skill" / "adapter_config.json").read_text())["alpha"]
    model = graft(base, str(tmp_path / "donor"), density=0.05, values="sign", alpha="norm")
    plain = graft(base, str(tmp_path / "donor"), density=0.05, alpha="norm").peft_config["default"].alpha
    assert found == pytest.approx(model.peft_config["default"].alpha, rel=1e-9) and found > plain > 1


def test_stitching_decodes(tmp_path: Path) -> None:
    base = tiny_gpt2()
    base.save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        perturbed(base, seed=seed).save_pretrained(tmp_path / f"donor_{name}")
        extract(tmp_path / "base", tmp_path / f"donor_{name}", tmp_path / name, density=0.1, values="sign")
    stitch([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    model = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "one", "one")
    model.load_adapter(tmp_path / "two", "two")
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    model.set_adapter("both")
    loaded = PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "both")
    assert same_bits(output(loaded, inputs(base)), output(model, inputs(base)))
    assert inspect(tmp_path / "both").values.keys() == {"float32"}


def test_inspection_shows_the_code_and_every_byte(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05, values="int4").save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found.values == {"int4": found.tensors}
    assert 0 < found.origin["provenance"]["values_error"] < 0.2
    assert found.nbytes["scales"] == 4 * sum(-(-count // 128) for count in _counts(tmp_path))
    assert found.nbytes["values"] == sum(-(-count // 2) for count in _counts(tmp_path))
    assert sum(found.nbytes.values()) == (tmp_path / FILE).stat().st_size


def _counts(directory: Path) -> list[int]:
    rows = read_table(load_file(directory / FILE)["base_model.model.graft_patch.table"])
    return [row[0] for _, row in rows.values()]


# What is refused or said


def test_a_code_that_loses_much_is_named_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    base = MLP()
    donor = copy.deepcopy(base)
    with torch.no_grad():
        donor.second.weight.copy_(base.second.weight + torch.logspace(-4, 0, 18).view(3, 6))
    with caplog.at_level(logging.WARNING):
        graft(base, donor, density=0.5, values="sign")
    notes = [record.message for record in caplog.records if "should lose at most 25%" in record.message]
    assert len(notes) == 1 and "second.weight" in notes[0] and "first" not in notes[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": "bits"}, r"values must be one of \['donor', 'sign', 'int4', 'int8'\], got 'bits'"),
        ({"values": "sign", "donor": "zeros"}, "values must be 'donor' with donor='zeros', got 'sign'"),
    ],
)
def test_values_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraftConfig(density=0.1, **options)


def test_an_exact_patch_has_the_donors_values(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path / "base")
    with pytest.raises(SelectionError, match="exact must come .* with the donor's values, got .*values='sign'"):
        extract(tmp_path / "base", tmp_path / "base", tmp_path / "out", exact=True, values="sign")


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.05, values="sign").save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        PeftModel.from_pretrained(DONOR, tmp_path)
    assert sum(map(len, held(PeftModel.from_pretrained(tiny_bert(), tmp_path)).values())) > 0
