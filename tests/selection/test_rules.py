"""Rules, scored by hand; the table of rules, and rules of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from grafts import graft, held
from models import perturbed, tiny_bert
from peft_graft import SelectionError, initialize_graft
from peft_graft.selection.rules import RULES, Evidence, get_rule, register_rule, tensor_generator
from peft_graft.workflows.extract import extract

DELTA = torch.tensor([[2.0, -3.0], [0.0, 1.0]])


def evidence(**changes: object) -> Evidence:
    return Evidence(**{"name": "a.weight", "base": torch.zeros(2, 2), "delta": DELTA, **changes})


def test_magnitude_is_the_absolute_delta() -> None:
    assert RULES["magnitude"].score(evidence()).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("name", ["taylor", "path_taylor"])
def test_taylor_is_the_absolute_product_with_the_gradient(name: str) -> None:
    gradient = torch.tensor([[-1.0, 2.0], [5.0, 0.5]])
    assert RULES[name].score(evidence(measured=gradient)).tolist() == [[2, 6], [0, 0.5]]


def test_fisher_multiplies_the_squared_gradient_by_the_squared_delta() -> None:
    squared = torch.tensor([[1.0, 2.0], [5.0, 0.5]])
    assert RULES["fisher"].score(evidence(measured=squared)).tolist() == [[4, 18], [0, 0.5]]


def test_wanda_multiplies_each_column_by_the_norm_of_its_input() -> None:
    assert RULES["wanda"].score(evidence(measured=torch.tensor([[10.0, 1.0]]))).tolist() == [[20, 3], [0, 1]]


def test_random_depends_on_the_seed_and_the_name_and_on_nothing_else() -> None:
    score = RULES["random"].score
    assert torch.equal(score(evidence(seed=3)), score(evidence(seed=3, delta=-DELTA, base=DELTA)))
    assert not torch.equal(score(evidence(seed=3)), score(evidence(seed=4)))
    assert not torch.equal(score(evidence(seed=3)), score(evidence(seed=3, name="b.weight")))


@pytest.mark.parametrize("seed", [-1, 0, 2**31, 2**32, 2**70])
def test_random_takes_any_seed_and_is_uniform(seed: int) -> None:
    scores = RULES["random"].score(evidence(seed=seed, delta=torch.zeros(20_000)))
    counts = np.histogram(scores.numpy(), bins=10, range=(0, 1))[0]
    assert counts.sum() == 20_000
    assert counts.min() > 1_800 and counts.max() < 2_200


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rule_is_known_by_its_name_and_scores_the_whole_tensor(name: str) -> None:
    rule = get_rule(name)
    assert rule.name == name and rule.help
    scores = rule.score(evidence(measured=torch.ones(2, 2)))
    assert scores.shape == DELTA.shape and scores.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(name for name, rule in RULES.items() if rule.kind == "scored"))
def test_a_data_driven_rule_asks_for_data(name: str) -> None:
    with pytest.raises(SelectionError, match=r"got None for 'a.weight'. Call peft_graft.initialize_graft"):
        RULES[name].score(evidence())


def test_an_unknown_rule_is_refused_with_the_table() -> None:
    with pytest.raises(SelectionError, match=r"selection must be one of \['fisher', .*\], got 'best'"):
        get_rule("best")


def test_rules_say_their_kind() -> None:
    assert {name: (rule.kind, rule.needs_data, rule.trains_mask) for name, rule in RULES.items()} == {
        "random": ("data_free", False, False),
        "magnitude": ("data_free", False, False),
        "taylor": ("scored", True, False),
        "path_taylor": ("scored", True, False),
        "fisher": ("scored", True, False),
        "wanda": ("scored", True, False),
        "learned": ("trained", False, True),
        "sigmoid": ("procedure", True, True),
    }


# Rules of one's own


def relative(evidence: Evidence) -> torch.Tensor:
    return evidence.delta.abs() / (evidence.base.float().abs() + 1e-3)


@pytest.fixture
def own() -> Any:
    """Take the rules away again that a test registers."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("own")
def test_a_rule_of_ones_own_selects_in_memory_and_from_files(tmp_path: Path) -> None:
    assert register_rule("relative", relative, help="|delta| / |base|") is relative
    base = tiny_bert()
    donor = perturbed(base)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    options = {"density": 0.05, "selection": "relative", "task_type": "SEQ_CLS"}
    model = graft(base, donor, **options)
    ours, theirs = dict(base.named_parameters()), dict(donor.named_parameters())
    chosen = held(model)
    scores = {name: relative(Evidence(name, ours[name], theirs[name] - ours[name])).flatten() for name in ours}
    kept = torch.cat([scores[name][sorted(index)] for name, index in chosen.items()])
    dropped = torch.cat(
        [scores[name][[i for i in range(scores[name].numel()) if i not in index]] for name, index in chosen.items()]
    )
    assert kept.min() >= dropped.max()
    assert chosen != held(graft(tiny_bert(), donor, **options | {"selection": "magnitude"}))
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", **options)
    del RULES["relative"]  # who loads the adapter needs no rule
    assert held(PeftModel.from_pretrained(tiny_bert(), tmp_path / "skill")) == chosen


@pytest.mark.usefixtures("own")
def test_a_rule_of_ones_own_may_be_scored_on_data_or_trained() -> None:
    @register_rule("signed", kind="scored", evidence="gradient", help="-g * delta")
    def signed(evidence: Evidence) -> torch.Tensor:
        assert evidence.measured is not None
        return -evidence.measured * evidence.delta

    register_rule("trained_relative", relative, kind="trained", help="a mask among the largest |delta| / |base|")
    base = tiny_bert()
    batch = {"input_ids": torch.randint(5, 40, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    model = graft(base, perturbed(base), density=0.05, selection="signed", task_type="SEQ_CLS")
    assert not held(model)
    initialize_graft(model, [batch], show_progress_bar=False)
    record = model.peft_config["default"].record
    assert sum(map(len, held(model).values())) == record.entries == round(0.05 * record.eligible)
    trained = graft(base, perturbed(base), density=0.05, selection="trained_relative", task_type="SEQ_CLS").train()
    trainable = [parameter for name, parameter in trained.named_parameters() if parameter.requires_grad]
    logits = sum(parameter.numel() for parameter in trainable if parameter.ndim == 1)
    assert logits >= 10 * trained.peft_config["default"].record.entries


@pytest.mark.usefixtures("own")
def test_scores_of_another_shape_are_refused() -> None:
    register_rule("rows", lambda evidence: evidence.delta.abs().sum(-1), help="sums over rows")
    base = tiny_bert()
    with pytest.raises(SelectionError, match=r"one value for each entry, got shape \(.*from the rule 'rows'"):
        graft(base, perturbed(base), density=0.05, selection="rows")


@pytest.mark.usefixtures("own")
def test_a_rule_over_whole_tensors_is_refused_for_files_only(tmp_path: Path) -> None:
    def share(evidence: Evidence) -> torch.Tensor:
        return evidence.delta.abs() / evidence.delta.abs().max().clamp(min=1e-9)

    register_rule("share", share, help="|delta| / max |delta|", blocks="never")
    base = tiny_bert()
    perturbed(base).save_pretrained(tmp_path / "donor")
    base.save_pretrained(tmp_path / "base")
    with pytest.raises(SelectionError, match="one by one to read files in blocks, got 'share'"):
        extract(tmp_path / "base", tmp_path / "donor", tmp_path / "skill", density=0.05, selection="share")
    assert held(graft(base, str(tmp_path / "donor"), density=0.05, selection="share"))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "magnitude"}, "name must be new, got 'magnitude'. To replace that rule, del RULES"),
        ({"name": "two words"}, "name must be a word without spaces, got 'two words'"),
        ({"name": ""}, "name must be a word without spaces, got ''"),
        ({"score": 3}, "score must be a function of Evidence, got int"),
        ({"help": " "}, "help must be one line of text, got ' '"),
        ({"help": "a\nb"}, "help must be one line of text"),
        ({"kind": "weights"}, r"kind must be one of \['data_free', 'scored', 'trained', 'procedure'\], got 'weights'"),
        ({"kind": "scored"}, "evidence of a 'scored' rule must be one of 'gradient', .*, got None"),
        ({"evidence": "gradient"}, "evidence of a 'data_free' rule must be one of None, got 'gradient'"),
        ({"kind": "procedure", "evidence": "gradient"}, "evidence of a 'procedure' rule must be one of 'sigmoid'"),
        ({"blocks": "any"}, "blocks must be one of"),
        ({"name": "a b", "help": "", "kind": "x"}, "name must .* help must .* kind must"),
    ],
)
def test_rules_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"name": "own", "score": relative, "help": "|delta| / |base|"} | changes
    before = dict(RULES)
    with pytest.raises(SelectionError, match=message):
        register_rule(options.pop("name"), options.pop("score"), **options)
    assert before == RULES


def test_the_generator_of_a_tensor_is_what_random_draws_from() -> None:
    alone = RULES["random"].score(evidence(seed=3))
    assert torch.equal(alone, torch.rand(2, 2, generator=tensor_generator("a.weight", 3)))
    assert torch.equal(alone, RULES["random"].score(evidence(seed=3, generator=tensor_generator("a.weight", 3))))
