"""Norms of inputs: against the inputs that multiply each entry, computed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from batches import assert_close, examples, measured, quietly, whole
from grafts import MLP, Single, graft
from models import inputs, perturbed, tiny_vit, tiny_whisper
from peft_graft import GraftConfig, SelectionError, initialize_graft


def test_the_input_norm_is_that_of_what_multiplies_each_entry() -> None:
    base = MLP().eval()
    nn.init.normal_(base.norm.weight), nn.init.normal_(base.norm.bias)
    x = whole(examples())["x"]
    first = base.first(x)
    normal = (base.norm(first) - base.norm.bias) / base.norm.weight
    wanted = {
        "first.weight": x.norm(dim=0)[None],
        "norm.weight": normal.norm(dim=0),
        "second.weight": torch.tanh(base.norm(first)).norm(dim=0)[None],
        **{f"{name}.bias": torch.tensor(8.0).sqrt() for name in ("first", "norm", "second")},
    }
    with torch.no_grad():
        assert_close(measured(base, perturbed(base), "input_norm", examples()), wanted)


@pytest.mark.parametrize("unit", [Conv1D(3, 4), nn.Linear(4, 3), LlamaRMSNorm(4), nn.Embedding(5, 3)], ids=repr)
def test_the_input_norm_is_the_size_of_the_gradient_of_a_linear_module(unit: nn.Module) -> None:
    """d output / d entry is the input that multiplies the entry, so its norm over positions is the norm asked for."""
    base = Single(unit).eval()
    integers = isinstance(unit, nn.Embedding)
    x = torch.randint(5, (3, 2)) if integers else torch.randn(3, 2, 4)
    model = graft(base, "zeros", density=0.5, selection="wanda", target_modules="all")
    found = quietly(model, "input_norm", [x], lambda m, b: m(b).sum())
    squares = {name: torch.zeros_like(p) for name, p in base.named_parameters()}
    for row in x.reshape(-1) if integers else x.reshape(-1, 4):
        base.zero_grad()
        base(row[None]).sum().backward()
        for name, parameter in base.named_parameters():
            squares[name] += parameter.grad.square()
    for name, square in squares.items():
        assert torch.allclose(found[name].expand_as(square), square.sqrt(), rtol=1e-4, atol=1e-6), name


def test_the_input_norm_of_a_convolution_is_per_channel() -> None:
    base = Single(nn.Conv2d(3, 4, 2)).eval()
    x = torch.randn(2, 3, 5, 5)
    model = graft(base, "zeros", density=0.5, selection="wanda")
    found = quietly(model, "input_norm", [x], lambda m, b: m(b).sum())
    assert torch.allclose(found["unit.weight"], x.square().sum((0, 2, 3)).sqrt().view(1, 3, 1, 1))
    assert found["unit.bias"].item() == pytest.approx((2 * 4 * 4) ** 0.5)  # how many outputs the bias is added to


def test_inputs_given_by_keyword_count() -> None:
    x = torch.randn(3, 4)
    base = Single(nn.Linear(4, 2))
    base.forward = lambda x: base.unit(input=x)  # type: ignore[method-assign]
    model = get_peft_model(base, GraftConfig(donor="zeros", density=0.5, selection="wanda"))
    found = quietly(model, "input_norm", [x], lambda m, b: m(b).sum())
    assert torch.allclose(found["unit.weight"], x.norm(dim=0)[None])


@pytest.mark.parametrize(
    ("make", "module"), [(tiny_vit, "ViTEmbeddings"), (tiny_whisper, "Conv1d")], ids=["bare parameters", "conv1d"]
)
def test_wanda_refuses_what_it_has_no_input_for(make: Callable[[], nn.Module], module: str) -> None:
    base = make()
    model = graft(base, perturbed(base), density=0.1, selection="wanda", target_modules="all")
    with pytest.raises(SelectionError, match=f"selection='wanda' must target .*got {module} for .*exclude_modules"):
        initialize_graft(model, [inputs(base)], show_progress_bar=False)
