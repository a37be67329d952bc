"""Tied weights: one patch, counted once, seen by every holder, and still tied afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from grafts import assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_gpt2


class Tied(nn.Module):
    """An embedding and a head that share their weight; the head is called first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(ids))


@pytest.mark.feature("tied weights")
@pytest.mark.parametrize("targets", ["all", ["embedding"], ["head"]], ids=str)
def test_tied_weights_have_one_patch(targets: object) -> None:
    base = Tied()
    donor = perturbed(base)
    model = graft(base, donor, density=0.5, target_modules=targets)
    tied = "head.weight" if targets == ["head"] else "embedding.weight"
    assert sum(name.endswith(".weight") for name in model.base_model.targets("default")) == 1
    assert tied in held(model)
    ids = torch.arange(6)
    patched = model(ids)
    wanted = copy.deepcopy(base)
    with torch.no_grad():
        for name, index in held(model).items():
            wanted.get_parameter(name).view(-1)[index] = donor.get_parameter(name).view(-1)[index]
    assert same_bits(patched, wanted(ids))
    model.merge_adapter()
    assert same_bits(model(ids), patched)
    with model.disable_adapter():
        assert same_bits(model(ids), base(ids))
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged.head.weight is merged.embedding.weight
    assert same_bits(merged(ids), patched)
    alone = model.unload()
    assert alone.head.weight is alone.embedding.weight
    assert_same(parameters(alone), parameters(base))


@pytest.mark.feature("tied weights")
def test_tying_again_ties_the_base_and_not_a_patched_copy() -> None:
    base = tiny_gpt2()
    model = graft(base, perturbed(base), density=0.1, target_modules="all")
    patched = output(model, inputs(base))
    inner = model.base_model.model
    weight = inner.transformer.wte.get_base_layer().weight
    inner.tie_weights()
    assert inner.lm_head.get_base_layer().weight is inner.transformer.wte.get_base_layer().weight is weight
    assert inner.lm_head.weight is weight
    assert same_bits(output(model, inputs(base)), patched)


def test_a_module_in_two_places_has_one_patch() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    base.append(base[0])
    donor = perturbed(base)
    model = graft(base, donor, density=1.0)
    assert list(held(model)) == ["0.bias", "0.weight"]
    x = torch.randn(2, 4)
    assert same_bits(model(x), donor(x))
    alone = model.unload()
    assert alone[0] is alone[2] and same_bits(alone(x), base(x))
