"""extract writes byte for byte what get_peft_model would have saved, from files alone, and nothing half-written."""

from __future__ import annotations

import copy
import filecmp
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertForMaskedLM,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

import models
from grafts import held, output, same_bits
from models import inputs, perturbed
from peft_graft import DonorError, GraftConfig, Patch, SelectionError
from peft_graft.selection import select
from peft_graft.workflows.diff import diff
from peft_graft.workflows.export import export
from peft_graft.workflows.extract import extract, task_of
from peft_graft.workflows.stitch import stitch

FAMILIES = sorted(name for name in vars(models) if name.startswith("tiny_"))
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def save_pair(
    tmp_path: Path,
    build: Callable[..., nn.Module],
    dtype: torch.dtype = torch.float32,
    change: Callable[[nn.Module], nn.Module] = perturbed,
    **options: Any,
) -> tuple[Path, Path]:
    """Save a base and a donor of it; in several shards where `max_shard_size` says so."""
    model = build(dtype)
    model.save_pretrained(tmp_path / "base", **options)
    change(model).save_pretrained(tmp_path / "donor", **options)
    return tmp_path / "base", tmp_path / "donor"


def reference(base: Path, config: GraftConfig, out: Path, model_type: type[PreTrainedModel]) -> Path:
    """The adapter of both models in memory."""
    get_peft_model(model_type.from_pretrained(base), config).save_pretrained(out)
    return out


def assert_same_files(one: Path, other: Path) -> None:
    assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in other.iterdir()) == FILES
    assert filecmp.cmpfiles(one, other, FILES, shallow=False) == (FILES, [], [])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, torch.bfloat16) for family in FAMILIES),
        ("tiny_bert", torch.float32),
        ("tiny_llama", torch.float16),
        ("tiny_t5", torch.float16),  # two layers of it stay in float32
    ],
    ids=str,
)
def test_every_byte_is_that_of_the_models_in_memory(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Tied heads (GPT-2, T5, Qwen, Whisper, Mamba), Conv1D names, experts, renamed tensors, heads of classifiers."""
    build = getattr(models, family)
    base, donor = save_pair(tmp_path, build, dtype)
    config = GraftConfig(donor=str(donor), density=0.03, task_type=task_of(build()))
    expected = reference(base, config, tmp_path / "reference", type(build()))
    done = extract(base, donor, tmp_path / "out", density=0.03)
    assert_same_files(tmp_path / "out", expected)
    assert done.entries == round(0.03 * done.eligible) == Patch.load(expected / FILES[2]).num_params
    assert done.nbytes == (expected / FILES[2]).stat().st_size


@pytest.mark.parametrize(
    "options",
    [
        {"num_params": 77},
        {"density": 1.0},
        {"density": 0.05, "selection": "random", "seed": 3},
        {"density": 0.05, "budget_scope": "tensor"},
        {"density": 0.2, "granularity": "tensor"},
        {"density": 0.6, "granularity": "layer"},
        {"density": 0.05, "alpha": 0.5},
        {"density": 0.05, "target_modules": "all"},
        {"density": 0.05, "target_modules": ["query", "LayerNorm"]},
        {"density": 0.05, "exclude_modules": ["pooler.dense"], "layers_to_transform": [1]},
        {"density": 0.05, "modules_to_save": ["pooler"]},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_every_option_means_what_it_means_in_memory(options: dict[str, Any], tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_bert, torch.bfloat16, max_shard_size="4KB")
    assert len(list(base.glob("*.safetensors"))) > 3
    config = GraftConfig(**copy.deepcopy({"donor": str(donor), "task_type": "SEQ_CLS", **options}))
    expected = reference(base, config, tmp_path / "reference", type(models.tiny_bert()))
    extract(base, donor, tmp_path / "out", task_type="SEQ_CLS", **options)
    assert_same_files(tmp_path / "out", expected)


def test_the_zeros_donor_needs_no_file(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, models.tiny_llama)
    config = GraftConfig(donor="zeros", density=0.05, task_type="CAUSAL_LM")
    expected = reference(base, config, tmp_path / "reference", type(models.tiny_llama()))
    done = extract(base, "zeros", tmp_path / "out", density=0.05)
    assert_same_files(tmp_path / "out", expected)
    assert done.donor_nbytes == 0


def test_a_budget_that_does_not_fit_in_memory_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, donor = save_pair(tmp_path, models.tiny_gpt2)
    extract(base, donor, tmp_path / "one", density=0.1)
    monkeypatch.setattr(select, "HELD_AT_ONCE", 10)
    extract(base, donor, tmp_path / "other", density=0.1)
    assert_same_files(tmp_path / "one", tmp_path / "other")


def test_a_head_that_the_base_lacks_comes_from_the_donor(tmp_path: Path) -> None:
    """The usual case: a pretrained base with another head, and a donor with five labels."""
    donor_model = models.tiny_bert(torch.bfloat16, num_labels=5)
    donor_model.save_pretrained(tmp_path / "donor")
    base_model = BertForMaskedLM(donor_model.config).to(torch.bfloat16)
    missing = base_model.bert.load_state_dict(perturbed(donor_model).bert.state_dict(), strict=False)
    assert missing.unexpected_keys == ["pooler.dense.weight", "pooler.dense.bias"]
    base_model.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"modules_to_save takes \['bert\.pooler\.dense'\] whole"):
        extract(tmp_path / "base", tmp_path / "donor", tmp_path / "whole", density=0.05)
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=0.05, exclude_modules=["pooler.dense"])
    torch.manual_seed(1)  # the pooler is new in every load
    base = type(donor_model).from_pretrained(tmp_path / "base", num_labels=5)
    grafted = PeftModel.from_pretrained(base, tmp_path / "out")
    head = grafted.base_model.model.classifier.modules_to_save["default"]
    assert same_bits(head.weight.bfloat16(), donor_model.classifier.weight)
    entries = sum(map(len, held(grafted).values()))
    assert entries == grafted.active_peft_config.record.entries > 0


def test_the_adapter_grafts_the_donor(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_qwen)
    extract(base, donor, tmp_path / "out", density=1.0, target_modules="all")
    model = type(models.tiny_qwen())
    grafted = PeftModel.from_pretrained(model.from_pretrained(base), tmp_path / "out")
    batch = inputs(models.tiny_qwen())
    assert torch.equal(output(grafted, batch), output(model.from_pretrained(donor), batch))


def sparse(model: nn.Module) -> nn.Module:
    """A donor that changed one entry in ten, one of them only in the sign of a zero."""
    donor = perturbed(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for before, after in zip(model.parameters(), donor.parameters(), strict=True):
            after.copy_(torch.where(torch.rand(after.shape, generator=generator) < 0.1, after, before))
        donor.model.norm.weight[0], model.model.norm.weight[0] = -0.0, 0.0
    return donor


def test_an_exact_patch_is_lossless(tmp_path: Path) -> None:
    model = models.tiny_llama(torch.bfloat16)
    donor = sparse(model)
    model.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    done = extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", exact=True)
    merged = PeftModel.from_pretrained(
        type(model).from_pretrained(tmp_path / "base"), tmp_path / "out"
    ).merge_and_unload()
    for (name, one), other in zip(merged.named_parameters(), donor.parameters(), strict=True):
        assert same_bits(one, other), name
    differing = sum(
        int((a.view(torch.int16) != b.view(torch.int16)).sum())
        for a, b in zip(model.parameters(), donor.parameters(), strict=True)
    )
    assert done.entries == differing < done.eligible
    config = GraftConfig.from_pretrained(tmp_path / "out")
    assert config.record.provenance["exact"] is True and config.density is None and config.record.entries == differing


def test_an_exact_patch_that_outweighs_the_donor_is_told(tmp_path: Path) -> None:
    """Steps never do; of a donor in another dtype than its base, indices and values are stored."""
    base, _ = save_pair(tmp_path, models.tiny_llama)
    models.tiny_llama(torch.float16).save_pretrained(tmp_path / "half")
    with pytest.warns(UserWarning, match=r"patch should be smaller than the donor, got .* entries differ\)\. Keep"):
        done = extract(base, tmp_path / "half", tmp_path / "out", exact=True)
    assert done.nbytes >= done.donor_nbytes > 0


def test_other_dtypes_than_the_files_are_those_that_loading_gives(tmp_path: Path) -> None:
    """config.json says bfloat16, the file holds float32: from_pretrained rounds, so extract must."""
    base, donor = save_pair(tmp_path, models.tiny_llama)
    for side in (base, donor):
        path = side / "config.json"
        path.write_text(path.read_text().replace('"dtype": "float32"', '"dtype": "bfloat16"'))
    config = GraftConfig(donor=str(donor), density=0.05, task_type="CAUSAL_LM")
    expected = reference(base, config, tmp_path / "reference", type(models.tiny_llama()))
    extract(base, donor, tmp_path / "out", density=0.05)
    assert_same_files(tmp_path / "out", expected)
    assert GraftConfig.from_pretrained(expected).record.fingerprint["dtype"] == "bfloat16"


def test_a_donor_without_a_configuration_is_of_the_bases_class(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_gpt2)
    extract(base, donor / "model.safetensors", tmp_path / "one", density=0.05)
    extract(base, donor, tmp_path / "other", density=0.05)
    assert filecmp.cmp(tmp_path / "one" / FILES[2], tmp_path / "other" / FILES[2], shallow=False)


# What is there already


def test_an_adapter_is_replaced_only_when_told(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_bert)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    extract(base, donor, out, density=0.05)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(FileExistsError, match=r"output_dir must hold no adapter yet, got 'adapter_config\.json'"):
        extract(base, donor, out, density=0.1)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    extract(base, donor, out, density=0.1, overwrite=True)
    after = {file.name: file.read_bytes() for file in out.iterdir()}
    assert after.keys() == before.keys() and after["notes.txt"] == b"mine"
    assert after[FILES[2]] != before[FILES[2]]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError, match="output_dir must be a directory, got the file"):
        extract(tmp_path, "zeros", tmp_path / "out", density=0.1)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """The donor's last tensor is broken, so that everything else has been read when this shows."""
    base, donor = save_pair(tmp_path, models.tiny_llama)
    tensors = load_file(donor / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, donor / "model.safetensors", {"format": "pt"})
    with pytest.raises(DonorError, match=r"must be finite, got 1 NaN or Inf in 'model\.norm\.weight'"):
        extract(base, donor, tmp_path / "out", density=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "donor"]


# What is refused


def test_a_donor_that_equals_the_base_is_refused(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, models.tiny_llama)
    for options in ({"density": 0.1}, {"exact": True}):
        with pytest.raises(DonorError, match="must differ from the base in the targeted modules"):
            extract(base, base, tmp_path / "out", density=options.pop("density", None), **options)


@pytest.mark.parametrize("selection", ["taylor", "learned"])
def test_rules_that_need_data_are_refused(selection: str, tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match=f"selection must need no data here, got '{selection}'"):
        extract(tmp_path, "zeros", tmp_path / "out", density=0.1, selection=selection)


@pytest.mark.parametrize("options", [{"density": 0.1}, {"num_params": 5}, {"alpha": 0.5}])
def test_an_exact_patch_has_no_budget(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="exact must come without a budget, with alpha 1"):
        extract(tmp_path, "zeros", tmp_path / "out", **options, exact=True)


@pytest.mark.parametrize("donor", [None, nn.Linear(2, 2)])
def test_a_donor_in_memory_is_refused(donor: Any, tmp_path: Path) -> None:
    with pytest.raises(DonorError, match="donor must be a directory, a Hub id or 'zeros', got"):
        extract(tmp_path, donor, tmp_path / "out", density=0.1)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    base, _ = save_pair(tmp_path, models.tiny_llama)
    models.tiny_gpt2().save_pretrained(tmp_path / "other")
    with pytest.raises(DonorError, match="This is not the same architecture"):
        extract(base, tmp_path / "other", tmp_path / "out", density=0.1)


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="no model of transformers 5.0 is split while loading"
)
def test_tensors_that_are_split_while_loading_are_refused_unless_left_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    base, donor = save_pair(tmp_path, lambda dtype: Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True)).to(dtype))
    with pytest.raises(DonorError, match=r"base tensors must stand in the files as they do in the model.*\(Chunk"):
        extract(base, donor, tmp_path / "out", density=0.1)
    extract(base, donor, tmp_path / "out", density=0.1, exclude_modules=["gate_proj", "up_proj"])


def test_a_base_that_cannot_be_read_is_called_the_base(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama, max_shard_size="8KB")
    shutil.copytree(base, tmp_path / "cut")
    with (tmp_path / "cut" / "model-00002-of-00004.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DonorError, match="base file must be a whole safetensors file"):
        extract(tmp_path / "cut", donor, tmp_path / "out", density=0.1)


# Files of the user


@pytest.mark.parametrize("name", ["base", "donor"])
def test_the_checkpoints_are_no_output(name: str, tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama)
    (tmp_path / "link").symlink_to(tmp_path / name)
    before = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
    for out in (tmp_path / name, tmp_path / "link"):
        with pytest.raises(FileExistsError, match=f"output_dir must be another directory .* which holds the {name}"):
            extract(base, donor, out, density=0.1, overwrite=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == before
    type(models.tiny_llama()).from_pretrained(tmp_path / name)


def test_the_directory_of_a_donor_file_is_no_output(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama)
    with pytest.raises(FileExistsError, match="which holds the donor"):
        extract(base, donor / "model.safetensors", donor, density=0.1, task_type="CAUSAL_LM")


def test_another_model_is_no_output(tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama)
    shutil.copytree(donor, tmp_path / "third")
    with pytest.raises(FileExistsError, match=r"output_dir must hold no model, got 'config\.json'"):
        extract(base, donor, tmp_path / "third", density=0.1, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_card_of_the_user_is_kept_as_save_pretrained_keeps_it(overwrite: bool, tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama)
    out, expected = tmp_path / "out", tmp_path / "reference"
    for directory in (out, expected):
        directory.mkdir()
        if overwrite:
            extract(base, donor, directory, density=0.2, overwrite=True)
        (directory / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nHow I made it.\n")
    extract(base, donor, out, density=0.1, overwrite=overwrite)
    reference(base, GraftConfig(donor=str(donor), density=0.1, task_type="CAUSAL_LM"), expected, model_of(base))
    text = (out / "README.md").read_text()
    assert "How I made it." in text and "license: mit" in text and "peft-graft:facts" in text
    assert_same_files(out, expected)


@pytest.mark.parametrize("text", [b"---\na: [1\n---\n# Mine\n", b"# caf\xe9\n", b"---\n- a\n---\n# Mine\n"])
def test_a_card_that_cannot_be_kept_is_refused_before_anything_is_read(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text)
    with pytest.raises(ValueError, match=r"card in output_dir must be UTF-8 with metadata in YAML.*README\.md"):
        extract(tmp_path / "nowhere", tmp_path / "nowhere", tmp_path, density=0.1)
    assert (tmp_path / "README.md").read_bytes() == text


def model_of(directory: Path) -> type[PreTrainedModel]:
    return type(transformers.AutoModelForCausalLM.from_pretrained(directory))


# NaN that nothing changed


def with_nan(tmp_path: Path, dtype: torch.dtype, row: int = 3, in_base: bool = True) -> tuple[Path, Path]:
    """A pair of which a row of the embedding is NaN, as uninitialised padding rows are."""
    base, donor = save_pair(tmp_path, models.tiny_llama, dtype)
    for directory in (base, donor) if in_base else (donor,):
        tensors = load_file(directory / "model.safetensors")
        tensors["model.embed_tokens.weight"][row] = float("nan")
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return base, donor


@pytest.mark.filterwarnings("ignore:patch should be smaller than the donor")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"density": 1.0},
        {"exact": True},
        {"density": 0.2},
        {"density": 0.9999, "selection": "random"},
        {"density": 1.0, "granularity": "tensor"},
        {"density": 0.5, "budget_scope": "tensor"},
    ],
    ids=str,
)
def test_nan_that_base_and_donor_share_is_no_diverged_training(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    base, donor = with_nan(tmp_path, dtype)
    extract(base, donor, tmp_path / "out", target_modules="all", **options)
    cls = type(models.tiny_llama())
    wanted = cls.from_pretrained(donor)
    model = PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "out")
    if not options.get("exact"):
        config = GraftConfig(donor=str(donor), task_type="CAUSAL_LM", target_modules="all", **options)
        expected = reference(base, config, tmp_path / "reference", cls)
        assert_same_files(tmp_path / "out", expected)
    if options.get("density", 1.0) == 1.0:
        batch = {"input_ids": torch.tensor([[1, 2, 4, 5]])}
        assert same_bits(output(model, batch), output(wanted, batch))


@pytest.mark.parametrize("options", [{"target_modules": "all"}, {"modules_to_save": ["embed_tokens"]}], ids=str)
def test_nan_of_the_donor_alone_is_refused_everywhere(options: dict[str, Any], tmp_path: Path) -> None:
    base, donor = with_nan(tmp_path, torch.float32, in_base=False)
    with pytest.raises(DonorError, match=r"must be finite, got 16 NaN or Inf .*embed_tokens.*earlier checkpoint"):
        extract(base, donor, tmp_path / "out", density=0.1, **options)
    config = GraftConfig(donor=str(donor), density=0.1, **options)
    with pytest.raises(DonorError, match=r"must be finite, got 16 NaN or Inf .*embed_tokens.*earlier checkpoint"):
        get_peft_model(type(models.tiny_llama()).from_pretrained(base), config)


def test_nan_that_both_have_is_saved_with_a_whole_module(tmp_path: Path) -> None:
    base, donor = with_nan(tmp_path, torch.float32)
    options = {"density": 0.1, "modules_to_save": ["embed_tokens"], "task_type": "CAUSAL_LM"}
    extract(base, donor, tmp_path / "out", **options)
    config = GraftConfig(donor=str(donor), **copy.deepcopy(options))
    expected = reference(base, config, tmp_path / "reference", type(models.tiny_llama()))
    assert_same_files(tmp_path / "out", expected)


# Resized vocabularies


@pytest.mark.filterwarnings("ignore:donor should have as many rows as the base")
@pytest.mark.parametrize("live", [True, False])
def test_the_remedy_names_the_option_that_the_user_gave(live: bool, tmp_path: Path) -> None:
    base, donor = save_pair(tmp_path, models.tiny_llama)
    larger = type(models.tiny_llama()).from_pretrained(donor)
    larger.resize_token_embeddings(70, mean_resizing=False)
    larger.save_pretrained(donor)
    for options, remedy in (
        ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save without \['model.embed_tokens'\]\."),
        ({"target_modules": "all"}, r"exclude_modules=\['lm_head', 'model.embed_tokens'\]\."),
    ):
        with pytest.raises(DonorError, match=rf"resize_token_embeddings\(70\).*{remedy}$"):
            if live:
                config = GraftConfig(donor=str(donor), density=0.1, **copy.deepcopy(options))
                get_peft_model(type(models.tiny_llama()).from_pretrained(base), config)
            else:
                extract(base, donor, tmp_path / "out", density=0.1, **options)


# Code that comes with a model

OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

class OwnConfig(LlamaConfig):
    model_type = "own_tiny"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a prompt on stdin"))
    base, donor = save_pair(tmp_path, models.tiny_llama)
    for directory in (base, donor):
        (directory / "own_code.py").write_text(OWN_CODE)
        path = directory / "config.json"
        own = {
            "model_type": "own_tiny",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own_code.OwnConfig", "AutoModelForCausalLM": "own_code.OwnForCausalLM"},
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return base, donor


def test_a_model_with_code_of_its_own_is_refused_without_a_question(
    own_pair: tuple[Path, Path], tmp_path: Path
) -> None:
    message = (
        r"trust_remote_code must be set .* got False for '.*donor'.*trust_remote_code=True \(--trust-remote-code\)"
    )
    with pytest.raises(DonorError, match=message):
        extract(*own_pair, tmp_path / "out", density=0.1)
    assert not (tmp_path / "modules").exists()


def test_a_model_with_code_of_its_own_that_is_trusted(own_pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, donor = own_pair
    done = extract(base, donor, tmp_path / "out", density=1.0, target_modules="all", trust_remote_code=True)
    assert done.entries == done.eligible
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = PeftModel.from_pretrained(load(base, trust_remote_code=True), tmp_path / "out")
    assert model.peft_config["default"].task_type == "CAUSAL_LM"
    batch = {"input_ids": torch.tensor([[1, 2, 4, 5]])}
    expected = output(load(donor, trust_remote_code=True), batch)
    assert same_bits(output(model, batch), expected)
    for call in (
        lambda **more: export(tmp_path / "out", "checkpoint", tmp_path / "merged", **more),
        lambda **more: stitch([tmp_path / "out"], tmp_path / "again", **more),
    ):
        with pytest.raises(DonorError, match="trust_remote_code must be set"):
            call()
        call(trust_remote_code=True)
    assert same_bits(output(load(tmp_path / "merged", trust_remote_code=True), batch), expected)


# Subfolders


def test_checkpoints_in_subfolders(tmp_path: Path) -> None:
    """The adapter is that of the folders themselves; it names the base with its folder, and finds it again."""
    model = models.tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path / "base" / "text_encoder")
    perturbed(model).save_pretrained(tmp_path / "donor" / "text_encoder")
    folders = {"base_subfolder": "text_encoder", "donor_subfolder": "text_encoder"}
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=0.1, **folders)
    extract(*(tmp_path / role / "text_encoder" for role in ("base", "donor")), tmp_path / "plain", density=0.1)
    assert filecmp.cmp(*(tmp_path / out / "adapter_model.safetensors" for out in ("out", "plain")), shallow=False)
    config = GraftConfig.from_pretrained(tmp_path / "out")
    assert config.base_model_name_or_path == str(tmp_path / "base") and config.donor == str(tmp_path / "donor")
    assert (config.record.base_subfolder, config.donor_subfolder) == ("text_encoder", "text_encoder")
    for adapter in ("out", "plain"):
        export(tmp_path / adapter, "checkpoint", tmp_path / f"merged-{adapter}")
    merged = [tmp_path / f"merged-{adapter}" / "model.safetensors" for adapter in ("out", "plain")]
    assert filecmp.cmp(*merged, shallow=False)
    stitch([tmp_path / "out"], tmp_path / "stitched")
    assert GraftConfig.from_pretrained(tmp_path / "stitched").record.base_subfolder == "text_encoder"
    assert diff(tmp_path / "base", tmp_path / "donor", **folders).total.differing > 0


def test_a_donor_in_a_subfolder_of_a_model_in_memory(tmp_path: Path) -> None:
    model = models.tiny_llama()
    donor = perturbed(model)
    donor.save_pretrained(tmp_path / "donor" / "transformer")
    config = GraftConfig(
        donor=str(tmp_path / "donor"), donor_subfolder="transformer", density=1.0, target_modules="all"
    )
    grafted = get_peft_model(copy.deepcopy(model), config)
    assert torch.equal(output(grafted, inputs(model)), output(donor, inputs(model)))
