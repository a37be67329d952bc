"""Completing a graft on data: which batches do what, and what is left behind."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy

from batches import Batch, examples, loss_of, measured, regression, squared_error
from grafts import FAMILIES, MLP, TASKS, assert_same, graft, held, parameters
from models import inputs, perturbed, tiny_bert
from peft_graft import GraftConfig, SelectionError, fit_alpha, initialize_graft
from peft_graft.selection.rules import RULES
from peft_graft.selection.topk import top_k_mask
from peft_graft.training.alpha import AlphaFit

SCORED = sorted(name for name, rule in RULES.items() if rule.kind == "scored")


def test_no_batches_are_refused() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha="auto")
    for call in (
        lambda: fit_alpha(model, []),
        lambda: initialize_graft(model, []),
        lambda: initialize_graft(model, regression(), calibration=[]),
    ):
        with pytest.raises(ValueError, match="dataloader must hold at least one batch, got none"):
            call()


@pytest.mark.parametrize("call", [fit_alpha, initialize_graft])
def test_a_merged_or_an_inactive_adapter_is_refused(call: Callable[..., object]) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, alpha="auto")
    model.add_adapter("second", GraftConfig(donor=perturbed(base), density=0.3, alpha="auto"))
    with pytest.raises(ValueError, match=r"an active adapter, got 'second' while \['default'\] are active"):
        call(model, regression(), adapter_name="second", loss_fn=squared_error, show_progress_bar=False)
    model.peft_config["default"].alpha, model.base_model.states["default"].ready = 1.0, True
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"must be unmerged, got a merged one. Call model.unmerge_adapter\(\)"):
        call(model, regression(), loss_fn=squared_error, show_progress_bar=False)


@pytest.mark.parametrize("options", [{"selection": "path_taylor"}, {"alpha": "auto"}], ids=str)
def test_a_graft_that_waits_for_data_is_not_merged(options: dict[str, Any]) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, **options)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"graft must be complete before it is merged.*initialize_graft"):
            merge()
    assert_same(parameters(model.unload()), parameters(base))


def test_running_before_the_data_came_warns_once() -> None:
    base, x = MLP(), torch.ones(2, 4)
    model = graft(base, perturbed(base), density=0.3, selection="path_taylor")
    with pytest.warns(UserWarning, match="'default' has no patch yet.*'path_taylor' waits for data. Call peft"):
        assert torch.equal(model(x), base(x))
    model(x)
    initialize_graft(model, regression(), loss_fn=squared_error, show_progress_bar=False)
    assert not torch.equal(model(x), base(x))


@pytest.mark.parametrize("call", [fit_alpha, initialize_graft])
def test_a_model_without_a_graft_is_refused(call: Callable[..., object]) -> None:
    with pytest.raises(ValueError, match="model must contain a graft, got MLP"):
        call(MLP(), regression())
    with pytest.raises(ValueError, match="model must contain a graft, got PeftModel"):
        call(get_peft_model(MLP(), LoraConfig(target_modules=["first"])), regression())


def spied(selection: str, count: int, **options: Any) -> tuple[set[int], set[int], AlphaFit | None]:
    """Numbers of the batches that were seen with gradients (scores) and without (alpha, validation)."""
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection=selection, **options.pop("config", {"alpha": "auto"}))
    batches = [batch | {"number": torch.tensor(i)} for i, batch in enumerate(regression(count))]
    scored, looked = set(), set()

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        (scored if torch.is_grad_enabled() else looked).add(int(batch["number"]))
        return squared_error(model, batch)

    if options.pop("calibrate", False):
        options["calibration"] = [batch | {"number": torch.tensor(100)} for batch in regression(1)]
    fit = initialize_graft(model, batches, loss_fn=loss_fn, show_progress_bar=False, **options)
    return scored, looked, fit


@pytest.mark.parametrize("selection", ["fisher", "sigmoid"])
def test_every_fourth_batch_is_held_out_from_the_mask(selection: str) -> None:
    assert spied(selection, 9, steps=1)[:2] == ({0, 1, 2, 4, 5, 6, 8}, {3, 7})
    assert spied(selection, 3, steps=1)[:2] == ({0, 1}, {2})


@pytest.mark.parametrize("selection", ["magnitude", "learned"])
def test_a_mask_made_without_data_leaves_all_of_it_to_alpha(selection: str) -> None:
    assert spied(selection, 5)[:2] == (set(), {0, 1, 2, 3, 4})


def test_calibration_data_leaves_all_else_to_the_mask() -> None:
    assert spied("fisher", 4, calibrate=True)[:2] == ({0, 1, 2, 3}, {100})


def test_without_alpha_to_fit_nothing_is_held_out() -> None:
    assert spied("fisher", 4, config={"alpha": 2.0}) == ({0, 1, 2, 3}, set(), None)
    assert spied("magnitude", 4, config={"alpha": 2.0}) == (set(), set(), None)


def test_the_same_batch_twice_is_two_batches() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, selection="fisher", alpha="auto")
    fit = initialize_graft(model, regression(1) * 4, loss_fn=squared_error, show_progress_bar=False)
    assert fit is not None and held(model)


@pytest.mark.parametrize("selection", ["fisher", "sigmoid"])
def test_one_batch_cannot_do_both(selection: str) -> None:
    with pytest.raises(ValueError, match="at least 2 batches to hold one out for alpha, got 1"):
        spied(selection, 1)


SCORES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "taylor": lambda delta, evidence: (delta * evidence).abs(),
    "path_taylor": lambda delta, evidence: (delta * evidence).abs(),
    "fisher": lambda delta, evidence: delta**2 * evidence,
    "wanda": lambda delta, evidence: delta.abs() * evidence,
}


@pytest.mark.parametrize("selection", SCORED)
def test_a_data_driven_mask_is_the_dense_top_k_of_its_scores(selection: str) -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    evidence = measured(base, donor, str(RULES[selection].evidence), examples())
    names = sorted(evidence)
    scores = [
        SCORES[selection]((donor.get_parameter(name) - base.get_parameter(name)).detach(), evidence[name]).flatten()
        for name in names
    ]
    model = graft(base, donor, num_params=11, selection=selection)
    assert held(model) == {}
    assert initialize_graft(model, examples(), loss_fn=loss_of, show_progress_bar=False) is None
    masks = top_k_mask(torch.cat(scores), 11).split([len(part) for part in scores])
    wanted = {name: mask.nonzero().flatten().tolist() for name, mask in zip(names, masks, strict=True) if mask.any()}
    assert held(model) == wanted


@pytest.mark.parametrize("selection", [*SCORED, "sigmoid"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_scoring_leaves_the_base_as_it_was(family: str, selection: str) -> None:
    base = FAMILIES[family](torch.bfloat16)
    model = graft(base, perturbed(base), density=0.02, selection=selection, task_type=TASKS[family])
    model.train()
    model.base_model.model.get_input_embeddings().eval()
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: p.requires_grad for name, p in model.named_parameters()}
    initialize_graft(model, [inputs(base, seed=seed) for seed in range(2)], show_progress_bar=False, steps=1)
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == gradients
    assert all(p.grad is None for p in model.parameters())
    assert not any(layer.disable_adapters for layer in model.base_model._layers())
    config = model.peft_config["default"]
    assert config.record.entries == round(0.02 * config.record.eligible) == sum(map(len, held(model).values()))
    head = {name for name, _ in base.named_parameters() if "classifier" in name}
    plain = parameters(model.unload())
    assert_same(*({n: v for n, v in each.items() if n not in head} for each in (plain, parameters(base))))


def test_another_active_adapter_does_not_count() -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    alone = graft(base, donor, num_params=9, selection="fisher")
    initialize_graft(alone, examples(), loss_fn=loss_of, show_progress_bar=False)
    model = graft(base, perturbed(base, seed=8), density=0.5, adapter_name="other")
    model.add_adapter("default", GraftConfig(donor=donor, num_params=9, selection="fisher"))
    model.base_model.set_adapter(["other", "default"])
    initialize_graft(model, examples(), loss_fn=loss_of, show_progress_bar=False)
    assert held(model) == held(alone)


def test_a_batch_without_labels_is_refused() -> None:
    base = tiny_bert()
    batch = {key: value for key, value in inputs(base).items() if key != "labels"}
    model = graft(base, perturbed(base), density=0.1, selection="taylor")
    with pytest.raises(ValueError, match=r"return a loss, got keys \['attention_mask', 'input_ids'\]. Include labels"):
        initialize_graft(model, [batch], show_progress_bar=False)


def test_a_loss_that_is_not_a_number_is_refused() -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.5, selection="taylor")
    with pytest.raises(SelectionError, match="scores must not be NaN, got NaN in 'first.bias'"):
        initialize_graft(model, examples(), loss_fn=lambda m, b: loss_of(m, b) * float("nan"), show_progress_bar=False)


def test_a_data_loader_of_named_tuples_will_do() -> None:
    pair = namedtuple("pair", ["x", "y"])
    base = MLP()
    rows = [pair(batch["x"][0], batch["y"][0]) for batch in examples((1,) * 6)]
    model = graft(base, perturbed(base), density=0.5, selection="fisher", alpha="auto")
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    fit = initialize_graft(model, loader, loss_fn=lambda m, b: cross_entropy(m(b.x), b.y), show_progress_bar=False)
    assert fit is not None and held(model)


def test_progress_bars_can_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    model = graft(MLP(), perturbed(MLP()), density=0.5, selection="path_taylor", alpha="auto")
    initialize_graft(model, examples(), loss_fn=loss_of, show_progress_bar=True)
    shown = capsys.readouterr().err
    assert all(text in shown for text in ("gradient along the path", "reading MLP", "fitting alpha"))
