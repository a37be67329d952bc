"""Different adapters for the rows of one batch: each row as if its adapter ran alone."""

from __future__ import annotations

import copy
import sys
import threading

import pytest
import torch
from peft import PeftModel
from torch import nn

from grafts import MLP, graft, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_roberta, tiny_t5, tiny_vit
from peft_graft import GraftConfig

MODELS = {
    "bert": tiny_bert,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
    "mixtral": tiny_mixtral,
    "t5": tiny_t5,
}
ROWS = ["y", "x", "__base__", "y", "x"]


def several(base: nn.Module, **options: object) -> PeftModel:
    """Grafts "x" and "y" of donors far from the base and from each other; "x" is active."""
    donors = [perturbed(base, scale=0.3, seed=10 + i) for i in range(2)]
    model = graft(base, donors[0], adapter_name="x", **{"density": 0.5, **options})
    model.add_adapter("y", GraftConfig(donor=donors[1], **{"density": 0.5, **options}))
    return model.eval()


def batch_of(base: nn.Module, rows: int = len(ROWS)) -> dict[str, torch.Tensor]:
    return {
        name: value
        for name, value in inputs(base, batch=rows).items()
        if base.config.model_type == "t5" or name != "labels"
    }


def alone(model: PeftModel, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        if name == "__base__":
            with model.disable_adapter():
                return model(**batch).logits
        model.set_adapter(name)
        return model(**batch).logits


@pytest.mark.feature("adapter_names: an adapter for each row")
@pytest.mark.parametrize(("family", "task"), [*((family, None) for family in MODELS), ("bert", "SEQ_CLS")])
def test_each_row_is_as_if_its_adapter_ran_alone(family: str, task: str | None) -> None:
    base = MODELS[family]()
    model, batch = several(base, task_type=task), batch_of(base)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=ROWS).logits
        assert same_bits(mixed, model(**batch, adapter_names=ROWS).logits)
    by_name = {name: alone(model, name, batch) for name in ("x", "y", "__base__")}
    for row, name in enumerate(ROWS):
        torch.testing.assert_close(mixed[row], by_name[name][row], rtol=1e-4, atol=1e-5)
        for other in by_name.keys() - {name}:
            assert (mixed[row] - by_name[other][row]).abs().max() > 1e-3
    model.set_adapter("x")
    assert same_bits(alone(model, "x", batch), by_name["x"])  # nothing of the rows is left behind


@pytest.mark.feature("adapter_names: an adapter for each row")
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generate_gives_each_row_the_tokens_of_its_adapter(family: str, beams: int) -> None:
    base = MODELS[family]()
    model = several(base, task_type="SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM")
    prompt = {
        "input_ids": batch_of(base)["input_ids"][:3],
        "max_new_tokens": 5,
        "min_new_tokens": 5,
        "num_beams": beams,
    }
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    rows = ["y", "__base__", "x"]
    mixed = model.generate(**prompt, adapter_names=rows, do_sample=False)
    for row, name in enumerate(rows):
        if name == "__base__":
            with model.disable_adapter():
                wanted = model.generate(**prompt, do_sample=False)
        else:
            model.set_adapter(name)
            wanted = model.generate(**prompt, do_sample=False)
        assert mixed[row].tolist() == wanted[row].tolist()


def test_one_adapter_for_all_rows_gives_the_bits_of_that_adapter() -> None:
    base = tiny_bert()
    model, batch = several(base), batch_of(base)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=["y"] * len(ROWS)).logits
    assert same_bits(mixed, alone(model, "y", batch))


@pytest.mark.feature(
    "adapter_names with patches that all rows share", "no: such parameters act on the whole batch; named in the error"
)
def test_input_embeddings_may_differ_by_row_and_positions_may_not() -> None:
    base = tiny_gpt2()
    model, batch = several(base, target_modules=["wte"]), batch_of(base)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=ROWS).logits
    torch.testing.assert_close(mixed[0], alone(model, "y", batch)[0])
    everything = several(base, target_modules="all")
    with pytest.raises(ValueError, match=r"patch modules run row by row, got patches of \['transformer.wpe.weight'\]"):
        everything(**batch, adapter_names=ROWS)
    assert same_bits(alone(everything, "x", batch), alone(everything, "x", batch))


@pytest.mark.feature("adapter_names with patches that all rows share")
def test_bare_parameters_of_a_parent_are_refused() -> None:
    base = tiny_vit()
    model, batch = several(base, target_modules="all"), {"pixel_values": inputs(base, batch=2)["pixel_values"]}
    with pytest.raises(ValueError, match=r"got patches of \[.*cls_token.*\]. Run one adapter at a time"):
        model(**batch, adapter_names=["x", "y"])
    inner = several(base)  # without these, images have rows as well
    with torch.no_grad():
        mixed = inner(**batch, adapter_names=["x", "y"]).logits
    torch.testing.assert_close(mixed[1], alone(inner, "y", batch)[1], rtol=1e-4, atol=1e-5)


def test_heads_with_modules_inside_are_refused_as_by_every_peft_method() -> None:
    base = tiny_roberta()
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules"):
        several(base, task_type="SEQ_CLS")(**batch_of(base), adapter_names=ROWS)


class Shares(nn.Module):
    """Reads another module's weight, as state-space models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight


def test_a_patch_that_another_module_reads_is_refused() -> None:
    model = several(Shares(), target_modules=["inner"])
    with pytest.raises(ValueError, match="got a patch of a parameter that another module reads"):
        model(torch.ones(2, 4), adapter_names=["x", "y"])
    assert model(torch.ones(2, 4), adapter_names=["__base__"] * 2).shape == (2, 4)


@pytest.mark.feature("adapter_names: an adapter for each row")
def test_all_offenders_are_named_at_once() -> None:
    base = MLP()
    model, x = several(base), torch.ones(3, 4)
    model.merge_adapter()
    with pytest.raises(ValueError) as caught:
        model.train()(x, adapter_names=["x", "typo", "more"])
    for part in ("in training mode", r"got ['more', 'typo']", "got merged adapters"):
        assert part in str(caught.value)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="must have one name per row, got 2 for 3 rows in 'first'"):
        model.eval()(x, adapter_names=["x", "y"])
    assert model(x, adapter_names=["x", "y", "__base__"]).shape == (3, 3)


class Repeats(nn.Module):
    """Gives an inner module all rows once per expert, as Llama 4 does, or their tokens one after the other."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.inner = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, 4).repeat(self.experts, 1)
        return self.inner(flat).view(self.experts, len(x), -1, 3).sum(0)


def test_rows_in_an_order_that_is_not_known_are_refused() -> None:
    x = torch.randn(2, 3, 4)
    tokens = several(Repeats(1), target_modules=["inner"])
    mixed = tokens(x, adapter_names=["x", "y"])
    for row, name in enumerate(["x", "y"]):
        tokens.set_adapter(name)
        torch.testing.assert_close(mixed[row], tokens(x)[row])
    experts = several(Repeats(2), target_modules=["inner"])
    with pytest.raises(ValueError, match="one name per row, got 2 for 12 rows in 'inner'.*as experts may, out"):
        experts(x, adapter_names=["x", "y"])
    assert experts(x, adapter_names=["__base__"] * 2).shape == (2, 3, 3)


def test_rows_survive_a_copy_and_half_precision() -> None:
    base = tiny_llama(torch.bfloat16)
    model, batch = copy.deepcopy(several(base)), batch_of(base)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=ROWS).logits
    torch.testing.assert_close(mixed[1], alone(model, "x", batch)[1], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("names", [ROWS, ROWS[::-1], ["__base__"] * len(ROWS)])
def test_threads_have_rows_of_their_own(names: list[str]) -> None:
    base = tiny_llama()
    model, batch = several(base), batch_of(base)
    with torch.no_grad():
        wanted, plain = model(**batch, adapter_names=names).logits, model(**batch).logits
        wrong: list[int] = []

        def serve() -> None:
            with torch.no_grad():
                wrong.extend(turn for turn in range(10) if not torch.equal(model(**batch).logits, plain))

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            other = threading.Thread(target=serve)
            other.start()
            while other.is_alive():
                assert torch.equal(model(**batch, adapter_names=names).logits, wanted)
        finally:
            other.join()
            sys.setswitchinterval(before)
    assert wrong == []


def test_rows_inside_of_rows_leave_those_outside() -> None:
    base = tiny_llama()
    model, batch = several(base), batch_of(base)
    with torch.no_grad():
        wanted = model(**batch, adapter_names=ROWS).logits
        inner = model(**batch, adapter_names=ROWS[::-1]).logits
        found = []

        def look(module: nn.Module, args: object) -> None:
            handle.remove()
            found.append(model(**batch, adapter_names=ROWS[::-1]).logits)

        handle = model.base_model.model.model.layers[1].register_forward_pre_hook(look)
        assert torch.equal(model(**batch, adapter_names=ROWS).logits, wanted)
    assert torch.equal(found[0], inner)
