"""A patch in the base's own storage: there while a module runs, gone afterwards, and nobody else sees it."""

from __future__ import annotations

import copy
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from grafts import MLP, assert_same, graft, output, parameters, runs, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_mixtral
from peft_graft import GraftConfig
from peft_graft.tuner import mask
from peft_graft.tuner.apply.forward import applied
from peft_graft.tuner.apply.in_place import (
    NOTHING,
    PatchLease,
    ResolvedTensor,
    can_write,
    has_patch,
    own_copy,
    own_entries,
    patched_copy,
    written,
)
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
    assert not runs(model)
    assert_same(parameters(model.unload()), parameters(base))


def test_a_view_of_a_weight_that_leaves_its_module_is_patched() -> None:
    base = nn.Sequential(Positions())
    donor = perturbed(base)
    assert not is_simple(base[0])
    model = graft(base, donor, density=1.0)
    with torch.no_grad():
        assert torch.equal(model(IDS), donor(IDS))


class LookAlikeRMSNorm(nn.Module):
    """As transformers' norms are called, but what comes out is a view of the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight[: x.shape[1]]


def test_a_class_that_is_only_called_like_a_norm_is_not_patched_in_place() -> None:
    base = nn.Sequential(LookAlikeRMSNorm())
    donor = perturbed(base)
    assert not is_simple(base[0]) and is_simple(LlamaRMSNorm(4)) and is_simple(nn.RMSNorm(4))
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
    assert not runs(model)
    assert same_bits(output(model, IDS), wanted)
    assert_same(parameters(model.unload()), parameters(base))


def test_a_graph_made_before_an_evaluation_is_still_right() -> None:
    """Evaluation between forward and backward must neither raise nor change what backward reads."""
    base, _, model = grafted(selection="learned", candidate_ratio=2)
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


def entries(key: object, indices: list[int], values: list[float], **more: Any) -> ResolvedTensor:
    return ResolvedTensor(key, torch.tensor(indices, dtype=torch.int64), torch.tensor(values), **more)


def test_leases_with_the_same_patch_share_it_and_others_work_on_copies_of_the_own_bits() -> None:
    weight = torch.arange(6.0)
    one, two = entries("one", [0, 2, 5], [-1.0, -2.0, -3.0]), entries("two", [2, 3], [7.0, 8.0])
    first, again, other = PatchLease(), PatchLease(), PatchLease()
    assert first.acquire(weight, one)
    assert weight.tolist() == [-1, 1, -2, 3, 4, -3] and has_patch(weight)
    assert own_entries(weight, torch.arange(6)).tolist() == own_copy(weight).tolist() == [0, 1, 2, 3, 4, 5]
    assert own_entries(weight, torch.tensor([5, 1])).tolist() == [5, 1]
    assert patched_copy(weight, two.indices, two.values).tolist() == [0, 1, 7, 8, 4, 5]
    assert not other.acquire(weight, two)
    with written(weight, two) as copied:
        assert copied.tolist() == [0, 1, 7, 8, 4, 5]
    assert again.acquire(weight, one)
    for lease in (other, first, first):
        lease.release()
        assert weight.tolist() == [-1, 1, -2, 3, 4, -3]
    for lease in (again, again):
        lease.release()
        assert weight.tolist() == [0, 1, 2, 3, 4, 5] and not has_patch(weight) and own_copy(weight) is None
    with written(weight, NOTHING) as empty:
        assert own_entries(empty, one.indices).tolist() == [0, 2, 5]
        assert not other.acquire(weight, two)


def test_a_patch_that_expects_other_values_of_the_base_is_not_written() -> None:
    weight, lease = torch.arange(4.0), PatchLease()
    assert not lease.acquire(weight, entries("one", [1], [9.0], expected=torch.tensor([2.0])))
    assert weight.tolist() == [0, 1, 2, 3] and not has_patch(weight)
    assert lease.acquire(weight, entries("one", [1], [9.0], expected=torch.tensor([1.0])))
    lease.release()
    assert weight.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_writing_takes_time_in_proportion_to_the_patch(dtype: torch.dtype) -> None:
    """Some of torch's functions take quadratic time for 16 bits: minutes, for this one."""
    weight = torch.zeros(400_000, dtype=dtype)
    patch = ResolvedTensor("one", torch.arange(400_000), torch.ones(400_000, dtype=dtype))
    began = time.process_time()
    with written(weight, patch):
        assert weight.sum(dtype=torch.float64) == 400_000
    assert not weight.any() and time.process_time() - began < 10


def test_a_lease_that_nobody_holds_is_released() -> None:
    weight = torch.arange(4.0)
    lease = PatchLease()
    assert lease.acquire(weight, entries("one", [1], [9.0]))
    del lease
    assert weight.tolist() == [0, 1, 2, 3] and not has_patch(weight)


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
    assert wrong == [] and not runs(model)
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


def language_model(**more: Any) -> tuple[nn.Module, nn.Module]:
    base = tiny_gpt2()
    options = {"density": 0.2, "target_modules": "all", "task_type": "CAUSAL_LM"} | more
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
        self.count += func in (torch.Tensor.scatter_, torch.Tensor.index_copy_)
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
    assert not runs(model)
    assert_same(parameters(model.unload()), parameters(base))


def test_generating_without_a_task_type_writes_the_patch_once() -> None:
    base = tiny_gpt2()
    model = graft(base, perturbed(base, scale=0.3), density=0.2, target_modules="all").eval()
    assert_as_many_writes_for_more_tokens(model)
    assert not runs(model)


def test_a_call_that_fails_leaves_nothing() -> None:
    base, model = language_model()

    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyError("wanted")

    with pytest.raises(KeyError, match="wanted"):
        generated(model, 3, logits_processor=[fail])
    assert not runs(model)
    assert_same(parameters(model.unload()), parameters(base))


def test_gradients_flow_inside_of_a_call() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, selection="learned")
    x = torch.randn(5, 4)
    with applied(model.base_model.states, model):
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


# Interrupts


class Interrupts:
    """Raises KeyboardInterrupt at the n-th place where Python looks for signals: as functions begin, or C returns."""

    FILES = ("peft_graft", "contextlib", "peft_model.py")

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, frame: Any, event: str, arg: Any) -> None:
        place = event in ("call", "c_return") and frame.f_code.co_name != "__del__"  # there, Python ignores it
        if self.left and place and any(name in frame.f_code.co_filename for name in self.FILES):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        sys.setprofile(self)
        return self

    def __exit__(self, *args: Any) -> None:
        sys.setprofile(None)


def _forward(model: nn.Module) -> None:
    with torch.no_grad():
        model(IDS)


def _under_applied(model: nn.Module) -> None:
    with torch.no_grad(), model.applied():
        model(IDS)
        model(IDS)


def _under_grad(model: nn.Module) -> None:
    model(IDS)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # in finalizers, Python ignores it
@pytest.mark.parametrize("call", [_forward, _under_applied, _under_grad])
def test_an_interrupt_anywhere_leaves_the_bases_own_bits(call: Any) -> None:
    base = nn.Sequential(nn.Embedding(WIDE, 8), nn.Linear(8, 8))
    model = graft(base, perturbed(base, scale=0.5), density=0.1, target_modules="all", alpha=2.5).eval()
    wanted = output(model, IDS)
    own = parameters(model)
    for at in range(1, 5000):
        with Interrupts(at) as interrupts:
            try:
                call(model)
            except KeyboardInterrupt:
                pass
        assert not runs(model), f"interrupt {at}"
        assert_same(parameters(model), own)
        if interrupts.left:  # the call has come to its end
            break
    assert 50 < at < 4999, at
    assert torch.equal(output(model, IDS), wanted)
    assert not model.base_model.states.scopes


# What others see meanwhile


def test_a_state_dict_taken_while_generating_has_the_bases_own_bits() -> None:
    base, model = language_model()
    wanted, found = {key: value.clone() for key, value in model.state_dict().items()}, []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        found.append({key: value.clone() for key, value in model.state_dict().items()})
        return scores

    generated(model, 2, logits_processor=[look])
    assert len(found) == 2
    for state_dict in found:
        assert_same(state_dict, wanted)


def test_the_state_dict_of_a_merged_model_has_the_patch() -> None:
    base, _, model = grafted()
    model.merge_adapter()
    assert not torch.equal(model.state_dict()["base_model.model.linear.base_layer.weight"], base.linear.weight)


def test_unrelated_models_do_not_wait_for_each_other() -> None:
    """While one model's patch is being written, another model runs from beginning to end."""
    slow, fast = grafted()[2], grafted()[2]
    wanted, found = output(fast, IDS), []
    inside, finish = threading.Event(), threading.Event()

    class Slow(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.scatter_:
                inside.set()
                finish.wait(20)
            return func(*args, **(kwargs or {}))

    def hang() -> None:
        with Slow():
            output(slow, IDS)

    def serve() -> None:
        found.append(output(fast, IDS))

    hanging, serving = threading.Thread(target=hang), threading.Thread(target=serve)
    hanging.start()
    assert inside.wait(20)
    serving.start()
    serving.join(10)
    served = not serving.is_alive()
    finish.set()
    hanging.join()
    serving.join()
    assert served and torch.equal(found[0], wanted)


def test_two_threads_with_two_adapters_of_one_base_get_their_own_logits() -> None:
    base, model = language_model(exclude_modules=["wpe"])  # whose rows are the same for the whole batch
    batch, wanted, wrong = {"input_ids": torch.tensor([[5, 6, 7]])}, {}, []
    for name in ("default", "other"):
        model.set_adapter(name)
        wanted[name] = output(model, batch)
    assert not torch.equal(*wanted.values())

    def serve(name: str) -> None:
        with torch.no_grad():
            for turn in range(25):
                if not torch.equal(model(**batch, adapter_names=[name]).logits, wanted[name]):
                    wrong.append((name, turn))

    threads = [threading.Thread(target=serve, args=(name,)) for name in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_same(parameters(model.unload()), parameters(base))


class CountLooks:
    """Counts how often a version of the mask logits is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        version = mask.version_of

        def counted(tensor: torch.Tensor) -> int:
            self.count += 1
            return version(tensor)

        monkeypatch.setattr(mask, "version_of", counted)


def test_a_training_step_looks_at_every_logit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per layer, which would make a step quadratic in the number of layers."""
    looks = []
    for depth in (4, 8):
        base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(depth)])
        model = graft(base, perturbed(base), density=0.1, selection="learned").train()
        model(torch.randn(2, 8)).sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
        counter = CountLooks(monkeypatch)
        model(torch.randn(2, 8)).sum().backward()
        looks.append(counter.count)
    assert 0 < looks[1] <= 2 * looks[0] + 2


# Explicitly in place


def test_applied_writes_the_patch_once_for_many_batches() -> None:
    base, _, model = grafted()
    wanted = output(model, IDS)
    with CountWrites() as writes, torch.no_grad(), model.applied():
        once = torch.equal(model(IDS), wanted), writes.count
        assert once[0] and writes.count > 0
        assert torch.equal(model(IDS), wanted) and writes.count == once[1]
        assert runs(model)
    assert not runs(model)
    assert_same(parameters(model.unload()), parameters(base))


def test_applied_follows_what_changes_meanwhile() -> None:
    base, donor, model = grafted(positions=False)
    wanted = {}
    for alpha in (1.0, 2.5):
        model.peft_config["default"].alpha = alpha
        wanted[alpha] = output(model, IDS)
    with torch.no_grad(), model.applied():
        for alpha in (2.5, 1.0, 2.5):
            model.peft_config["default"].alpha = alpha
            assert torch.equal(model(IDS), wanted[alpha])
        with model.disable_adapter():
            assert torch.equal(model(IDS), base(IDS))
        assert torch.equal(model(IDS), wanted[2.5])
    assert_same(parameters(model.unload()), parameters(base))


def test_a_scaled_patch_follows_a_base_that_changes() -> None:
    """Values of alpha != 1 are computed from the base once, and again where the base has other values now."""
    base, _, model = grafted(alpha=2.5, positions=False)
    before = output(model, IDS)
    weight = model.get_parameter("base_model.model.linear.base_layer.weight")
    weight.data += 0.5  # unseen by version counters
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    found = output(model, IDS)
    assert torch.equal(found, output(merged, IDS)) and not torch.equal(found, before)


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
