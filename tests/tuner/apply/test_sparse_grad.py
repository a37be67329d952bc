"""Gradients at the candidates: the same numbers as the whole gradient, without the memory for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from grafts import FAMILIES, MLP, TASKS, graft, parameters, same_bits
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig
from peft_graft.tuner.apply import forward
from peft_graft.tuner.apply.in_place import patched_copy
from peft_graft.tuner.apply.sparse_grad import SparseGrad, choose_kernel, patched_run, product_at

KERNELS = ("gathered", "sampled", "dense")
CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kernel=st.sampled_from(KERNELS), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_every_kernel_gives_the_entries_of_the_product(data: st.DataObject, kernel: Any, dtype: torch.dtype) -> None:
    tokens, rows, columns = (data.draw(st.integers(1, high)) for high in (600, 7, 9))
    indices = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows * columns - 1), min_size=1))))
    left, right = torch.randn(tokens, rows, dtype=torch.float64), torch.randn(tokens, columns, dtype=torch.float64)
    wanted = (left.t() @ right).flatten()[indices]
    found = product_at(left.to(dtype), right.to(dtype), indices, kernel)
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, atol=1e-11 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, kernel: Any) -> None:
    left, right = torch.randn(500, 6).to(dtype), torch.randn(500, 5).to(dtype)
    indices = torch.tensor([0, 7, 13, 29])
    wanted = (left.double().t() @ right.double()).flatten()[indices]
    found = product_at(left, right, indices, kernel)
    assert found.dtype == torch.float32
    # The dense gradient is rounded to the dtype, as autograd would; the others are not.
    assert torch.allclose(found.double(), wanted, atol=0.3 if kernel == "dense" else 1e-4)


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (768, 3072), (2048, 2048), (8192, 2048)], ids=str)
def test_the_kernel_changes_with_the_density(shape: tuple[int, int]) -> None:
    def at(density: float, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        return choose_kernel(round(density * shape[0] * shape[1]), shape, torch.device(device), dtype)

    assert [at(density) for density in (1e-4, 1e-2, 5e-2, 0.5)] == ["gathered", "sampled", "sampled", "dense"]
    assert at(0.5, dtype=torch.bfloat16) == at(0.05, "cuda") == "dense"
    assert at(1e-5, dtype=torch.bfloat16) == at(1e-5, "cuda") == "gathered"


# Layers, against autograd through a patched copy of the weight


class Dense(nn.Module):
    """The same layer, run on a patched copy that autograd sees."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        tensors = {"weight": patched_copy(self.unit.weight, *weight[:2])}
        if bias is not None:
            tensors["bias"] = patched_copy(self.unit.bias, *bias[:2])
        return torch.func.functional_call(self.unit, tensors, (x,))


def part(parameter: torch.Tensor, every: int) -> SparseGrad:
    indices = torch.arange(0, parameter.numel(), every)
    values = torch.randn(len(indices), dtype=parameter.dtype).requires_grad_()
    return SparseGrad(indices, values, indices, values.detach())


UNITS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "linear": (lambda: nn.Linear(5, 7), torch.randn(2, 3, 5)),
    "no bias": (lambda: nn.Linear(5, 7, bias=False), torch.randn(4, 5)),
    "conv1D of transformers": (lambda: Conv1D(7, 5), torch.randn(2, 3, 5)),
    "few biases": (lambda: nn.Linear(5, 50), torch.randn(4, 5)),
    "one vector": (lambda: nn.Linear(5, 7), torch.randn(5)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.tensor([[1, 1, 8], [3, 0, 1]])),
    "padding": (lambda: nn.Embedding(9, 4, padding_idx=1), torch.tensor([[1, 1, 8], [3, 0, 1]])),
}


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", sorted(UNITS))
def test_layers_have_the_output_and_the_gradients_of_the_dense_path(name: str, every: int) -> None:
    make, x = UNITS[name]
    unit = make().double().requires_grad_(False)
    before = parameters(unit)
    weight = part(unit.weight, every)
    bias = None if getattr(unit, "bias", None) is None else part(unit.bias, 3 if len(unit.bias) < 20 else 20)
    run = patched_run(unit)
    assert run is not None
    gradients = []
    for runner in (lambda x: run(unit, x, weight, bias), lambda x: Dense(unit)(x, weight, bias)):
        own = x.double().requires_grad_() if x.is_floating_point() else x
        output = runner(own)
        wanted = [
            tensor for tensor in (own, weight[1], bias and bias[1]) if tensor is not None and tensor.requires_grad
        ]
        upstream = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(0))
        gradients.append([output, *torch.autograd.grad(output, wanted, upstream)])
    ours, theirs = gradients
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.allclose(one, other, rtol=0, atol=1e-12) for one, other in zip(ours, theirs, strict=True))
    assert all(same_bits(value, before[key]) for key, value in unit.named_parameters())


@pytest.mark.parametrize("name", ["linear", "conv1D of transformers", "embedding"])
def test_gradcheck(name: str) -> None:
    make, x = UNITS[name]
    unit = make().double().requires_grad_(False)
    indices, values = part(unit.weight, 4)[:2]
    run = patched_run(unit)
    x = x.double().requires_grad_() if x.is_floating_point() else x

    def call(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return run(unit, x, SparseGrad(indices, values, indices, values.detach()), None)

    assert torch.autograd.gradcheck(call, (x, values))


def test_a_second_derivative_is_refused() -> None:
    unit = nn.Linear(3, 3).requires_grad_(False)
    x = torch.randn(2, 3, requires_grad=True)
    output = patched_run(unit)(unit, x, part(unit.weight, 2), None)
    (gradient,) = torch.autograd.grad(output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["linear", "no bias", "conv1D of transformers"])
def test_autocast_gives_the_output_of_the_dense_path(name: str, dtype: torch.dtype) -> None:
    make, x = UNITS[name]
    unit = make().requires_grad_(False)
    weight, run = part(unit.weight, 2), patched_run(unit)
    bias = None if unit.bias is None else part(unit.bias, 3)
    gradients = []
    for runner in (lambda: run(unit, x, weight, bias), lambda: Dense(unit)(x, weight, bias)):
        with torch.autocast("cpu", dtype):
            output = runner()
        assert output.dtype == dtype
        gradients.append([output, torch.autograd.grad(output.float().square().sum(), weight.values)[0]])
    (ours, our_gradient), (theirs, their_gradient) = gradients
    assert torch.equal(ours, theirs)
    assert our_gradient.dtype == torch.float32 and torch.allclose(our_gradient, their_gradient, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "unit",
    [
        nn.Embedding(5, 3, max_norm=1.0),
        nn.Embedding(5, 3, scale_grad_by_freq=True),
        nn.Embedding(5, 3, sparse=True),
        nn.Conv1d(3, 3, 1),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda unit: repr(unit)[:40],
)
def test_what_has_no_kernel_runs_as_it_is(unit: nn.Module) -> None:
    assert patched_run(copy.deepcopy(unit).requires_grad_(False)) is None


def test_a_module_that_trains_or_is_watched_runs_as_it_is() -> None:
    unit = nn.Linear(3, 3)
    assert patched_run(unit) is None
    assert patched_run(unit.requires_grad_(False)) is not None
    handle = unit.register_forward_hook(lambda *_: None)
    assert patched_run(unit) is None
    handle.remove()
    unit.forward = lambda x: x  # as accelerate's offloading does
    assert patched_run(unit) is None


# Models


def logits_gradients(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # dropout
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", [None, "all"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_models_have_the_gradients_of_the_dense_path(
    family: str, targets: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = FAMILIES[family]()
    options = {"selection": "learned", "density": 0.02, "target_modules": targets, "task_type": TASKS[family]}
    model, batch = graft(base, perturbed(base, scale=0.1), **options).train(), inputs(base)
    ours = logits_gradients(model, batch)
    monkeypatch.setattr(forward, "patched_run", lambda module: None)
    theirs = logits_gradients(model, batch)
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6), name


def test_two_adapters_and_a_fitted_alpha_have_the_gradients_of_the_dense_path(monkeypatch: pytest.MonkeyPatch) -> None:
    base, batch = MLP(), {"x": torch.randn(5, 4)}
    model = graft(base, perturbed(base, scale=0.3), selection="learned", density=0.2, adapter_name="x")
    model.add_adapter("y", GraftConfig(donor=perturbed(base, scale=0.3, seed=7), selection="learned", density=0.2))
    model.base_model.set_adapter(["x", "y"])
    alphas = torch.rand(2, requires_grad=True)
    state = model.base_model.states["y"]
    state.trial = dict(zip(["first.weight", "second.weight"], alphas.unbind(), strict=True))
    found = []
    for patch in (False, True):
        if patch:
            monkeypatch.setattr(forward, "patched_run", lambda module: None)
        logits = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(model.train()(**batch).square().sum(), logits)
        alpha = torch.autograd.grad(model.eval()(**batch).square().sum(), alphas)
        found.append([*gradients, *alpha])
    assert len(found[0]) == 13 and any(gradient.abs().max() > 0 for gradient in found[0][:-1])
    assert found[0][-1].abs().min() > 0
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found, strict=True))


def test_autograd_keeps_no_copy_of_a_weight() -> None:
    base, batch = tiny_bert(), inputs(tiny_bert(), batch=1, length=3)
    model = graft(base, perturbed(base), selection="learned", density=0.005).train()
    weights = {p.data_ptr() for p in model.parameters()}
    linears = {p.numel() for name, p in base.named_parameters() if name.endswith("dense.weight")}
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(**batch)
    assert any(tensor.data_ptr() in weights for tensor in kept)  # the base's own, by reference
    assert [tensor.shape for tensor in kept if tensor.numel() in linears and tensor.data_ptr() not in weights] == []


class Overwrites(nn.Module):
    """Writes to what its layers return, as DeBERTa does."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.unit(x)
        y /= 2
        z = y.view(-1, y.shape[-1]).t()
        z += 1
        return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
def test_a_model_may_write_to_what_a_layer_returns(kind: str, bias: bool) -> None:
    unit = {"linear": nn.Linear(4, 3, bias=bias), "conv1d": Conv1D(3, 4), "embedding": nn.Embedding(5, 3)}[kind]
    x = torch.randint(5, (2, 3)) if kind == "embedding" else torch.randn(2, 3, 4)
    plain = Overwrites(unit)
    model = graft(plain, perturbed(plain, scale=0.3), density=0.5, selection="learned", target_modules=["unit"])
    with torch.no_grad():
        wanted = model(x)
    trained = model.train()(x)
    assert torch.equal(trained, wanted)
    trained.square().sum().backward()
    candidates = model.base_model.model.unit.graft_patch["default"].indices("weight")
    logits = model.base_model.states["default"].logits()["unit.weight"]
    merged = copy.deepcopy(plain)
    merged.load_state_dict(model.merge_and_unload().state_dict())
    merged(x).square().sum().backward()
    delta = (perturbed(plain, scale=0.3).unit.weight - plain.unit.weight).detach()
    assert torch.allclose(logits.grad, (merged.unit.weight.grad * delta).flatten()[candidates], atol=1e-5)
