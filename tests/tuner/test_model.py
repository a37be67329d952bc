"""What must hold for every graft: exact counts, the donor's bits, the base's bits, the same logits merged or not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn

from grafts import DTYPES, FAMILIES, MLP, TASKS, assert_same, graft, held, largest, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_roberta, tiny_t5
from peft_graft import DonorError, GraftConfig, SelectionError
from peft_graft.tuner import build_patch

EVERY = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
FAMILY = pytest.mark.parametrize("family", sorted(FAMILIES))


@pytest.mark.feature("get_peft_model, forward")
@EVERY
@FAMILY
def test_everything_grafted_is_the_donor(family: str, dtype: torch.dtype) -> None:
    base, batch = FAMILIES[family](dtype), inputs(FAMILIES[family]())
    donor = perturbed(
        FAMILIES[family](dtype, seed=1)
    )  # far from the base, so that base + (donor - base) is not the donor
    model = graft(base, donor, density=1.0, target_modules="all", task_type=TASKS[family])
    assert same_bits(output(model, batch), output(donor, batch))
    merged = model.merge_and_unload()
    assert type(merged) is type(base)
    assert_same(parameters(merged), parameters(donor))
    assert same_bits(output(merged, batch), output(donor, batch))


@pytest.mark.feature("get_peft_model, forward")
@pytest.mark.parametrize("targets", [None, "all"])
@EVERY
@FAMILY
def test_a_patch_holds_the_largest_deltas_and_the_donors_bits(
    family: str, dtype: torch.dtype, targets: str | None
) -> None:
    base = FAMILIES[family](dtype)
    donor, batch = perturbed(base), inputs(base)
    before, after = parameters(base), parameters(donor)
    model = graft(base, donor, density=0.03, target_modules=targets)
    names = list(model.base_model.targets("default"))
    eligible = sum(before[name].numel() for name in names)
    config = model.peft_config["default"]
    assert (config.record.eligible, config.record.entries) == (eligible, round(0.03 * eligible))
    chosen = held(model)
    assert chosen == largest(base, donor, names, config.record.entries)

    patched = output(model, batch)
    assert not same_bits(patched, output(base, batch))
    merged = copy.deepcopy(model).merge_and_unload()
    assert same_bits(output(merged, batch), patched)
    wanted = {name: value.clone() for name, value in before.items()}
    for name, index in chosen.items():
        wanted[name].view(-1)[index] = after[name].view(-1)[index]
    assert_same(parameters(merged), wanted)


@pytest.mark.feature("merge_adapter, unmerge_adapter, safe_merge")
@pytest.mark.feature("merge_and_unload, unload")
@pytest.mark.feature("disable_adapter, disable_adapter_layers")
@EVERY
@FAMILY
def test_merging_switching_off_and_unloading_give_the_base_back(family: str, dtype: torch.dtype) -> None:
    base = FAMILIES[family](dtype)
    donor, batch = perturbed(base), inputs(base)
    alone, before = output(base, batch), parameters(base)
    model = graft(base, donor, density=0.05, target_modules="all", alpha=1.7)
    patched = output(model, batch)
    with model.disable_adapter():
        assert same_bits(output(model, batch), alone)
    assert same_bits(output(model, batch), patched)
    model.merge_adapter()
    assert same_bits(output(model, batch), patched)
    with model.disable_adapter():
        assert same_bits(output(model, batch), alone)
    assert same_bits(output(model, batch), patched)
    model.merge_adapter()
    model.unmerge_adapter()
    assert same_bits(output(model, batch), patched)
    assert_same(parameters(model.unload()), before)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), density=st.floats(0.001, 1), scope=st.sampled_from(["global", "tensor"]))
def test_the_count_is_exact(data: st.DataObject, density: float, scope: str) -> None:
    base = MLP()
    # Deltas of few distinct sizes: ties decide.
    donor = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in donor.parameters():
            steps = data.draw(st.lists(st.integers(-1, 1), min_size=parameter.numel(), max_size=parameter.numel()))
            parameter.add_(torch.tensor(steps, dtype=torch.float32).view(parameter.shape) / 4)
        donor.second.weight[0, 0] = base.second.weight[0, 0] + 1
    sizes = {name: value.numel() for name, value in base.named_parameters()}
    wanted = {name: round(density * size) for name, size in sizes.items()}
    count = round(density * sum(sizes.values())) if scope == "global" else sum(wanted.values())
    after = dict(donor.named_parameters())
    differing = {name: int((value != after[name]).sum()) for name, value in base.named_parameters()}
    if count == 0 or round(density * sum(sizes.values())) == 0:
        with pytest.raises(SelectionError, match="density must give at least one entry"):
            graft(base, donor, density=density, budget_scope=scope)
        return
    model = graft(base, donor, density=density, budget_scope=scope)
    chosen = held(model)
    wanted = {name: min(number, differing[name]) for name, number in wanted.items()}
    count = min(count, sum(differing.values())) if scope == "global" else sum(wanted.values())
    assert model.peft_config["default"].record.entries == count == sum(map(len, chosen.values()))
    if scope == "tensor":
        assert {name: len(index) for name, index in chosen.items()} == {n: k for n, k in wanted.items() if k}
        one = [largest(base, donor, [name], k) for name, k in wanted.items() if k]
        assert chosen == dict(sorted((name, index) for found in one for name, index in found.items()))
    else:
        assert chosen == largest(base, donor, list(sizes), count)


def test_num_params_is_taken_as_it_is() -> None:
    base = tiny_bert()
    assert sum(map(len, held(graft(base, perturbed(base), num_params=37)).values())) == 37


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
def test_coarse_grafts_take_whole_tensors_or_layers(granularity: str) -> None:
    base = tiny_bert()
    donor = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            parameter.add_(0.1 if ".layer.1." in name else 0.01)
    sizes = {name: value.numel() for name, value in base.named_parameters()}
    layer = {name for name in sizes if ".layer.1." in name}
    budget = sum(sizes[name] for name in layer)
    model = graft(base, donor, num_params=budget, granularity=granularity)
    assert {name: len(index) for name, index in held(model).items()} == {name: sizes[name] for name in layer}
    assert model.peft_config["default"].record.entries == budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.5, -2.0, 40.0, 0.0])
def test_alpha_scales_the_delta_in_float32_and_rounds_once(alpha: float, dtype: torch.dtype) -> None:
    base = tiny_bert(dtype)
    donor = perturbed(base)
    before, after = parameters(base), parameters(donor)
    model = graft(base, donor, density=0.1, alpha=alpha)
    chosen = held(model)
    merged = parameters(model.merge_and_unload())
    for name, index in chosen.items():
        start, end = before[name].view(-1)[index].float(), after[name].view(-1)[index].float()
        assert same_bits(merged[name].view(-1)[index], (start + alpha * (end - start)).to(dtype))


def test_alpha_can_be_changed_in_the_config() -> None:
    base = tiny_bert()
    donor, batch = perturbed(base), inputs(base)
    model = graft(base, donor, density=0.1)
    model.peft_config["default"].alpha = 3.0
    assert same_bits(output(model, batch), output(graft(base, donor, density=0.1, alpha=3.0), batch))
    name = next(iter(held(model)))
    model.peft_config["default"].alpha = {name: 1.0}
    assert same_bits(output(model, batch), output(graft(base, donor, density=0.1), batch))
    model.peft_config["default"].alpha = {name: 0.0}
    assert not same_bits(output(model, batch), output(graft(base, donor, density=0.1), batch))


# Donors


def test_a_zeros_donor_prunes_the_base() -> None:
    base = tiny_bert()
    model = graft(base, "zeros", density=0.5, selection="magnitude")
    names = list(model.base_model.targets("default"))
    zeros = copy.deepcopy(base)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    chosen = held(model)
    assert chosen == largest(base, zeros, names, round(0.5 * model.peft_config["default"].record.eligible))
    merged = parameters(model.merge_and_unload())
    for name, index in chosen.items():
        assert same_bits(merged[name].view(-1)[index], torch.zeros(len(index)))


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
def test_a_donor_on_disk_is_that_in_memory(tmp_path: Path, shards: str) -> None:
    base = tiny_gpt2()
    donor = perturbed(base)
    donor.save_pretrained(tmp_path, max_shard_size=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) > (1 if shards == "20KB" else 0)
    batch = inputs(base)
    options = {"density": 0.05, "target_modules": "all"}
    wanted = output(graft(base, donor, **options), batch)
    assert same_bits(output(graft(base, str(tmp_path), **options), batch), wanted)
    assert same_bits(output(graft(base, tmp_path, **options), batch), wanted)


def test_a_donor_on_disk_may_know_a_tied_tensor_by_another_name(tmp_path: Path) -> None:
    base = tiny_gpt2()
    donor = perturbed(base)
    donor.save_pretrained(tmp_path)  # holds transformer.wte.weight, and no lm_head.weight
    options = {"density": 0.05, "target_modules": ["lm_head"]}
    assert held(graft(base, tmp_path, **options)) == held(graft(base, donor, **options))


def test_a_bare_encoder_may_donate_to_a_model_with_a_head() -> None:
    base = tiny_bert()
    donor = perturbed(base)
    batch = inputs(base)
    assert same_bits(
        output(graft(base, donor.bert, density=0.05), batch), output(graft(base, donor, density=0.05), batch)
    )


def test_a_donor_in_another_dtype_keeps_its_own_values() -> None:
    base = tiny_bert(torch.bfloat16)
    donor = perturbed(tiny_bert())
    model = graft(base, donor, density=0.1)
    for name, (layer, param) in model.base_model.targets("default").items():
        slot = layer.graft_patch["default"]
        if layer.keys[param] in slot.params:
            index = slot.indices(layer.keys[param])
            assert same_bits(slot.values(layer.keys[param]), donor.get_parameter(name).detach().view(-1)[index])
    merged = model.merge_and_unload()
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}


def test_one_config_serves_two_models(tmp_path: Path) -> None:
    config = GraftConfig(donor=perturbed(tiny_bert()), density=0.05)
    first = get_peft_model(tiny_bert(), config)
    first.save_pretrained(tmp_path)
    second = get_peft_model(tiny_bert(seed=5), config)
    assert (config.record, config.target_modules) == (None, None)
    entries = [model.peft_config["default"].record.entries for model in (first, second)]
    assert entries == [sum(map(len, held(model).values())) for model in (first, second)] and all(entries)
    assert held(first) != held(second)


# Errors


def test_another_architecture_is_refused_with_names_and_shapes() -> None:
    donor = tiny_bert()
    donor.bert.encoder.layer[1].output.dense = nn.Linear(24, 16)
    with pytest.raises(DonorError, match=r"bert.encoder.layer.1.output.dense.weight.*\(16, 32\).*\(16, 24\)"):
        graft(tiny_bert(), donor, density=0.1)


def test_missing_tensors_are_named() -> None:
    donor = tiny_bert()
    del donor.bert.encoder.layer[1].output.dense
    with pytest.raises(DonorError, match="bert.encoder.layer.1.output.dense"):
        graft(tiny_bert(), donor, density=0.1)


def test_a_resized_vocabulary_is_recognised_where_it_matters() -> None:
    base = tiny_gpt2()
    donor = perturbed(tiny_gpt2())
    donor.resize_token_embeddings(70)
    with pytest.raises(DonorError, match=r"vocabulary.*transformer.wte.weight"):
        graft(base, donor, density=0.1, target_modules="all")
    with pytest.warns(UserWarning, match=r"got 70 for 64 .*resize_token_embeddings\(70\)"):
        model = graft(base, donor, density=0.1)  # the default leaves embeddings and head alone
    assert held(model)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    torch.save(tiny_bert().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DonorError, match="safetensors checkpoint, got 'pytorch_model.bin'"):
        graft(tiny_bert(), str(tmp_path), density=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_donor_is_refused_by_tensor(tmp_path: Path, value: float) -> None:
    donor = perturbed(tiny_bert())
    with torch.no_grad():
        donor.bert.encoder.layer[0].output.dense.weight[3, 2] = value
    donor.save_pretrained(tmp_path)
    for source in (donor, tmp_path):
        with pytest.raises(DonorError, match="finite, got 1 NaN or Inf.*bert.encoder.layer.0.output.dense.weight"):
            graft(tiny_bert(), source, density=0.1)


@pytest.mark.parametrize("selection", ["magnitude", "learned", "sigmoid", "random"])
def test_a_donor_that_equals_the_base_has_nothing_to_give(selection: str) -> None:
    with pytest.raises(DonorError, match="donor must differ from the base in the targeted modules"):
        graft(tiny_bert(), tiny_bert(seed=0), density=0.1, selection=selection)


def test_a_donor_that_differs_elsewhere_only_has_nothing_to_give() -> None:
    donor = tiny_bert()
    nn.init.zeros_(donor.bert.embeddings.word_embeddings.weight)
    with pytest.raises(DonorError, match="equals it in all"):
        graft(tiny_bert(), donor, density=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1e-9}, r"density must give at least one entry, got 1e-09 of \d+ eligible entries"),
        (
            {"num_params": 10**9},
            r"num_params must be an integer in \[1, \d+\] \(the eligible entries\), got 1000000000",
        ),
        ({}, "exactly one of density and num_params must be given, got density=None and num_params=None"),
    ],
)
@pytest.mark.parametrize("selection", ["magnitude", "learned"])
def test_an_impossible_budget_is_refused(options: dict[str, object], message: str, selection: str) -> None:
    with pytest.raises(SelectionError, match=message):
        graft(tiny_bert(), perturbed(tiny_bert()), selection=selection, **options)


def test_a_learned_budget_per_tensor_below_one_everywhere_is_refused() -> None:
    base = MLP()
    with pytest.raises(SelectionError, match="density must give at least one entry in some tensor, got 0.016"):
        graft(base, perturbed(base), density=0.016, selection="learned", budget_scope="tensor")


def test_a_donor_is_needed() -> None:
    with pytest.raises(DonorError, match="donor must be a checkpoint, a module or 'zeros', got None"):
        graft(tiny_bert(), None, density=0.1)


def test_a_state_dict_is_no_donor_but_its_file_is(tmp_path: Path) -> None:
    base = tiny_bert()
    state = perturbed(base).state_dict()
    with pytest.raises(DonorError, match="can be saved with safetensors.torch.save_file"):
        graft(base, state, density=0.1)
    save_file(state, tmp_path / "state.safetensors")
    assert held(graft(base, tmp_path / "state.safetensors", density=0.1))


@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_t5], ids=["bert", "gpt2", "t5"])
def test_after_an_error_the_base_is_what_it_was(make: Callable[[], nn.Module]) -> None:
    base, batch = make(), inputs(make())
    alone, names, gradients = output(base, batch), list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    with torch.no_grad():
        donor = perturbed(base)
        next(p for name, p in donor.named_parameters() if p.ndim == 2 and "0" in name)[0, 0] = torch.nan
    with pytest.raises(DonorError, match="NaN"):
        get_peft_model(
            base,
            GraftConfig(donor=donor, density=0.1, target_modules="all", modules_to_save=["classifier"]),
        )
    assert list(base.state_dict()) == names
    assert [p.requires_grad for p in base.parameters()] == gradients
    assert same_bits(output(base, batch), alone)
    good = perturbed(base)
    fresh = output(graft(base, good, density=0.1), batch)
    assert same_bits(output(get_peft_model(base, GraftConfig(donor=good, density=0.1)), batch), fresh)


def test_another_architecture_is_told_by_its_body_not_by_its_head() -> None:
    other = tiny_roberta()  # its head has other shapes than the base's, too
    with pytest.raises(DonorError, match=r"of \d+ tensors missing .* This is not the same architecture"):
        graft(tiny_bert(num_labels=3), other, density=0.1, task_type="SEQ_CLS")


def test_a_large_donor_shows_a_progress_bar(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    base = MLP()
    graft(base, perturbed(base), density=0.1)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(build_patch, "MANY_ENTRIES", 1)
    graft(base, perturbed(base), density=0.1)
    assert "reading MLP" in capfd.readouterr().err
