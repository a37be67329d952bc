"""Patches that stay in place until a model's call ends: whatever changes meanwhile, the numbers are those of now."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

from grafts import assert_same, graft, output, parameters, runs
from models import perturbed, tiny_gpt2
from peft_graft import GraftConfig

BATCH = {"input_ids": torch.tensor([[5, 6, 7]])}
OPTIONS: dict[str, Any] = {"density": 0.2, "target_modules": "all", "task_type": "CAUSAL_LM"}


def grafted(seed: int = 1, **options: Any) -> tuple[nn.Module, nn.Module]:
    base = tiny_gpt2()
    return base, graft(base, perturbed(base, scale=0.3, seed=seed), **(OPTIONS | options)).eval()


def generated(model: nn.Module, look: Callable[[], None] = lambda: None, count: int = 3) -> tuple[torch.Tensor, ...]:
    """Logits of the next tokens, with a look at the model before each is chosen."""

    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        look()
        return scores

    options = {"max_new_tokens": count, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.generate(**BATCH, logits_processor=[process], **options).logits


def are_equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def test_an_alpha_that_changes_meanwhile_counts_at_once() -> None:
    _, model = grafted()
    wanted = {}
    for alpha in (2.5, 1.0):
        model.peft_config["default"].alpha = alpha
        wanted[alpha] = output(model, BATCH)
    found = []

    def look() -> None:
        for alpha in wanted:
            model.peft_config["default"].alpha = alpha
            found.append(torch.equal(output(model, BATCH), wanted[alpha]))

    generated(model, look)
    assert found == [True] * 6


@pytest.mark.parametrize("alpha", [1.0, {"transformer.wte.weight": 1.5}])
def test_an_alpha_that_changes_before_the_second_token_changes_that(alpha: Any) -> None:
    _, model = grafted(alpha=alpha)
    config = model.peft_config["default"]

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if isinstance(alpha, dict):
            config.alpha["transformer.wte.weight"] = 2.5
        else:
            config.alpha = 2.5
        return scores

    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(**BATCH, use_cache=False, logits_processor=[change], **options)
    wanted = output(model, {"input_ids": found.sequences[:, :-1]})[:, -1]
    torch.testing.assert_close(found.logits[1], wanted)


def test_an_adapter_that_is_loaded_anew_under_its_name_counts_at_once(tmp_path: Path) -> None:
    _, model = grafted()
    _, other = grafted(seed=9)
    other.save_pretrained(tmp_path)
    wanted, found = output(other, BATCH), []

    def look() -> None:
        if not found:
            model.add_adapter("other", GraftConfig(donor="zeros", **OPTIONS))
            model.set_adapter("other")
            model.delete_adapter("default")
            model.load_adapter(tmp_path, "default")
            model.set_adapter("default")
        found.append(output(model, BATCH))

    generated(model, look)
    assert are_equal(tuple(found), (wanted,) * 3)


def test_a_mask_that_trains_meanwhile_is_never_stale() -> None:
    _, model = grafted(selection="learned", candidate_ratio=2)
    logits = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []

    def look() -> None:
        with torch.no_grad():
            for values in logits:
                values.uniform_()
            found.append(model(**BATCH).logits)
        assert torch.equal(found[-1], copy.deepcopy(model)(**BATCH).logits)

    generated(model, look)
    assert not torch.equal(found[0], found[1]) and torch.equal(found[-1], output(model, BATCH))


def test_an_adapter_made_meanwhile_is_that_of_the_base() -> None:
    base, model = grafted()
    config = GraftConfig(donor=perturbed(base, scale=0.3, seed=9), **OPTIONS)
    other = get_peft_model(copy.deepcopy(base), config).base_model.patch("default")

    def look() -> None:
        if "other" not in model.peft_config:
            model.add_adapter("other", config)

    generated(model, look)
    made = model.base_model.patch("other")
    assert made.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(made.tensors[name].indices, part.indices) for name, part in other.tensors.items())


def test_a_copy_made_meanwhile_has_the_bases_own_bits() -> None:
    base, model = grafted()
    copies: list[nn.Module] = []
    wanted = generated(model, lambda: copies.append(copy.deepcopy(model)), count=1)
    assert are_equal(generated(copies[0], count=1), wanted)
    assert_same(parameters(copies[0].unload()), parameters(base))


def test_a_model_that_moves_at_its_first_forward_gets_its_bits_back() -> None:
    """As with accelerate's cpu_offload_with_hook."""
    base, model = grafted()
    wanted = generated(model)

    def move(module: nn.Module, args: Any) -> None:
        handle.remove()
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()

    handle = model.base_model.model.register_forward_pre_hook(move)
    assert are_equal(generated(model), wanted)
    assert not runs(model)
    assert_same(parameters(model.unload()), parameters(base))


def test_a_model_that_shares_the_weights_writes_to_none_that_another_is_running_on() -> None:
    """Also where the other has no entries."""
    base = tiny_gpt2()
    models = []
    for budget in ({"num_params": 5}, {"density": 0.2}):
        clone = copy.deepcopy(base)
        for name, parameter in base.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(clone.get_submodule(owner), leaf, parameter)
        clone.tie_weights()
        donor = perturbed(base, scale=0.3, seed=len(models))
        models.append(get_peft_model(clone, GraftConfig(donor=donor, **(OPTIONS | {"density": None} | budget))).eval())
    sparse, dense = models
    wanted = generated(sparse), generated(dense)
    written, finish = threading.Event(), threading.Event()
    found = []

    def hold() -> None:
        written.set()
        finish.wait(10)

    other = threading.Thread(target=lambda: found.append(generated(dense, hold)))

    def look() -> None:
        if other.ident is None:
            other.start()
            written.wait(10)

    assert are_equal(generated(sparse, look), wanted[0])
    finish.set()
    other.join()
    assert are_equal(found[0], wanted[1])


@pytest.mark.parametrize("alpha", [pytest.param(1.0, marks=pytest.mark.slow), 2.5])
def test_blocks_that_are_compiled_see_the_patch_once(alpha: float) -> None:
    base, model = grafted(alpha=alpha)
    model.add_adapter("other", GraftConfig(donor=perturbed(base, scale=0.3, seed=9), **OPTIONS))
    model.set_adapter("other")
    wanted = {"other": output(model, BATCH), "base": output(base, BATCH)}
    model.set_adapter("default")
    wanted["default"], tokens = output(model, BATCH), generated(model)
    torch.compiler.reset()
    for block in model.base_model.model.transformer.h:
        block.compile(backend="eager")

    def look() -> None:
        model.set_adapter("other")
        assert torch.equal(output(model, BATCH), wanted["other"])
        model.set_adapter("default")
        with model.disable_adapter():
            assert torch.equal(output(model, BATCH), wanted["base"])
        assert torch.equal(output(model, BATCH), wanted["default"])

    assert torch.equal(output(model, BATCH), wanted["default"])
    assert are_equal(generated(model, look), tokens)
    assert torch.equal(output(model, BATCH), wanted["default"])
