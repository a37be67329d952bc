"""Several grafts in one base: adding, switching, both at once, deleting, and errors on the way."""

from __future__ import annotations

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from grafts import MLP, assert_same, graft, held, output, parameters, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_vit
from peft_graft import DonorError, GraftConfig, PatchError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def donors(base: nn.Module, count: int = 3) -> list[nn.Module]:
    return [perturbed(base, scale=0.3, seed=10 + i) for i in range(count)]


def several(base: nn.Module, count: int = 3, **options: object) -> PeftModel:
    """Grafts "x", "y", ... of different donors, the first one active."""
    first, *rest = donors(base, count)
    model = graft(base, first, adapter_name="x", **options)
    for name, donor in zip("yzuvw", rest, strict=False):
        model.add_adapter(name, GraftConfig(donor=donor, **options))
    return model


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
@pytest.mark.parametrize("make", [tiny_bert, tiny_gpt2, tiny_vit], ids=["bert", "gpt2", "vit"])
def test_each_adapter_alone_is_as_if_it_were_alone(make: object) -> None:
    base, batch = make(), inputs(make())
    model = several(base, density=0.1, target_modules="all")
    for name, donor in zip("xyz", donors(base), strict=True):
        model.set_adapter(name)
        wanted = graft(base, donor, density=0.1, target_modules="all")
        assert same_bits(output(model, batch), output(wanted, batch))
        assert held(model, name) == held(wanted)
        model.merge_adapter()
        assert same_bits(output(model, batch), output(wanted, batch))
        model.unmerge_adapter()
    assert_same(parameters(model.unload()), parameters(base))


@pytest.mark.feature("several adapters of different targets")
def test_adapters_with_other_targets_stand_side_by_side() -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=1.0, target_modules=["first"])
    model.add_adapter("y", GraftConfig(donor=two, density=1.0, target_modules=["second", "norm"]))
    assert same_bits(output(model, X), output(graft(base, one, density=1.0, target_modules=["first"]), X))
    model.base_model.set_adapter(["x", "y"])
    both = copy.deepcopy(two)
    both.first = one.first
    assert same_bits(output(model, X), output(both, X))


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
@pytest.mark.feature("requires_grad of several adapters")
def test_adding_an_adapter_does_not_activate_it_or_change_the_active_one() -> None:
    base = MLP()
    model = graft(base, donors(base)[0], adapter_name="x", density=0.5, selection="learned")
    before = output(model, X)
    model.add_adapter("y", GraftConfig(donor=donors(base)[1], density=0.5, selection="learned", inference_mode=True))
    assert same_bits(output(model, X), before)
    trained = {name.split(".graft_patch.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"x"}
    model.set_adapter("y")
    trained = {name.split(".graft_patch.")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"y"}


@pytest.mark.feature("several adapters active at once", "works: the mean where they meet")
def test_both_at_once_give_the_mean_where_they_meet() -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = several(base, density=0.5, count=2)
    first, second = held(model, "x"), held(model, "y")
    model.base_model.set_adapter(["x", "y"])
    merged = copy.deepcopy(model).merge_and_unload()
    conflicts = 0
    for name, value in base.named_parameters():
        wanted = value.detach().clone().view(-1)
        for index in range(value.numel()):
            values = [
                donor.get_parameter(name).detach().view(-1)[index]
                for donor, patch in ((one, first), (two, second))
                if index in patch.get(name, [])
            ]
            if values:
                conflicts += len(values) == 2
                wanted[index] = torch.stack(values).double().mean().float()
        assert same_bits(merged.get_parameter(name).detach().view(-1), wanted)
    assert conflicts
    assert same_bits(output(model, X), output(merged, X))


@pytest.mark.feature("several adapters active at once")
@pytest.mark.feature("active adapters and their order")
def test_the_order_of_adapters_does_not_matter() -> None:
    base = MLP()
    model = several(base, density=0.7)
    outputs, weights = [], []
    for order in permutations("xyz"):
        model.base_model.set_adapter(list(order))
        outputs.append(output(model, X))
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=list(order))
        weights.append(parameters(merged))
        model.merge_adapter(adapter_names=list(order))
        assert same_bits(output(model, X), outputs[0])
        model.unmerge_adapter()
    assert all(same_bits(other, outputs[0]) for other in outputs)
    for other in weights:
        assert_same(other, weights[0])


def test_the_mean_of_three_does_not_depend_on_rounding() -> None:
    base = nn.Sequential(nn.Linear(1, 1, bias=False))
    values = {"x": 1e20, "y": -1e20, "z": 1.0}  # 0 or 1/3, as the sum begins with "z" or ends with it
    model = None
    for name, value in values.items():
        donor = copy.deepcopy(base)
        nn.init.constant_(donor[0].weight, value)
        if model is None:
            model = graft(base, donor, adapter_name=name, density=1.0)
        else:
            model.add_adapter(name, GraftConfig(donor=donor, density=1.0))
    found = set()
    for order in permutations(values):
        model.base_model.set_adapter(list(order))
        found.add(model.base_model.model[0].weight.item())
    assert len(found) == 1


@pytest.mark.feature("several adapters active at once")
@pytest.mark.feature("merge_adapter, unmerge_adapter, safe_merge")
def test_merging_one_after_the_other_is_merging_both() -> None:
    base = MLP()
    model = several(base, density=0.7, count=2)
    model.base_model.set_adapter(["x", "y"])
    together = output(model, X)
    model.merge_adapter(["y"])
    with pytest.warns(UserWarning, match="additionally merging x"):
        model.merge_adapter(["x", "y"])
    assert same_bits(output(model, X), together)
    model.unmerge_adapter()
    assert same_bits(output(model, X), together)
    assert_same(parameters(model.unload()), parameters(base))


def test_two_adapters_with_the_same_values_are_that_adapter() -> None:
    base = MLP()
    donor = donors(base)[0]
    model = graft(base, donor, adapter_name="x", density=0.5)
    alone = output(model, X)
    for name in "yz":
        model.add_adapter(name, GraftConfig(donor=donor, density=0.5))
    model.base_model.set_adapter(["x", "y", "z"])
    assert same_bits(output(model, X), alone)


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_a_mask_in_training_beside_another_adapter_is_as_in_evaluation(density: float) -> None:
    base = MLP()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=density)
    model.add_adapter("y", GraftConfig(donor=two, density=0.2, selection="learned", candidate_ratio=4))
    model.base_model.set_adapter(["x", "y"])
    with torch.no_grad():
        for value in model.base_model.states["y"].logits().values():
            value.uniform_(-1, 1)
        assert torch.equal(model.train()(X), model.eval()(X))


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
def test_deleting_an_adapter_leaves_the_others() -> None:
    base = MLP()
    model = several(base, density=0.5)
    model.set_adapter("y")
    wanted = output(model, X)
    model.delete_adapter("x")
    assert same_bits(output(model, X), wanted)
    assert not [name for name in model.state_dict() if ".x." in name]
    assert set(model.base_model.states) == set(model.base_model.donors) == {"y", "z"}
    with pytest.warns(UserWarning, match="Setting active adapter to z"):
        model.delete_adapter("y")
    model.delete_adapter("z")
    assert same_bits(output(model.base_model, X), output(base, X))
    model.add_adapter("x", GraftConfig(donor=donors(base)[0], density=0.5))
    model.set_adapter("x")
    assert same_bits(output(model, X), output(graft(base, donors(base)[0], density=0.5), X))


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
def test_a_merged_adapter_is_not_deleted() -> None:
    base = MLP()
    model = several(base, density=0.5)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("x")
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['x'\] while they are merged"):
        model.base_model.delete_adapter("x")


@pytest.mark.feature("save_pretrained, from_pretrained")
def test_each_adapter_is_saved_by_itself(tmp_path: Path) -> None:
    base = tiny_bert()
    model = several(base, density=0.05, target_modules="all")
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y", "z", "README.md"}
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path / "z", adapter_name="z")
    for name in "xy":
        loaded.load_adapter(tmp_path / name, name)
    for name in "xyz":
        model.set_adapter(name)
        loaded.set_adapter(name)
        assert same_bits(output(loaded, inputs(base)), output(model, inputs(base)))


def test_tied_weights_keep_one_owner_whoever_comes_first(tmp_path: Path) -> None:
    """The head is grafted first and owns the patch; then the embedding, which comes earlier in the model."""
    base = tiny_gpt2()
    batch = inputs(base)
    targets = {"x": ["lm_head"], "y": ["wte"], "z": ["lm_head", "wte", "c_attn"]}
    model, wanted = None, {}
    for (name, modules), donor in zip(targets.items(), donors(base), strict=True):
        config = {"donor": donor, "density": 0.1, "target_modules": modules}
        wanted[name] = output(graft(base, **config), batch)
        if model is None:
            model = graft(base, adapter_name=name, **config)
        else:
            model.add_adapter(name, GraftConfig(**config))
    for name in [*targets, *targets]:
        model.set_adapter(name)
        assert same_bits(output(model, batch), wanted[name])
        model.merge_adapter()
        assert same_bits(output(model, batch), wanted[name])
        with model.disable_adapter():
            assert same_bits(output(model, batch), output(base, batch))
    model.save_pretrained(tmp_path)
    for first, second in (("x", "y"), ("y", "x"), ("z", "y")):
        loaded = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / first, adapter_name=first)
        loaded.load_adapter(tmp_path / second, second)
        for name in (first, second):
            loaded.set_adapter(name)
            assert same_bits(output(loaded, batch), wanted[name])
        again = tmp_path / f"{first}{second}"
        loaded.save_pretrained(again)
        fresh = PeftModel.from_pretrained(tiny_gpt2(), again / second, adapter_name=second)
        assert same_bits(output(fresh, batch), wanted[second])


# Errors


@pytest.mark.feature("set_adapter, add_adapter, delete_adapter")
@pytest.mark.parametrize("targets", [["first"], ["second", "norm"]], ids=str)
def test_after_a_failed_addition_the_model_still_works(targets: list[str]) -> None:
    base = MLP()
    one, two, broken = donors(base)
    with torch.no_grad():
        broken.second.bias[0] = torch.nan
    model = graft(base, one, adapter_name="x", density=0.5, target_modules=targets)
    before, names = output(model, X), set(model.state_dict())
    with pytest.raises(DonorError, match="second.bias"):
        model.add_adapter("y", GraftConfig(donor=broken, density=0.5))
    assert list(model.peft_config) == list(model.base_model.states) == ["x"]
    assert {name.replace(".base_layer", "") for name in model.state_dict()} == {
        name.replace(".base_layer", "") for name in names
    }
    assert same_bits(output(model, X), before)
    model.add_adapter("y", GraftConfig(donor=two, density=0.5, target_modules=["norm"]))
    model.set_adapter("y")
    wanted = graft(base, two, density=0.5, target_modules=["norm"])
    assert held(model, "y") == held(wanted)
    assert same_bits(output(model, X), output(wanted, X))


def test_a_failed_addition_leaves_the_head_alone() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.1, task_type="SEQ_CLS")
    before = output(model, inputs(base))
    with pytest.raises(ValueError, match="classifier"):
        model.add_adapter("y", GraftConfig(donor=tiny_bert(num_labels=3, seed=2), density=0.1, task_type="SEQ_CLS"))
    assert same_bits(output(model, inputs(base)), before)
    assert list(model.base_model.model.classifier.modules_to_save) == ["default"]


def test_a_head_is_frozen_for_the_adapter_whose_donor_has_one() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.1, task_type="SEQ_CLS")
    headless = GraftConfig(donor=perturbed(base).bert, density=0.1, task_type="SEQ_CLS")
    model.add_adapter("x", headless)
    model.set_adapter("x")
    assert len([p for p in model.parameters() if p.requires_grad]) == 2
    model.set_adapter("default")
    assert not [p for p in model.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="Setting active adapter to x"):
        model.delete_adapter("default")
    model.add_adapter("default", GraftConfig(donor=perturbed(base).bert, density=0.1, task_type="SEQ_CLS"))
    model.set_adapter("default")
    assert len([p for p in model.parameters() if p.requires_grad]) == 2


@pytest.mark.feature("modules_to_save, task heads")
def test_each_adapter_has_the_head_of_its_donor() -> None:
    base = tiny_bert()
    one, two, _ = donors(base)
    model = graft(base, one, adapter_name="x", density=1.0, target_modules="all", task_type="SEQ_CLS")
    model.add_adapter("y", GraftConfig(donor=two, density=1.0, target_modules="all", task_type="SEQ_CLS"))
    for name, donor in (("x", one), ("y", two), ("x", one)):
        model.set_adapter(name)
        assert same_bits(output(model, inputs(base)), output(donor, inputs(base)))
        assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.base_model.set_adapter(["x", "y"])


def test_a_refused_file_does_not_stand_in_the_way_of_the_right_one(tmp_path: Path) -> None:
    base, other = tiny_bert(), tiny_bert(seed=4)
    for name, model in (("right", base), ("wrong", other)):
        graft(model, perturbed(model), density=0.1).save_pretrained(tmp_path / name)
    wanted = output(PeftModel.from_pretrained(tiny_bert(), tmp_path / "right"), inputs(base))
    with pytest.raises(PatchError, match="base must be"):
        PeftModel.from_pretrained(base, tmp_path / "wrong")
    model = PeftModel.from_pretrained(base, tmp_path / "right")
    assert same_bits(output(model, inputs(base)), wanted)
    with pytest.raises(PatchError, match="base must be"):
        model.load_adapter(tmp_path / "wrong", "second")
    assert list(model.peft_config) == ["default"]
    assert same_bits(output(model, inputs(base)), wanted)
    model.load_adapter(tmp_path / "right", "second")
    model.set_adapter("second")
    assert same_bits(output(model, inputs(base)), wanted)


def test_a_base_that_is_grafted_already_can_be_grafted_again() -> None:
    base = MLP()
    one, two, _ = donors(base)
    wanted = output(graft(base, two, density=0.5), X)
    get_peft_model(base, GraftConfig(donor=one, density=0.5), adapter_name="x")
    with pytest.warns(UserWarning, match="(second time|peft_config)"):
        model = get_peft_model(base, GraftConfig(donor=two, density=0.5), adapter_name="y")
    assert same_bits(output(model, X), wanted)
    model.set_adapter("x")
    assert same_bits(output(model, X), output(graft(MLP_like(base), one, density=0.5), X))


def MLP_like(model: nn.Module) -> MLP:
    """A plain copy of a grafted MLP's base."""
    plain = MLP()
    state = {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    plain.load_state_dict({key: value for key, value in state.items() if "graft_patch" not in key})
    return plain
