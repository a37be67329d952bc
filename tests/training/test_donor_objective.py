"""The donor's outputs as the objective: computed in the base itself, kept by row, and what is fitted to them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import Trainer

from grafts import FAMILIES, TASKS, assert_same, graft, same_bits
from learning import BASE, DONOR, Rows, trainer
from models import inputs, perturbed, tiny_bert, tiny_llama
from peft_graft import (
    DonorError,
    DonorObjectiveMixin,
    DonorOutputs,
    donor_loss,
    fit_alpha,
    initialize_graft,
    store_donor_outputs,
    use_donor_outputs,
)
from peft_graft.training.donor_objective import divergence, donor_in_place
from peft_graft.training.donor_outputs import Distributions

QUIET: dict[str, Any] = {"show_progress_bar": False}


class GraftTrainer(DonorObjectiveMixin, Trainer):
    """Any Trainer."""


def unlabelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def batches(count: int = 16, size: int = 4) -> list[dict[str, torch.Tensor]]:
    whole = unlabelled(Rows(count).batch)
    return [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, count, size)]


def follower(base: nn.Module = BASE, donor: Any = DONOR, **options: Any) -> nn.Module:
    return graft(base, donor, **({"density": 0.02, "task_type": "SEQ_CLS", "objective": "donor"} | options))


def exact_kl(donor: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor]) -> float:
    """Mean over rows, from the two models side by side."""
    with torch.no_grad():
        theirs, ours = (each.eval()(**unlabelled(batch)).logits.log_softmax(-1) for each in (donor, model))
    return float(kl_div(ours, theirs, reduction="batchmean", log_target=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_is_the_donor_for_a_while_and_itself_afterwards(family: str) -> None:
    base = FAMILIES[family]()
    donor, batch = perturbed(base), inputs(base)
    model = graft(base, donor, density=0.1, task_type=TASKS[family], alpha=3.0).train()
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    with donor_in_place(model, model.base_model, "default"), torch.no_grad():
        assert torch.equal(model(**batch).logits, donor(**batch).logits)
    assert_same(before, model.state_dict())
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(KeyboardInterrupt), donor_in_place(model, model.base_model, "default"):
        raise KeyboardInterrupt
    assert_same(before, model.state_dict())


def test_the_donors_head_is_used_whoever_has_it() -> None:
    """Also where PEFT keeps the donor's head in a copy, and where only the donor's head differs."""
    donor = copy.deepcopy(BASE)
    donor.classifier.weight.data.mul_(2)
    donor.bert.encoder.layer[0].output.dense.weight.data.mul_(1.1)
    for options in ({}, {"task_type": None}):
        model = follower(donor=donor, **options)
        outputs = store_donor_outputs(model, batches(), **QUIET)
        assert len(outputs) == 16
        with torch.no_grad():
            wanted = donor(**batches()[0]).logits.log_softmax(-1)
        loss = donor_loss(model.eval(), batches()[0])
        assert loss.item() == pytest.approx(exact_kl(donor, model, batches()[0]), rel=1e-4)
        assert same_bits(store_donor_outputs(model, batches(), **QUIET)._chunks[0].log_probs, wanted)


def test_a_graft_of_everything_has_no_loss_and_other_paddings_are_the_same_rows() -> None:
    model = follower(density=1.0, target_modules="all")
    store_donor_outputs(model, batches(), **QUIET)
    generator = torch.Generator().manual_seed(0)
    whole = unlabelled(Rows(16).batch)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    mixed = {name: value[torch.randperm(16, generator=generator)[:5]] for name, value in whole.items()}
    fresh = follower()
    store_donor_outputs(fresh, [whole], **QUIET)
    padded = {name: nn.functional.pad(value, (0, 3)) for name, value in whole.items()}
    assert donor_loss(model.eval(), {"input_ids": whole["input_ids"]}).item() == pytest.approx(0, abs=1e-6)
    assert donor_loss(fresh.eval(), padded).item() == pytest.approx(exact_kl(DONOR, fresh, whole), rel=1e-4)
    assert len(store_donor_outputs(fresh, [padded, mixed], **QUIET)) == 16
    with pytest.raises(ValueError, match="rows must be among those that the donor has seen, got 16 of 16"):
        changed = {**whole, "input_ids": whole["input_ids"].flip(1)}
        donor_loss(fresh, changed)


@pytest.mark.parametrize("selection", ["magnitude", "path_taylor", "fisher", "wanda", "sigmoid"])
def test_scored_rules_and_alpha_need_no_labels(selection: str) -> None:
    model = follower(density=0.05, selection=selection, alpha="auto")
    fit = initialize_graft(model, batches(), steps=2, calibration=batches(8), **QUIET)
    whole = {name: torch.cat([batch[name] for batch in batches(8)]) for name in batches()[0]}
    assert fit.loss == pytest.approx(exact_kl(DONOR, model, whole), rel=1e-3)
    assert fit.loss < exact_kl(DONOR, BASE, whole)
    again = fit_alpha(model, batches(8), **QUIET)
    assert again.loss <= fit.loss * (1 + 1e-6)


def test_any_trainer_learns_from_the_donor_in_any_order(tmp_path: Path) -> None:
    model = follower(selection="learned", alpha=2.0, density=0.05)
    before = exact_kl(DONOR, model, Rows().batch)
    run = GraftTrainer(model, trainer(model, tmp_path, steps=12).args, train_dataset=Rows(), eval_dataset=Rows(8))
    run.train()
    kept = model.base_model.states["default"].donor_outputs
    assert len(kept) == 16 and exact_kl(DONOR, model, Rows().batch) < before
    assert run.evaluate()["eval_loss"] == pytest.approx(exact_kl(DONOR, model, Rows(8).batch), rel=1e-4)
    assert len(kept) == 16  # rows of the training: the donor is not asked again


def conversation(lengths: tuple[int, ...] = (9, 6, 12), prompt: int = 3) -> dict[str, torch.Tensor]:
    """Token ids with padding to the right, and labels on the completions only."""
    generator, longest = torch.Generator().manual_seed(4), max(lengths)
    ids = torch.randint(1, 60, (len(lengths), longest), generator=generator)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask | (torch.arange(longest) < prompt), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def token_kl(donor: nn.Module, model: nn.Module, batch: dict[str, torch.Tensor], counted: torch.Tensor) -> float:
    """Mean over the counted positions of the exact KL, from the two models side by side."""
    with torch.no_grad():
        theirs, ours = (each.eval()(**unlabelled(batch)).logits.log_softmax(-1) for each in (donor, model))
    return float(kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)[counted].mean())


@pytest.mark.parametrize(("tokens", "labelled"), [("completion", True), ("all", True), ("completion", False)])
def test_completions_count_unless_said_otherwise(tokens: Any, labelled: bool) -> None:
    base = tiny_llama()
    donor, batch = perturbed(base, 0.3), conversation()
    model = follower(base, donor, task_type="CAUSAL_LM", alpha=0.5)
    given = batch if labelled else unlabelled(batch)
    store_donor_outputs(model, [given], tokens=tokens, **QUIET)
    target = batch["labels"] != -100 if tokens == "completion" and labelled else batch["attention_mask"].bool()
    counted = torch.cat([target[:, 1:], torch.zeros(3, 1, dtype=torch.bool)], 1)
    assert donor_loss(model, given).item() == pytest.approx(token_kl(donor, model, batch, counted), rel=1e-4)
    left = {name: value.flip(1) for name, value in given.items()}  # not the same rows
    with pytest.raises(ValueError, match="rows must be among those that the donor has seen"):
        donor_loss(model, left)


@pytest.mark.parametrize("top_k", [1, 8, 63, 64])
def test_a_truncated_vocabulary_gives_a_lower_bound_with_its_own_minimum(top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (torch.randn(5, 64, generator=generator) * 3 for _ in range(2))
    kept = Distributions.of(theirs, top_k)
    exact = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    logits = ours.clone().requires_grad_()
    found = divergence(kept, logits)
    assert (found <= exact + 1e-5).all() and (found > 0).all()
    assert top_k < 63 or torch.allclose(found, exact, atol=1e-5)
    assert divergence(kept, theirs).abs().max() < 1e-5
    wanted = torch.autograd.functional.jacobian(lambda x: _by_hand(kept, x).sum(), ours)
    assert torch.allclose(torch.autograd.grad(found.sum(), logits)[0], wanted, atol=1e-5)


def _by_hand(kept: Distributions, logits: torch.Tensor) -> torch.Tensor:
    """KL over the classes "each of the kept" and "any other", with probabilities instead of logarithms."""
    q = logits.double().softmax(-1)
    p = kept.log_probs.double().exp()
    if kept.ids is None:
        return (p * (p / q).log()).sum(-1)
    q_kept = q.gather(-1, kept.ids.long())
    p_rest, q_rest = 1 - p.sum(-1), 1 - q_kept.sum(-1)
    return (p * (p / q_kept).log()).sum(-1) + p_rest * (p_rest / q_rest).log()


def test_outputs_in_files_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_graft.training.donor_outputs._FILE_BYTES", 500)
    base = tiny_llama()
    donor = perturbed(base, 0.3)
    rows = [conversation(), conversation((5, 7)), conversation((8,))]
    losses = []
    for options in ({}, {"output_dir": tmp_path / "one"}):
        model = follower(base, donor, task_type="CAUSAL_LM")
        kept = store_donor_outputs(model, rows, top_k=4, **options, **QUIET)
        losses.append([donor_loss(model, batch).item() for batch in reversed(rows)])
    kept.save(tmp_path / "two")
    assert len(list((tmp_path / "one").iterdir())) > 1
    for name in ("one", "two"):
        fresh = follower(base, donor, task_type="CAUSAL_LM")
        fresh.base_model.donors.clear()
        use_donor_outputs(fresh, tmp_path / name)
        losses.append([donor_loss(fresh, batch).item() for batch in reversed(rows)])
    assert all(each == losses[0] for each in losses)
    with pytest.raises(FileExistsError, match="output_dir must not exist yet"):
        kept.save(tmp_path / "two")
    with pytest.raises(ValueError, match="top_k and tokens must be those of the outputs that are kept, 4 and"):
        store_donor_outputs(fresh, rows, top_k=5, **QUIET)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    model = follower()
    store_donor_outputs(model, batches(), output_dir=tmp_path / "made", **QUIET)
    (file,) = (tmp_path / "made").iterdir()
    content = file.read_bytes()
    for damaged in (content[:-9], content.replace(b"peft_graft.donor_outputs", b"peft_graft.donor_output5")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="donor outputs must be whole"):
            DonorOutputs.open(tmp_path / "made")
    with pytest.raises(ValueError, match="path must be a directory of donor outputs"):
        DonorOutputs.open(tmp_path)


def test_a_mixture_weighs_donor_and_labels() -> None:
    losses = {}
    for weight in (0.0, 0.25, 1.0):
        model = follower(donor_weight=weight).eval()
        store_donor_outputs(model, batches(), **QUIET)
        losses[weight] = donor_loss(model, Rows(16).batch).item()
    assert losses[0.0] == pytest.approx(model(**Rows(16).batch).loss.item())
    assert losses[0.25] == pytest.approx(0.25 * losses[1.0] + 0.75 * losses[0.0], rel=1e-5)
    with pytest.raises(ValueError, match="batch must make the model return a loss"):
        model.peft_config["default"].donor_weight = 0.5
        donor_loss(model, batches()[0])


def test_encoder_decoders_learn_from_the_donor() -> None:
    base = FAMILIES["t5"]()
    donor = perturbed(base, 0.3)
    model = follower(base, donor, task_type="SEQ_2_SEQ_LM")
    batch = {**conversation(), "labels": conversation((4, 6, 5), 0)["labels"]}
    store_donor_outputs(model, [batch], **QUIET)
    with torch.no_grad():
        theirs, ours = (each.eval()(**batch).logits.log_softmax(-1) for each in (donor, model))
    wanted = kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)[batch["labels"] != -100].mean()
    wider = {name: nn.functional.pad(value, (0, 2), value=-100 * (name == "labels")) for name, value in batch.items()}
    for each in (batch, wider):
        assert donor_loss(model, each).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_what_has_no_outputs_is_refused() -> None:
    with pytest.raises(DonorError, match="must have a donor with outputs, got zeros"):
        store_donor_outputs(follower(donor="zeros"), batches(), **QUIET)
    with pytest.raises(DonorError, match=r"got 'BertModel' without classifier.weight, classifier.bias of the base's"):
        store_donor_outputs(follower(donor=DONOR.bert), batches(), **QUIET)
    saved = follower()
    saved.base_model.donors.clear()
    with pytest.raises(DonorError, match="got none: a saved adapter does not need it any more"):
        store_donor_outputs(saved, batches(), **QUIET)
    one = tiny_bert(num_labels=1)
    with pytest.raises(ValueError, match=r"outputs must be logits of two or more classes, .*got shape \(4, 1\)"):
        store_donor_outputs(follower(one, perturbed(one)), batches(), **QUIET)
    with pytest.raises(ValueError, match="donor's outputs must be stored before"):
        donor_loss(follower(), batches()[0])
    with pytest.raises(ValueError, match="batch must be a mapping of tensors"):
        store_donor_outputs(follower(), [(batches()[0]["input_ids"],)], **QUIET)
    model = follower()
    with model.base_model.applied(), pytest.raises(ValueError, match="base must hold its own values"):
        store_donor_outputs(model, batches(), **QUIET)


@pytest.mark.parametrize(("field", "value"), [("objective", "teacher"), ("donor_weight", 1.5), ("donor_weight", None)])
def test_fields_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} must be "):
        follower(**{field: value})
