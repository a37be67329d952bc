"""GraftConfig: every field is checked at once, and a config survives JSON, copying and saving."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel

from grafts import MLP, graft, held, output, same_bits
from models import perturbed, tiny_bert
from peft_graft import RULES, DonorError, GraftConfig, PatchError
from peft_graft.checkpoints.pairing import ModuleDonor
from peft_graft.selection.rules import Rule, magnitude
from peft_graft.tuner.config import GraftRecord


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, r"density must be in \(0, 1\], got 0\."),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1\.5"),
        ({"density": True}, r"density must be in \(0, 1\], got True"),
        ({"density": float("nan")}, r"density must be in \(0, 1\], got nan"),
        ({"num_params": 0}, "num_params must be an integer >= 1, got 0"),
        ({"num_params": 2.5}, r"num_params must be an integer >= 1, got 2\.5"),
        ({"density": 0.1, "num_params": 5}, r"density and num_params must not both be given, got 0\.1 and 5"),
        ({"donor": 3}, "donor must be a directory, a Hub id, a module or 'zeros', got 3"),
        ({"selection": "best"}, r"selection must be one of \['fisher'.*got 'best'"),
        ({"target_parameters": "a.weight"}, "target_parameters must be a list of names, got 'a.weight'"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
        ({"budget_scope": "layer"}, r"budget_scope must be one of \['global', 'tensor'\], got 'layer'"),
        (
            {"budget_scope": "tensor", "num_params": 5},
            "budget_scope must be 'global' with num_params or a coarser granularity",
        ),
        (
            {"budget_scope": "tensor", "granularity": "layer"},
            "budget_scope must be 'global' with num_params or a coarser granularity",
        ),
        (
            {"budget_scope": "tensor", "selection": "sigmoid"},
            "budget_scope must be 'global' with selection='sigmoid'",
        ),
        ({"granularity": "row"}, r"granularity must be one of \['entry', 'tensor', 'layer'\], got 'row'"),
        ({"granularity": "layer", "selection": "learned"}, "granularity must be 'entry' with selection='learned'"),
        ({"granularity": "tensor", "selection": "sigmoid"}, "granularity must be 'entry' with selection='sigmoid'"),
        ({"candidate_ratio": 0.5}, r"candidate_ratio must be a number >= 1, got 0\.5"),
        ({"alpha": "best"}, "alpha must be a finite number, numbers by tensor name, 'auto' or 'norm', got 'best'"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"alpha": {"a": "b"}}, "alpha must be a finite number"),
        ({"alpha_scope": "layer"}, r"alpha_scope must be one of \['global', 'tensor'\], got 'layer'"),
        ({"seed": 1.5}, r"seed must be an integer, got 1\.5"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GraftConfig(**options)


def test_all_offenders_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"density .*candidate_ratio .*seed "):
        GraftConfig(density=2, candidate_ratio=0, seed="x")


def test_the_type_is_graft() -> None:
    assert GraftConfig().peft_type.value == "GRAFT"


@pytest.mark.parametrize("selection", sorted(RULES))
def test_who_needs_data_says_so(selection: str) -> None:
    free = {"magnitude", "random", "learned"}
    assert GraftConfig(selection=selection).needs_data is (selection not in free)
    assert GraftConfig(selection=selection, alpha="auto").needs_data is True


@pytest.mark.feature("PeftConfig: from_pretrained, save_pretrained, deepcopy, pickle")
def test_a_config_survives_saving(tmp_path: Path) -> None:
    config = GraftConfig(
        donor="org/donor",
        donor_revision="main",
        num_params=7,
        selection="learned",
        alpha={"a.weight": 2.0, "b.bias": -1.0},
        target_modules=["query", "dense"],
        exclude_modules=["pooler"],
        layers_to_transform=[0, 1],
        candidate_ratio=3,
        seed=5,
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is GraftConfig
    assert loaded.to_dict() == config.to_dict() | {"peft_version": loaded.peft_version}
    assert loaded.target_modules == {"query", "dense"}


def test_who_loads_a_patch_need_not_know_its_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "own", Rule("own", magnitude, "somebody's rule"))
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.1, selection="own")
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(RULES, "own")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert held(loaded) == held(model)
    assert loaded.peft_config["default"].selection == "own" and not loaded.peft_config["default"].needs_data


def test_the_json_is_the_same_for_every_order_of_the_names(tmp_path: Path) -> None:
    for name, modules in (("one", ["b", "a", "c"]), ("two", ["c", "b", "a"])):
        GraftConfig(target_modules=modules, exclude_modules=modules).save_pretrained(tmp_path / name)
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1] and json.loads(texts[0])["target_modules"] == ["a", "b", "c"]


@pytest.mark.parametrize("donor", [None, "zeros", "org/donor", Path("some/where")], ids=str)
def test_a_donor_by_name_is_recorded(donor: object) -> None:
    assert GraftConfig(donor=donor).to_dict()["donor"] == (None if donor is None else str(donor))


def test_a_donor_in_memory_is_recorded_by_its_name() -> None:
    donor = perturbed(tiny_bert())
    config = GraftConfig(donor=donor)
    assert config.to_dict()["donor"] == "BertForSequenceClassification"
    assert GraftConfig(donor=ModuleDonor(donor)).to_dict()["donor"] == "BertForSequenceClassification"
    assert config.donor is donor
    json.dumps(config.to_dict())


def test_something_like_a_donor_is_refused_when_it_is_opened() -> None:
    config = GraftConfig(donor={"a": 1})
    with pytest.raises(DonorError, match="got dict"):
        config.to_dict()


@pytest.mark.feature("PeftConfig: from_pretrained, save_pretrained, deepcopy, pickle")
@pytest.mark.parametrize("how", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_config_can_be_copied(how: object) -> None:
    config = GraftConfig(donor="zeros", density=0.1, target_modules=["a"])
    assert how(config) == config


# Recorded results, and files of 0.1.0

OLD = Path(__file__).parents[1] / "data" / "adapter_0_1_0"  # a grafted MLP, as peft-graft 0.1.0 has saved it


def ramp(step: float) -> MLP:
    """The base (step 0) and the donor (step 0.25) of this adapter: values that need no random numbers."""
    model = MLP()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel()).remainder(7) - 3) * 0.125 + number * step
            parameter.copy_(values.view_as(parameter))
    return model


def test_an_adapter_of_0_1_0_is_read(tmp_path: Path) -> None:
    loaded = PeftModel.from_pretrained(ramp(0.0), OLD)
    config = loaded.peft_config["default"]
    assert (config.budget_scope, config.candidate_ratio, config.alpha) == ("tensor", 4.0, 2.0)
    assert (config.record.eligible, config.record.entries) == (63, 17) and config.is_pretrained
    assert config.record.provenance["versions"]["peft-graft"] == "0.1.0"
    made = graft(ramp(0.0), ramp(0.25), density=0.25, budget_scope="tensor", alpha=2.0)
    x = torch.linspace(-1, 1, 8).view(2, 4)
    taken = held(loaded)  # with entries that do not differ, which 0.1.0 took too
    assert all({*indices} <= {*taken[name]} for name, indices in held(made).items())
    assert same_bits(output(loaded, x), output(made, x))
    with pytest.raises(PatchError, match="base"):
        PeftModel.from_pretrained(ramp(1.0), OLD)
    loaded.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["record"]["entries"] == 17 and not {"scope", "candidates", "entries"} & fields.keys()


@pytest.mark.parametrize("read", [GraftConfig.from_pretrained, PeftConfig.from_pretrained], ids=["own", "peft"])
def test_the_fields_of_0_1_0_are_read_as_those_of_today(read: Callable[[Path], GraftConfig], tmp_path: Path) -> None:
    today = GraftConfig(density=0.1, budget_scope="tensor", candidate_ratio=3.0, record=GraftRecord(entries=5))
    old = today.to_dict() | {"scope": "tensor", "candidates": 3.0, "peft_type": "GRAFT"} | today.to_dict()["record"]
    for name in ("budget_scope", "candidate_ratio", "record", "hub_ids", "base_subfolder"):
        del old[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    assert read(tmp_path) == today


def test_the_old_names_are_no_arguments() -> None:
    for name in ("scope", "candidates", "entries"):
        with pytest.raises(TypeError, match=name):
            GraftConfig(**{name: 1})


def test_results_are_recorded_in_one_block() -> None:
    config = GraftConfig(density=0.1)
    assert config.record is None and not config.is_pretrained
    config.note(eligible=10)
    config.note(fingerprint={"count": 1})
    assert config.record == GraftRecord(eligible=10, fingerprint={"count": 1}) and config.is_pretrained
    again = GraftConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    later = config.to_dict() | {"record": config.to_dict()["record"] | {"a result of a later version": 1}}
    assert GraftConfig(**later) == config
