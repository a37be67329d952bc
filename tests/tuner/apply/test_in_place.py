"""A patch in the base's own storage: there while a module runs, gone afterwards, and nobody else sees it."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grafts import MLP, assert_same, graft, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_mixtral
from peft_graft import GraftConfig
from peft_graft.tuner.apply import forward, in_place
from peft_graft.tuner.apply.forward import calling
from peft_graft.tuner.apply.in_place import Hold, can_write, is_held, own_copy, own_entries, patched_copy, written
from peft_graft.tuner.apply.sparse_grad import is_simple

WIDE = 192  # 192 x 192 entries: wide enough to be patched in place


class Wide(nn.Module):
    """Modules that are patched in place, and one that returns a view of its weight."""

    def __init__(self, positions: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WIDE, WIDE)
        self.norms = nn.Sequential(nn.LayerNorm(WIDE), LlamaRMSNorm(WIDE))
        self.linear = nn.Linear(WIDE, WIDE)
        self.positions = Positions() if positions else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        y = self.linear(self.norms(self.embedding(ids)))
        return y if self.positions is None else y + self.positions(ids)


class Positions(nn.Module):
    """As in Whisper: what comes out is a view of the weight, read when the module is done."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[: ids.shape[1]]


IDS = torch.arange(12).view(3, 4)


class Watch(TorchFunctionMode):
    """Notes the addresses of the weights that linear layers and embeddings read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.functional.linear, nn.functional.embedding):
            self.read.append(args[1].data_ptr())
        return func(*args, **(kwargs or {}))


def grafted(alpha: float = 1.0, positions: bool = True, **options: Any) -> tuple[nn.Module, nn.Module, nn.Module]:
    base = Wide(positions)
    donor = perturbed(base, scale=0.5)
    return base, donor, graft(base, donor, density=0.01, target_modules="all", alpha=alpha, **options).eval()


@pytest.mark.feature("torch.no_grad, torch.inference_mode")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_the_forward_reads_the_bases_own_storage_and_leaves_its_bits(alpha: float, context: Any) -> None:
    base, _, model = grafted(alpha)
    weights = [model.get_parameter(f"base_model.model.{name}.base_layer.weight") for name in ("embedding", "linear")]
    versions = [weight._version for weight in weights]
    with context():
        with Watch() as watch:
            unmerged = model(IDS)
        assert watch.read == [weight.data_ptr() for weight in weights]
        merged = copy.deepcopy(model)
        merged.merge_adapter()
        assert torch.equal(unmerged, merged(IDS)) and not torch.equal(unmerged, base(IDS))
    assert [weight._version for weight in weights] == versions
    assert not in_place._covers
    assert_same(parameters(model.unload()), parameters(base))


def test_a_view_of_a_weight_that_leaves_its_module_is_patched() -> None:
    base = nn.Sequential(Positions())
    donor = perturbed(base)
    assert not is_simple(base[0])
    model = graft(base, donor, density=1.0)
    with torch.no_grad():
        assert torch.equal(model(IDS), donor(IDS))


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="transformers 5.0 runs experts in another way")
def test_experts_are_patched_in_place() -> None:
    model = tiny_mixtral()
    assert [name for name, module in model.named_modules() if is_simple(module) and name.endswith("experts")]


def test_an_error_in_the_middle_takes_the_patch_off() -> None:
    base, _, model = grafted()
    wanted = output(model, IDS)
    with torch.no_grad(), pytest.raises(IndexError):
        model(torch.tensor([[WIDE]]))
    assert not in_place._covers
    assert same_bits(output(model, IDS), wanted)
    assert_same(parameters(model.unload()), parameters(base))


def test_a_graph_made_before_an_evaluation_is_still_right() -> None:
    """Evaluation between forward and backward must neither raise nor change what backward reads."""
    base, _, model = grafted(selection="learned", candidates=2)
    gradients = []
    for evaluate in (False, True):
        model.train().zero_grad()
        loss = model(IDS).square().sum()
        if evaluate:
            output(model, IDS)
            model.train()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# Who may be written to


def test_what_others_may_see_is_not_written_to() -> None:
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert can_write(weight)
    assert not can_write(nn.Parameter(weight))  # autograd or autocast may keep it
    assert not can_write(weight.t())
    assert not can_write(weight.to("meta"))
    shared = nn.Parameter(weight.clone(), requires_grad=False)
    shared.share_memory_()
    assert not can_write(shared)
    with torch.inference_mode():
        made = torch.zeros(4, 4)
        assert can_write(made)
    assert not can_write(made)


@pytest.mark.parametrize("how", ["requires grad", "shared", "channels last"])
def test_such_parameters_run_as_a_copy(how: str) -> None:
    if how == "channels last":
        base = nn.Sequential(nn.Conv2d(32, 64, 3)).to(memory_format=torch.channels_last)
        x = torch.randn(1, 32, 5, 5)
    else:
        base, x = nn.Sequential(nn.Linear(WIDE, WIDE)), torch.randn(2, WIDE)
    model = graft(base, perturbed(base, scale=0.5), density=0.1)
    merged = copy.deepcopy(model).merge_and_unload()
    weight = model.get_parameter("base_model.model.0.base_layer.weight")
    before = weight.clone()
    if how == "shared":
        model.share_memory()
    elif how == "requires grad":
        weight.requires_grad_()
    with torch.no_grad():
        patched = model(x)
        assert not torch.equal(patched, base(x))
        assert torch.equal(patched, merged(x))
        model.merge_adapter()
        assert torch.equal(patched, model(x))
        model.unmerge_adapter()
    assert same_bits(weight, before)


def test_the_copy_of_a_patched_parameter_starts_from_its_own_bits() -> None:
    weight = torch.arange(6.0)
    one, two = torch.tensor([0, 2, 5]), torch.tensor([2, 3])
    first, again, other = Hold(weight, "one"), Hold(weight, "one"), Hold(weight, "two")
    assert first.write(lambda: (one, torch.tensor([-1.0, -2.0, -3.0]))) is None
    assert weight.tolist() == [-1, 1, -2, 3, 4, -3] and is_held(weight)
    assert own_entries(weight, torch.arange(6)).tolist() == own_copy(weight).tolist() == [0, 1, 2, 3, 4, 5]
    assert own_entries(weight, torch.tensor([5, 1])).tolist() == [5, 1]
    assert patched_copy(weight, two, torch.tensor([7.0, 8.0])).tolist() == [0, 1, 7, 8, 4, 5]
    assert other.write(lambda: (two, torch.tensor([7.0, 8.0]))).tolist() == [0, 1, 7, 8, 4, 5]
    assert again.write(lambda: pytest.fail("is there already")) is None
    for hold in (other, first):
        hold.erase()
        assert weight.tolist() == [-1, 1, -2, 3, 4, -3]
    for hold in (again, again):
        hold.erase()
        assert weight.tolist() == [0, 1, 2, 3, 4, 5] and not is_held(weight) and own_copy(weight) is None
    with written(weight, one[:0], torch.zeros(0)) as empty:
        assert own_entries(empty, one).tolist() == [0, 2, 5]


@pytest.fixture
def _busy_threads() -> Iterator[None]:
    """Let threads interrupt each other all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.feature("several threads on one model")
@pytest.mark.usefixtures("_busy_threads")
@pytest.mark.parametrize("grad", [False, True])
def test_threads_share_one_model(grad: bool) -> None:
    base, _, model = grafted(positions=False)  # it is patched by an attribute that all threads see
    wanted, wrong = output(model, IDS), []

    def serve() -> None:
        with torch.set_grad_enabled(grad):
            wrong.extend(turn for turn in range(25) if not torch.equal(model(IDS), wanted))

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and not in_place._covers
    assert_same(parameters(model.unload()), parameters(base))


@pytest.mark.usefixtures("_busy_threads")
def test_models_that_share_their_weights_keep_their_patches_apart() -> None:
    base = Wide()
    models = []
    for seed in (1, 2):
        clone = copy.deepcopy(base)
        for name, parameter in base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(clone.get_submodule(owner), leaf, parameter)
        donor = perturbed(base, scale=0.5, seed=seed)
        models.append(graft_in_place(clone, donor).eval())
    wanted, wrong = [output(model, IDS) for model in models], []
    assert not torch.equal(*wanted)

    def serve(which: int) -> None:
        with torch.no_grad():
            wrong.extend(turn for turn in range(25) if not torch.equal(models[which](IDS), wanted[which]))

    threads = [threading.Thread(target=serve, args=(which,)) for which in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def graft_in_place(base: nn.Module, donor: nn.Module) -> nn.Module:
    from peft import get_peft_model

    return get_peft_model(base, GraftConfig(donor=donor, density=1.0, target_modules="all"))


# Generating


def language_model() -> tuple[nn.Module, nn.Module]:
    base = tiny_gpt2()
    options = {"density": 0.2, "target_modules": "all", "task_type": "CAUSAL_LM"}
    model = graft(base, perturbed(base, scale=0.3), **options)
    model.add_adapter("other", GraftConfig(donor=perturbed(base, scale=0.3, seed=9), **options))
    return base, model.eval()


def generated(model: nn.Module, count: int = 6, **options: Any) -> torch.Tensor:
    options |= {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(input_ids=torch.tensor([[5, 6, 7]]), **options).logits


class CountWrites(TorchFunctionMode):
    """Counts how often entries are overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.index_copy_
        return func(*args, **(kwargs or {}))


def assert_as_many_writes_for_more_tokens(model: nn.Module) -> None:
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    counts = []
    for tokens in (2, 7):
        with CountWrites() as writes:
            found = generated(model, tokens)
        assert all(torch.equal(one, other) for one, other in zip(found, generated(merged, tokens), strict=True))
        counts.append(writes.count)
    assert counts[0] == counts[1] > 0


def test_generating_writes_the_patch_once() -> None:
    base, model = language_model()
    assert_as_many_writes_for_more_tokens(model)
    assert not in_place._covers
    assert_same(parameters(model.unload()), parameters(base))


def test_without_a_task_type_the_patch_is_written_with_the_first_two_tokens() -> None:
    base = tiny_gpt2()
    model = graft(base, perturbed(base, scale=0.3), density=0.2, target_modules="all").eval()
    assert_as_many_writes_for_more_tokens(model)
    assert not in_place._covers and not forward._calls.stack


def test_a_call_that_fails_leaves_nothing() -> None:
    base, model = language_model()

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("wanted")

    with pytest.raises(KeyError, match="wanted"):
        generated(model, 3, logits_processor=[fail])
    assert not in_place._covers and not forward._calls.stack
    assert_same(parameters(model.unload()), parameters(base))


def test_gradients_flow_inside_of_a_call() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, selection="learned")
    x = torch.randn(5, 4)
    with calling(model.base_model.states):
        with torch.no_grad():
            kept = [model.base_model.model(x) for _ in range(3)]
        out = model.base_model.model(x)
        out.sum().backward()
    assert all(torch.equal(one, out) for one in kept)
    inside = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()
    model(x).sum().backward()
    assert inside and all(
        torch.equal(one, parameter.grad)
        for one, parameter in zip(inside, (p for p in model.parameters() if p.requires_grad), strict=True)
    )


def test_what_is_switched_while_generating_is_switched() -> None:
    base, model = language_model()
    model.set_adapter("other")
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    wanted = {"base": output(base, batch), "other": output(model, batch)}
    model.set_adapter("default")
    wanted["default"] = output(model, batch)
    seen: list[dict[str, torch.Tensor]] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append({"default": output(model, batch)})
        with model.disable_adapter():
            seen[-1]["base"] = output(model, batch)
        model.set_adapter("other")
        seen[-1]["other"] = output(model, batch)
        model.set_adapter("default")
        with pytest.raises(RuntimeError, match="adapters must be idle to be merged, got a call that patches"):
            model.merge_adapter()
        return scores

    generated(model, 2, logits_processor=[look])
    assert len(seen) == 2
    assert all(torch.equal(value, wanted[name]) for one in seen for name, value in one.items())
    assert_same(parameters(model.unload()), parameters(base))


# Compilers


@pytest.mark.feature("torch.compile")
@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("make", [MLP, tiny_bert, tiny_gpt2])
def test_a_loaded_graft_compiles_without_a_break(make: Any, grad: bool) -> None:
    base = make()
    batch = {"x": torch.randn(5, 4)} if make is MLP else inputs(base)
    batch.pop("labels", None)
    model = graft(base, perturbed(base), density=0.1).eval()
    torch.compiler.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend="eager", fullgraph=True)(**batch)
        eager = model(**batch)
    assert torch.equal(getattr(compiled, "logits", compiled), getattr(eager, "logits", eager))
