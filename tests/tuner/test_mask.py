"""Learned masks: straight-through in training, exact in evaluation, and ordinary trainable parameters throughout."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from torch.nn.functional import mse_loss

from grafts import DTYPES, FAMILIES, MLP, TASKS, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import SelectionError
from peft_graft.patch.value_codes import VALUE_CODES, TensorPatch, encode_values
from peft_graft.selection.topk import top_k_mask
from peft_graft.tuner.mask import Slot

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))


def learned(base: nn.Module, donor: nn.Module | None = None, **options: object) -> PeftModel:
    options = {"selection": "learned", "density": 0.1} | options
    return graft(base, perturbed(base, scale=0.3) if donor is None else donor, **options)


def logits_of(model: PeftModel) -> dict[str, nn.Parameter]:
    return model.base_model.states["default"].logits()


def scatter(model: PeftModel, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Values of the candidates as dense tensors, 0 elsewhere."""
    dense = {}
    for name, (layer, param) in model.base_model.targets("default").items():
        tensor = torch.zeros(layer.base_parameter(param).numel(), dtype=torch.float32)
        if name in values:
            tensor[layer.graft_patch["default"].indices(layer.keys[param])] = values[name].float()
        dense[name] = tensor.view(layer.base_parameter(param).shape)
    return dense


def hard(model: PeftModel, base: nn.Module, donor: nn.Module, alpha: float = 1.0) -> nn.Module:
    """The base with the entries written that the mask takes."""
    state = model.base_model.states["default"]
    masks = scatter(model, {name: state.mask(name) for name in state.logits()})
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter, new = wanted.get_parameter(name), donor.get_parameter(name)
            scaled = new if alpha == 1 else parameter + alpha * (new - parameter)
            parameter.copy_(torch.where(mask.bool(), scaled, parameter))
    return wanted


def test_candidates_are_the_largest_deltas_and_the_first_mask_is_magnitude() -> None:
    base, batch = tiny_bert(), inputs(tiny_bert())
    donor = perturbed(base)
    model = learned(base, donor, density=0.01, candidate_ratio=7)
    wide = graft(base, donor, num_params=7 * model.peft_config["default"].record.entries)
    assert held(model) == held(wide)
    assert same_bits(output(model, batch), output(graft(base, donor, density=0.01), batch))


@pytest.mark.parametrize("candidates", [1, 1e9])
def test_candidates_are_between_the_budget_and_everything(candidates: float) -> None:
    model = learned(MLP(), num_params=8, density=None, candidate_ratio=candidates)
    count = sum(map(len, held(model).values()))
    assert count == (8 if candidates == 1 else model.peft_config["default"].record.eligible)
    assert model.peft_config["default"].record.entries == 8


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_the_logits_are_all_that_trains(family: str) -> None:
    base = FAMILIES[family](torch.bfloat16)
    model = learned(base, task_type=TASKS[family], density=0.01)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {id(p) for p in trained.values()} == {id(p) for p in logits_of(model).values()}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert sum(p.numel() for p in trained.values()) == 10 * model.peft_config["default"].record.entries


@settings(max_examples=40, deadline=None)
@given(data=st.data(), budget=st.integers(2, 20), scope=st.sampled_from(["global", "tensor"]))
def test_evaluation_takes_exactly_the_budget_by_logit_times_delta(data: st.DataObject, budget: int, scope: str) -> None:
    base = MLP()
    donor = perturbed(base, scale=0.3)
    budget_of = {"num_params": budget, "density": None} if scope == "global" else {"density": budget / 60}
    model = learned(base, donor, candidate_ratio=4, budget_scope=scope, **budget_of)
    logits, state = logits_of(model), model.base_model.states["default"]
    with torch.no_grad():
        for value in logits.values():
            # Few distinct values, so that ties are everywhere; zeros tie whatever the delta.
            value.copy_(torch.tensor(data.draw(st.lists(st.integers(-1, 1), min_size=len(value), max_size=len(value)))))
    names = sorted(logits)
    weighed = {}
    for name in names:
        delta = (donor.get_parameter(name) - base.get_parameter(name)).detach().flatten()
        weighed[name] = logits[name].detach() * delta[held(model)[name]].abs()
    if scope == "global":
        everything = top_k_mask(torch.cat([weighed[name] for name in names]), budget)
        wanted = dict(zip(names, everything.split([len(weighed[name]) for name in names]), strict=True))
    else:
        sizes = {name: p.numel() for name, p in base.named_parameters()}
        wanted = {name: top_k_mask(weighed[name], round(budget / 60 * sizes[name])) for name in names}
    assert all(torch.equal(state.mask(name), wanted[name]) for name in names)
    assert sum(int(mask.sum()) for mask in wanted.values()) == model.peft_config["default"].record.entries
    assert same_bits(output(model, X), output(hard(model, base, donor), X))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 3.5])
def test_training_and_evaluation_give_the_same_values(alpha: float, dtype: torch.dtype) -> None:
    base = MLP().to(dtype)
    model = learned(base, alpha=alpha)
    with torch.no_grad():
        for value in logits_of(model).values():
            value.uniform_(-2, 2)
        x = X.to(dtype)
        exact = model.eval()(x)
        assert torch.equal(model.train()(x), exact)
    assert torch.equal(model(x), exact)
    assert torch.equal(model.eval()(x), exact)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("alpha", [1.0, 3.5])
def test_the_gradient_of_a_logit_is_that_of_its_entry_times_the_scaled_delta(alpha: float, training: bool) -> None:
    base = MLP()
    donor = perturbed(base, scale=0.3)
    model = learned(base, donor, alpha=alpha).train(training)
    with torch.no_grad():
        for value in logits_of(model).values():
            value.uniform_(-2, 2)
    mse_loss(model(X), Y).backward()
    dense = hard(model, base, donor, alpha)
    mse_loss(dense(X), Y).backward()
    for name, logits in logits_of(model).items():
        delta = (donor.get_parameter(name) - base.get_parameter(name)).detach()
        wanted = (alpha * delta * dense.get_parameter(name).grad).flatten()[held(model)[name]]
        assert torch.allclose(logits.grad, wanted, rtol=1e-4, atol=1e-7)
    trained = {id(p) for p in logits_of(model).values()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in trained)


def test_no_gradient_reaches_logits_that_do_not_train() -> None:
    model = learned(MLP())
    model.set_requires_grad("default", requires_grad=False)
    assert not model(X).requires_grad
    with torch.no_grad():
        assert not learned(MLP())(X).requires_grad


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_training_that_diverged_makes_no_mask(scope: str, tmp_path: Path) -> None:
    model = learned(MLP(), budget_scope=scope)
    logits_of(model)["second.weight"].data.fill_(float("nan"))
    for use in (lambda: model.train()(X), model.merge_adapter, lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(SelectionError, match=r"mask logits must be finite, got NaN in \['second.weight'\]"):
            use()


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_plain_loop_lowers_the_loss_and_leaves_the_base_alone(family: str) -> None:
    base = FAMILIES[family]()
    donor, batch = perturbed(base, scale=0.3), inputs(base)
    model = learned(base, donor, density=0.02, task_type=TASKS[family])
    before = model.eval()(**batch).loss.item()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    for _ in range(15):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert model.eval()(**batch).loss.item() < before - 0.01
    plain, wanted = parameters(model.unload()), parameters(base)
    assert all(same_bits(plain[name], wanted[name]) for name in wanted if "classifier" not in name)


# What the mask must notice


@pytest.mark.parametrize("how", ["optimizer", "data", "load_state_dict", "copy"])
def test_the_mask_follows_the_logits_however_they_change(how: str) -> None:
    base = MLP()
    model = learned(base, density=0.2, candidate_ratio=3)
    before = output(model, X)
    flipped = {name: -value.detach() for name, value in model.state_dict().items() if name.endswith("_logits")}
    wanted = copy.deepcopy(model)
    wanted.load_state_dict(flipped, strict=False)
    expected = output(wanted, X)
    assert not same_bits(before, expected)
    live = {name: p for name, p in model.named_parameters() if name in flipped}
    if how == "optimizer":
        for p in live.values():
            p.grad = 2 * torch.ones_like(p)
        torch.optim.SGD(live.values(), lr=1.0).step()
    elif how == "data":
        for name, p in live.items():
            p.data = flipped[name]
        model.train()  # what shows no version shows at the next change of the mode, which every loop makes
    elif how == "load_state_dict":
        model.load_state_dict(flipped, strict=False)
    else:
        for name, p in live.items():
            p.data.copy_(flipped[name])
        model.train()
    assert same_bits(output(model, X), expected)


def test_the_mask_is_computed_once_per_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = learned(MLP()).eval()
    state = model.base_model.states["default"]
    calls = []
    real = state.masks_of
    monkeypatch.setattr(state, "masks_of", lambda logits: calls.append(1) or real(logits))
    for _ in range(3):
        model(X)
    assert len(calls) <= 1
    with torch.no_grad():
        next(iter(logits_of(model).values())).add_(1)
    model(X)
    model(X)
    assert len(calls) == 2


# Slots


def test_a_slot_keeps_the_parameter_that_an_optimizer_holds() -> None:
    slot = Slot(("weight",))
    part = TensorPatch(torch.arange(3), torch.ones(3))
    slot.install("weight", part, torch.zeros(3))
    logits = slot.logits("weight")
    slot.install("weight", part, torch.ones(3))
    assert slot.logits("weight") is logits and torch.equal(logits, torch.ones(3))
    slot.install("weight", TensorPatch(torch.arange(2), torch.ones(2)), torch.zeros(2))
    assert slot.logits("weight") is not logits
    assert set(slot.tensors("weight")) == {"indices", "values", "logits"}
    coded, _ = encode_values(part.indices, part.values, torch.zeros(3), VALUE_CODES["sign"])
    slot.install("weight", coded)
    assert slot.logits("weight") is None and list(slot.tensors("weight")) == ["indices", "levels", "scales"]
    slot.install("weight", part)
    assert list(slot.tensors("weight")) == ["indices", "values"] and not slot.codes
    slot.remove("weight")
    slot.remove("weight")
    assert slot.params == [] and slot.tensors("weight") == {} and list(slot.state_dict()) == []
