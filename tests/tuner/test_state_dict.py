"""Saving and loading: the same bits in a fresh process without the donor, and a refusal for everything else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from grafts import DTYPES, FAMILIES, MLP, TASKS, graft, held, output, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_roberta, tiny_vit
from old_patches import load_apart
from peft_graft import GraftConfig, Patch, PatchError, initialize_graft
from peft_graft.patch import packing
from peft_graft.patch import patch as patch_module
from peft_graft.patch.packing import read_table
from peft_graft.patch.patch import TensorPatch

FRESH = """
import sys, torch
sys.path[:0] = sys.argv[1:3]
torch.set_num_threads(1)
import grafts, models
from peft import PeftModel
import peft_graft
for family in ("bert", "t5"):
    base = grafts.FAMILIES[family](torch.bfloat16)
    model = PeftModel.from_pretrained(base, f"{sys.argv[3]}/{family}")
    torch.save(grafts.output(model, models.inputs(base)), f"{sys.argv[3]}/{family}.pt")
"""


def saved(out: Path, **options: object) -> torch.Tensor:
    """Save a graft of tiny_bert in `out` and return its logits."""
    base = tiny_bert()
    model = graft(base, perturbed(base), **({"density": 0.05} | options))
    model.save_pretrained(out)
    return output(model, inputs(base))


@pytest.mark.feature("save_pretrained, from_pretrained")
@pytest.mark.parametrize("targets", [None, "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_is_saved_is_loaded(family: str, dtype: torch.dtype, targets: str | None, tmp_path: Path) -> None:
    base = FAMILIES[family](dtype)
    model = graft(base, perturbed(base), density=0.05, alpha=1.5, target_modules=targets, task_type=TASKS[family])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES[family](dtype), tmp_path)
    batch = inputs(base)
    assert same_bits(output(loaded, batch), output(model, batch))
    assert held(loaded) == held(model)
    assert not any(p.requires_grad for p in loaded.parameters())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.feature("save_pretrained, from_pretrained")
def test_a_fresh_process_without_the_donor_gives_the_same_logits(tmp_path: Path) -> None:
    wanted = {}
    for family in ("bert", "t5"):
        base, donor = FAMILIES[family](torch.bfloat16), tmp_path / "donor" / family
        perturbed(base).save_pretrained(donor)
        model = graft(base, str(donor), density=0.05, target_modules="all", task_type=TASKS[family])
        model.save_pretrained(tmp_path / family)
        wanted[family] = output(model, inputs(base))
    shutil.rmtree(tmp_path / "donor")
    folders = [Path(sys.modules["grafts"].__file__).parent, Path(sys.modules["peft_graft"].__file__).parents[1]]
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRESH, *map(str, folders), tmp_path], check=True)
    for family in wanted:
        assert same_bits(torch.load(tmp_path / f"{family}.pt"), wanted[family])


def test_only_the_adapters_own_files_are_written(tmp_path: Path) -> None:
    saved(tmp_path, task_type="SEQ_CLS")
    # The model card is PEFT's own doing: it writes one beside every adapter.
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }


def test_the_file_is_a_patch_of_the_base_that_peft_graft_reads_alone(tmp_path: Path) -> None:
    base = tiny_vit()
    donor = perturbed(base)
    model = graft(base, donor, density=0.1, target_modules="all")
    model.save_pretrained(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in base.named_parameters()}
    patch = Patch.load(tmp_path / "adapter_model.safetensors", shapes)
    assert {name: part.indices.tolist() for name, part in patch.tensors.items()} == held(model)
    assert "vit.embeddings.cls_token" in patch.tensors
    for name, part in patch.tensors.items():
        assert same_bits(part.values, donor.get_parameter(name).detach().view(-1)[part.indices])
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert keys == {"base_model.model.graft_patch.table", "base_model.model.graft_patch.packed"}


def test_an_adapter_of_version_1_loads_to_the_same_bits(tmp_path: Path) -> None:
    wanted = saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state, new = load_apart(path), path.read_bytes()
    save_file(state, path, {"format": "pt"})
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(output(loaded, inputs(tiny_bert())), wanted)
    loaded.save_pretrained(tmp_path)
    assert path.read_bytes() == new


def test_the_config_says_what_was_done(tmp_path: Path) -> None:
    saved(tmp_path, selection="random", seed=4)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "GRAFT" and config["donor"] == "BertForSequenceClassification"
    assert (config["selection"], config["seed"], config["density"], config["alpha"]) == ("random", 4, 0.05, 1.0)
    assert config["record"]["entries"] == round(0.05 * config["record"]["eligible"])
    assert (
        config["record"]["fingerprint"]["count"] == config["record"]["entries"]
        and config["record"]["fingerprint"]["dtype"] == "float32"
    )
    assert config["inference_mode"] is True


def test_alpha_can_be_changed_in_the_file(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha": 2.5}))
    base = tiny_bert()
    wanted = graft(base, perturbed(base), density=0.05, alpha=2.5)
    assert same_bits(output(PeftModel.from_pretrained(base, tmp_path), inputs(base)), output(wanted, inputs(base)))


def test_zeros_store_no_values(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, "zeros", density=0.5)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    rows = read_table(stored["base_model.model.graft_patch.table"])
    assert {code for code, _ in rows.values()} == {"zeros-F32"}
    assert sum(row[0] for _, row in rows.values()) == model.peft_config["default"].record.entries
    assert stored["base_model.model.graft_patch.packed"].numel() == sum(row[1] for _, row in rows.values())
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(output(loaded, inputs(base)), output(model, inputs(base)))


@pytest.mark.feature("save_pretrained, from_pretrained")
def test_a_merged_model_saves_the_same_adapter(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.05, alpha=3.0)
    model.save_pretrained(tmp_path / "apart")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


@pytest.mark.feature("load_adapter over a loaded one")
def test_loading_over_an_adapter_replaces_all_of_it(tmp_path: Path) -> None:
    base = tiny_bert()
    small = graft(base, perturbed(base, seed=5), num_params=3)
    small.save_pretrained(tmp_path)
    model = graft(base, perturbed(base), density=0.05)
    model.load_adapter(tmp_path, "default")
    assert held(model) == held(small)
    assert same_bits(output(model, inputs(base)), output(small, inputs(base)))


@pytest.mark.feature("low_cpu_mem_usage")
def test_low_cpu_mem_usage_loads_the_same(tmp_path: Path) -> None:
    wanted = saved(tmp_path, target_modules="all")
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path, low_cpu_mem_usage=True)
    assert same_bits(output(loaded, inputs(tiny_bert())), wanted)


def test_another_architecture_is_refused_before_anything_is_wrapped(tmp_path: Path) -> None:
    base = tiny_bert()
    graft(base, perturbed(base), density=0.1, task_type="SEQ_CLS").save_pretrained(tmp_path)
    other = tiny_roberta()
    with pytest.raises(PatchError, match="base must be of the type that the patch was made for, 'bert', got 'roberta'"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any("graft" in name for name, _ in other.named_modules())


@pytest.mark.feature("the base in another float dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_same_base_in_another_dtype_is_welcome(dtype: torch.dtype, tmp_path: Path) -> None:
    saved(tmp_path, density=None, num_params=500)
    base = tiny_bert(dtype)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    donor = dict(perturbed(tiny_bert()).named_parameters())
    chosen = held(loaded)
    merged = dict(loaded.merge_and_unload().named_parameters())
    assert sum(map(len, chosen.values())) == 500
    for name, index in chosen.items():
        assert same_bits(merged[name].view(-1)[index], donor[name].view(-1)[index].to(dtype))


# Task heads


@pytest.mark.feature("modules_to_save, task heads")
@pytest.mark.parametrize("selection", ["magnitude", "learned"])
def test_the_head_is_the_donors_and_frozen(selection: str, tmp_path: Path) -> None:
    base, donor = tiny_bert(), perturbed(tiny_bert())
    model = graft(base, donor, density=0.05, task_type="SEQ_CLS", selection=selection)

    def head() -> torch.nn.Module:
        return model.base_model.model.classifier.modules_to_save["default"]

    def check() -> None:
        assert same_bits(head().weight, donor.classifier.weight)
        assert not any(p.requires_grad for p in head().parameters())
        trainable = {name.rpartition("_")[2] for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == ({"logits"} if selection == "learned" else set())

    check()
    for step in (
        model.train,
        lambda: model.set_adapter("default"),
        lambda: model.set_requires_grad("default"),
        model.eval,
    ):
        step()
        check()
    with model.disable_adapter():
        assert same_bits(output(model, inputs(base)), output(base, inputs(base)))
    check()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(loaded.base_model.model.classifier.modules_to_save["default"].weight, donor.classifier.weight)
    assert same_bits(output(loaded, inputs(base)), output(model, inputs(base)))


@pytest.mark.feature("modules_to_save, task heads")
def test_a_head_of_several_modules_is_the_donors() -> None:
    base = tiny_roberta()
    donor = perturbed(base)
    model = graft(base, donor, density=1.0, target_modules="all", task_type="SEQ_CLS")
    assert not any(p.requires_grad for p in model.parameters())
    assert same_bits(output(model, inputs(base)), output(donor, inputs(base)))


@pytest.mark.feature("modules_to_save, task heads")
def test_a_head_that_the_donor_lacks_stays_the_bases_and_trains() -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base).bert, density=0.05, task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert same_bits(head.weight, base.classifier.weight)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "base_model.model.classifier.modules_to_save.default.weight",
        "base_model.model.classifier.modules_to_save.default.bias",
    ]


def test_a_head_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"classifier.*\(2, 16\).*\(3, 16\)"):
        graft(tiny_bert(), tiny_bert(num_labels=3, seed=1), density=0.1, task_type="SEQ_CLS")


# Refusals


@pytest.mark.feature("another base", "no: the adapter knows the values of its base")
def test_another_base_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    saved(tmp_path)
    other = tiny_bert(seed=3)
    alone, names = output(other, inputs(other)), list(other.state_dict())
    with pytest.raises(PatchError, match="base must be the model that this patch was made for"):
        PeftModel.from_pretrained(other, tmp_path)
    assert list(other.state_dict()) == names
    assert same_bits(output(other, inputs(other)), alone)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("indices", lambda value: value[:-1], "coded indices must be"),
        ("values", lambda value: value[:-1], "coded indices must be"),
        ("values", lambda value: value.int(), "values must be floating-point"),
        ("values", lambda value: value * float("nan"), "values must be finite"),
        ("values", None, r"given by indices and values, got \['indices'\]"),
    ],
)
def test_a_malformed_file_is_refused_by_tensor(kind: str, change: object, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_apart(path)
    name = "bert.encoder.layer.0.output.dense"
    key = f"base_model.model.{name}.graft_patch.weight_{kind}"
    value = stored.pop(key)
    if change is not None:
        stored[key] = change(value)
    save_file(stored, path)
    with pytest.raises(PatchError, match=rf"{message}.*'{name}.weight'"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_a_tensor_that_the_base_lacks_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_apart(path)
    save_file({key.replace("layer.1.", "layer.7."): value for key, value in stored.items()}, path)
    with pytest.raises(PatchError, match="one that the base has and the adapter targets, got 'bert.encoder.layer.7"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_a_file_without_a_patch_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    save_file({"base_model.model.classifier.weight": torch.zeros(2, 16)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PatchError, match="adapter must hold a patch, got no `graft_patch` tensors"):
        PeftModel.from_pretrained(tiny_bert(), tmp_path)


def test_a_tied_tensor_that_is_patched_twice_is_refused(tmp_path: Path) -> None:
    base = tiny_gpt2()
    graft(base, perturbed(base), density=0.1, target_modules="all").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_apart(path)
    stored |= {
        key.replace("transformer.wte", "lm_head"): value.clone() for key, value in stored.items() if ".wte." in key
    }
    save_file(stored, path)
    with pytest.raises(PatchError, match="tied tensors must be patched once"):
        PeftModel.from_pretrained(tiny_gpt2(), tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"selection": "taylor"}, {"selection": "sigmoid"}, {"alpha": "auto"}, {"selection": "learned", "alpha": "auto"}],
    ids=str,
)
def test_a_graft_that_waits_for_data_is_not_saved(options: dict[str, object], tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, perturbed(base), density=0.05, **options)
    with pytest.raises(ValueError, match=r"graft must be complete before it is saved.*initialize_graft"):
        model.save_pretrained(tmp_path)
    initialize_graft(model, [inputs(base, seed=seed) for seed in range(4)], show_progress_bar=False, steps=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_bert(), tmp_path)
    assert same_bits(output(loaded, inputs(base)), output(model, inputs(base)))


def test_a_learned_mask_is_packed(tmp_path: Path) -> None:
    base = MLP()
    model = graft(base, perturbed(base), num_params=5, selection="learned", candidate_ratio=4)
    logits = model.base_model.states["default"].logits()
    assert sum(map(len, logits.values())) == 20
    with torch.no_grad():
        for value in logits.values():
            value.uniform_(-1, 1)
    x = torch.randn(3, 4)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith("_logits")]
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert sum(map(len, held(loaded).values())) == 5
    assert same_bits(output(loaded, x), output(model, x))


def test_a_patch_in_memory_is_installed_as_a_copy_without_coding(monkeypatch: pytest.MonkeyPatch) -> None:
    base = MLP()
    model = graft(base, perturbed(base), density=0.3, adapter_name="x")
    model.add_adapter("y", GraftConfig(donor="zeros", density=0.2))

    def refuse(*args: object) -> None:
        raise AssertionError("a patch was coded")

    for module, name in ((packing, "encode_indices"), (packing, "decode_indices"), (patch_module, "decode_indices")):
        monkeypatch.setattr(module, name, refuse)
    patch, x = model.base_model.patch("x"), torch.ones(2, 4)
    model.base_model.fill("y", patch)
    assert held(model, "y") == held(model, "x")
    model.set_adapter("y")
    before = output(model, x)
    for part in patch.tensors.values():
        part.values.zero_()
    assert same_bits(output(model, x), before) and not same_bits(before, output(base, x))


def test_a_patch_in_memory_that_does_not_fit_is_refused() -> None:
    model = graft(MLP(), "zeros", density=0.2)
    one = torch.tensor([0])
    for tensors, message in (
        ({}, "adapter must hold a patch"),
        ({"third.weight": TensorPatch(one, one.float())}, "third.weight"),
        ({"first.bias": TensorPatch(one + 6, one.float())}, "first.bias"),
    ):
        with pytest.raises(PatchError, match=message):
            model.base_model.fill("default", Patch(tensors))
