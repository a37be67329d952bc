"""Adapters stitched in files are the bytes that `add_weighted_adapter` saves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

import models
from grafts import same_bits
from models import perturbed, tiny_bert, tiny_llama
from peft_graft import DonorError, PatchError
from peft_graft.patch.combinations import COMBINATIONS
from peft_graft.workflows.extract import extract
from peft_graft.workflows.stitch import stitch

FAMILIES = sorted(name for name in vars(models) if name.startswith("tiny_"))
NAMES = ("reviews", "news")


def make(tmp_path: Path, family: str = "tiny_llama", alphas: tuple[float, float] = (1.0, 1.0), **options: Any) -> type:
    """Save a base and two adapters that overlap; return the class that loads the base."""
    base = getattr(models, family)(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for seed, (name, alpha) in enumerate(zip(NAMES, alphas, strict=True)):
        perturbed(base, seed=seed).save_pretrained(tmp_path / f"donor_{name}")
        extract(tmp_path / "base", tmp_path / f"donor_{name}", tmp_path / name, density=0.3, alpha=alpha, **options)
    return type(base)


def in_memory(tmp_path: Path, cls: Any, weights: list[float], **options: Any) -> Path:
    """What the library writes with the base loaded."""
    model = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "reviews", "reviews")
    model.load_adapter(tmp_path / "news", "news")
    model.add_weighted_adapter(list(NAMES), weights, "default", **options)
    model.save_pretrained(tmp_path / "expected", selected_adapters=["default"])
    return tmp_path / "expected"


def assert_same_adapter(one: Path, other: Path) -> None:
    expected, found = (load_file(path / "adapter_model.safetensors") for path in (one, other))
    assert expected.keys() == found.keys()
    assert all(same_bits(expected[key], found[key]) for key in expected)
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in (one, other)]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"] or [])
    assert configs[0] == configs[1]


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_files_give_what_models_give(combination: str, tmp_path: Path) -> None:
    cls = make(tmp_path, alphas=(1.0, 2.5))
    expected = in_memory(tmp_path, cls, [1.0, -0.5], combination_type=combination)
    done = stitch(
        [tmp_path / name for name in NAMES], tmp_path / "both", weights=[1.0, -0.5], combination_type=combination
    )
    assert_same_adapter(expected, tmp_path / "both")
    assert done.conflicts > 0 and done.nbytes == (tmp_path / "both" / "adapter_model.safetensors").stat().st_size
    assert done.entries == json.loads((tmp_path / "both" / "adapter_config.json").read_text())["record"]["entries"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    cls = make(tmp_path, family)
    expected = in_memory(tmp_path, cls, [1.0, 1.0], modules_to_save_from="reviews")
    adapters = [tmp_path / name for name in NAMES]
    stitch(adapters, tmp_path / "both", modules_to_save_from=adapters[0])
    assert_same_adapter(expected, tmp_path / "both")


def test_one_adapter_is_itself(tmp_path: Path) -> None:
    make(tmp_path)
    stitch([tmp_path / "news"], tmp_path / "out")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("news", "out"))
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)


def test_the_order_of_adapters_does_not_matter(tmp_path: Path) -> None:
    make(tmp_path)
    for out, names in (("one", NAMES), ("other", NAMES[::-1])):
        stitch([tmp_path / name for name in names], tmp_path / out, combination_type="mean")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


# Heads


def for_labels(tmp_path: Path, count: int) -> BertForSequenceClassification:
    return BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=count, ignore_mismatched_sizes=True
    )


def with_heads(tmp_path: Path, labels: tuple[int, int]) -> None:
    """Two adapters with task heads, which may be of other sizes than the base's."""
    tiny_bert().save_pretrained(tmp_path / "base")
    for seed, (name, count) in enumerate(zip(NAMES, labels, strict=True)):
        perturbed(for_labels(tmp_path, count), seed=seed).save_pretrained(tmp_path / f"donor_{name}")
        extract(tmp_path / "base", tmp_path / f"donor_{name}", tmp_path / name, density=0.1)


@pytest.mark.parametrize("labels", [(2, 2), (5, 3)])
def test_a_head_is_chosen(labels: tuple[int, int], tmp_path: Path) -> None:
    with_heads(tmp_path, labels)
    adapters = [tmp_path / name for name in NAMES]
    with pytest.raises(ValueError, match="modules_to_save_from"):
        stitch(adapters, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    stitch(adapters, tmp_path / "both", modules_to_save_from=tmp_path / "news")
    head = {
        name: {key: value for key, value in load_file(path).items() if "classifier" in key}
        for name in ("news", "both")
        if (path := tmp_path / name / "adapter_model.safetensors")
    }
    assert head["news"].keys() == head["both"].keys() and len(head["both"]) == 2
    assert all(same_bits(head["news"][key], head["both"][key]) for key in head["news"])
    base = for_labels(tmp_path, labels[1])
    assert PeftModel.from_pretrained(base, tmp_path / "both")(torch.tensor([[1, 2]])).logits.shape == (1, labels[1])


def test_a_head_is_chosen_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_heads(tmp_path, (2, 2))
    monkeypatch.chdir(tmp_path)
    for number, path in enumerate(("./news", "news", tmp_path / "reviews" / ".." / "news")):
        stitch(["reviews/", "news/"], f"both_{number}", modules_to_save_from=path)
        assert_same_adapter(tmp_path / "both_0", tmp_path / f"both_{number}")


def test_equal_heads_need_no_choice(tmp_path: Path) -> None:
    with_heads(tmp_path, (2, 2))
    stitch([tmp_path / "news", tmp_path / "news"], tmp_path / "twice", combination_type="mean")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("news", "twice"))
    assert before.keys() == after.keys() and all(same_bits(before[key], after[key]) for key in before)


def test_a_head_can_only_come_from_who_has_one(tmp_path: Path) -> None:
    make(tmp_path)
    extract(tmp_path / "base", tmp_path / "donor_news", tmp_path / "headed", density=0.1, modules_to_save=["lm_head"])
    adapters = [tmp_path / "reviews", tmp_path / "headed"]
    with pytest.raises(ValueError, match=r"must have modules to save, got 'reviews'. Choose from \['headed'\]"):
        stitch(adapters, tmp_path / "both", modules_to_save_from=adapters[0])
    stitch(adapters, tmp_path / "both")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("headed", "both"))
    (key,) = [key for key in before if "lm_head" in key]
    assert same_bits(before[key], after[key])


# Errors


def test_adapters_of_other_bases_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    moved = tmp_path / "elsewhere"
    perturbed(tiny_llama(torch.bfloat16), seed=7).save_pretrained(moved / "base")
    extract(moved / "base", tmp_path / "donor_news", moved / "news", density=0.3)
    with pytest.raises(PatchError, match="of one base"):
        stitch([tmp_path / "reviews", moved / "news"], tmp_path / "both")
    with pytest.raises(PatchError, match="base"):
        stitch([tmp_path / "reviews", moved / "news"], tmp_path / "both", base=tmp_path / "base")
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "other"])
def test_heads_that_are_damaged_are_refused(change: str, tmp_path: Path) -> None:
    """None is left out in silence either."""
    make(tmp_path)
    extract(tmp_path / "base", tmp_path / "donor_news", tmp_path / "headed", density=0.1, modules_to_save=["lm_head"])
    file = tmp_path / "headed" / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [key for key in tensors if "lm_head" in key]
    head = tensors.pop(key)
    tensors |= {
        "missing": {},
        "shape": {key: head[:, :-1].clone()},
        "dtype": {key: head.long()},
        "other": {key: head, "base_model.model.model.norm.weight": torch.ones(16)},
    }[change]
    save_file(tensors, file)
    name = "model.norm.weight" if change == "other" else "lm_head.weight"
    with pytest.raises(PatchError, match=f"must be those of the adapter's modules_to_save, got others for '{name}'"):
        stitch([tmp_path / "reviews", tmp_path / "headed"], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_a_copy_of_the_base_will_do(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(DonorError, match="base must be an existing directory"):
        stitch([tmp_path / name for name in NAMES], tmp_path / "both")
    stitch([tmp_path / name for name in NAMES], tmp_path / "both", base=tmp_path / "moved")
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()


def test_a_wrong_base_is_refused_by_the_name_of_the_right_one(tmp_path: Path) -> None:
    make(tmp_path)
    adapters = [tmp_path / name for name in NAMES]
    with pytest.raises(PatchError, match=f"Load '{tmp_path / 'base'}'"):
        stitch(adapters, tmp_path / "both", base=tmp_path / "donor_news")


def test_a_base_that_is_gone_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path())
    monkeypatch.chdir(tmp_path / "donor_news")  # from here, the path that the adapters hold leads nowhere
    with pytest.raises(DonorError, match="the base that the adapter names; give yours as base"):
        stitch([tmp_path / name for name in NAMES], tmp_path / "both")


def test_one_base_may_be_named_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path)
    monkeypatch.chdir(tmp_path)
    extract("base", "donor_news", "relative", density=0.3)
    stitch(["reviews", "relative"], "both")
    stitch(["reviews", "relative"], "expected", base=tmp_path / "base")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("expected", "both"))
    assert one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


def test_all_wrong_arguments_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as told:
        stitch(["a", "b"], tmp_path / "out", weights=[float("nan")], combination_type="sum", modules_to_save_from="c")
    for words in (
        "combination_type must be one of",
        "got 1",
        "finite",
        "modules_to_save_from must be one of the adapters, got 'c'. Choose",
    ):
        assert words in str(told.value)
    with pytest.raises(ValueError, match="at least one"):
        stitch([], tmp_path / "out")


def test_what_is_there_stays_unless_told(tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(FileExistsError, match="overwrite"):
        stitch([tmp_path / "reviews"], tmp_path / "news")
    stitch([tmp_path / "reviews"], tmp_path / "news", overwrite=True)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in NAMES)
    assert all(same_bits(before[key], after[key]) for key in before)


def test_directories_may_have_any_name(tmp_path: Path) -> None:
    make(tmp_path)
    paths = [tmp_path / name for name in ("keys", "default", "a.b/keys")]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        stitch([tmp_path / "news"], path)
    stitch(paths, tmp_path / "out", combination_type="mean")
    parts = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["record"]["provenance"]["adapters"]
    assert [part["name"] for part in parts] == ["keys-2", "default-2", "keys-3"]


# Files of the user


def test_inputs_and_models_are_no_output(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "reviews")
    with pytest.raises(FileExistsError, match="which holds the adapter 2 '.*reviews'"):
        stitch([tmp_path / "news", tmp_path / "reviews"], tmp_path / "link", overwrite=True)
    with pytest.raises(FileExistsError, match="which holds the base"):
        stitch([tmp_path / "news"], tmp_path / "base", base=tmp_path / "base", overwrite=True)
    with pytest.raises(FileExistsError, match="output_dir must hold no model"):
        stitch([tmp_path / "news"], tmp_path / "base", overwrite=True)


def test_the_card_of_the_user_is_kept(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# Mine\n\nHow I made it.\n")
    stitch([tmp_path / "news"], tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "How I made it." in text and "peft-graft:facts" in text
