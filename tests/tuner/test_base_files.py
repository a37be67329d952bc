"""What a base has in memory and not in its files: it travels whole, or the user is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, LlamaForCausalLM

from grafts import graft, output
from models import inputs, perturbed, tiny_bert, tiny_llama
from peft_graft import DonorError, GraftConfig
from peft_graft.patch.patch import PatchError
from peft_graft.workflows.extract import extract


def masked_lm_base(tmp_path: Path) -> tuple[Path, BertForSequenceClassification]:
    """A masked-LM checkpoint without pooler and classifier, and a donor that classifies."""
    donor = tiny_bert(num_labels=3)
    base = BertForMaskedLM(donor.config)
    base.bert.load_state_dict(perturbed(donor).bert.state_dict(), strict=False)
    base.save_pretrained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "donor")
    assert not any("pooler" in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    return tmp_path / "base", donor


def load_classifier(base: Path, seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(base, num_labels=3)


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
@pytest.mark.parametrize("targets", [None, "all", ["dense"]])
def test_a_pooler_that_the_base_lacks_travels_whole(targets: Any, task_type: str | None, tmp_path: Path) -> None:
    base, donor = masked_lm_base(tmp_path)
    config = GraftConfig(donor=donor, density=0.5, target_modules=targets, task_type=task_type)
    with pytest.warns(UserWarning, match=r"modules_to_save takes \[.*'bert.pooler.dense'.*\] whole from the donor"):
        grafted = get_peft_model(load_classifier(base, 1), config)
    wanted = output(grafted, inputs(donor))
    grafted.save_pretrained(tmp_path / "out")
    for seed in (2, 3):
        loaded = PeftModel.from_pretrained(load_classifier(base, seed), tmp_path / "out")
        assert torch.equal(output(loaded, inputs(donor)), wanted)


def test_files_without_a_pooler_give_the_donor(tmp_path: Path) -> None:
    base, donor = masked_lm_base(tmp_path)
    with pytest.warns(UserWarning, match=r"modules_to_save takes \['bert.pooler.dense'\] whole from the donor"):
        extract(base, tmp_path / "donor", tmp_path / "out", density=1.0, target_modules="all")
    loaded = PeftModel.from_pretrained(load_classifier(base, 2), tmp_path / "out")
    assert torch.equal(output(loaded, inputs(donor)), output(donor, inputs(donor)))


def test_what_the_user_leaves_out_stays_out(tmp_path: Path) -> None:
    base, donor = masked_lm_base(tmp_path)
    options = {"density": 0.5, "task_type": "SEQ_CLS"}
    left = graft(load_classifier(base, 1), donor, exclude_modules=["pooler.dense"], **options)
    named = graft(load_classifier(base, 1), donor, modules_to_save=["pooler"], **options)
    assert left.active_peft_config.modules_to_save == ["classifier", "score"]
    assert named.active_peft_config.modules_to_save == ["pooler", "classifier", "score"]


def test_a_head_of_another_size_in_the_files_travels_whole(tmp_path: Path) -> None:
    tiny_bert(num_labels=2).save_pretrained(tmp_path / "base")
    donor = perturbed(tiny_bert(num_labels=3))
    base = BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
    with pytest.warns(UserWarning, match=r"modules_to_save takes \['classifier'\] whole"):
        grafted = graft(base, donor, density=1.0, target_modules="all")
    assert torch.equal(output(grafted, inputs(donor)), output(donor, inputs(donor)))


def test_a_bare_encoder_as_the_base_of_a_classifier(tmp_path: Path) -> None:
    donor = tiny_bert(num_labels=3)
    BertModel(donor.config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="modules_to_save takes .*'bert.pooler.dense'.*'classifier'"):
        grafted = graft(load_classifier(tmp_path / "base", 1), donor, density=1.0, target_modules="all")
    assert torch.equal(output(grafted, inputs(donor)), output(donor, inputs(donor)))


class TestResizedVocabularies:
    @staticmethod
    def resized(tmp_path: Path, tied: bool, seed: int = 0) -> LlamaForCausalLM:
        if not (tmp_path / "base").exists():
            tiny_llama(tied=tied).save_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(66)
        return base

    def test_rows_that_were_added_travel_whole(self, tmp_path: Path) -> None:
        base = self.resized(tmp_path, tied=False)
        donor = perturbed(base)
        with pytest.warns(UserWarning, match=r"takes \['model.embed_tokens', 'lm_head'\] whole"):
            grafted = graft(base, donor, density=1.0)
        with pytest.warns(UserWarning, match="embedding layer has been resized"):  # PEFT's
            grafted.save_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(self.resized(tmp_path, tied=False, seed=5), tmp_path / "out")
        assert torch.equal(output(loaded, inputs(donor)), output(donor, inputs(donor)))

    def test_rows_of_tied_embeddings_need_a_base_that_is_written_once(self, tmp_path: Path) -> None:
        base = self.resized(tmp_path, tied=True)
        donor = perturbed(base)
        with pytest.raises(DonorError, match=r"base must hold every targeted tensor in its files.*64, 16"):
            graft(base, donor, density=1.0, target_modules="all")
        base.save_pretrained(tmp_path / "resized")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "resized")
        graft(base, donor, density=1.0, target_modules="all").save_pretrained(tmp_path / "out")
        loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "resized"), tmp_path / "out")
        assert torch.equal(output(loaded, inputs(donor)), output(donor, inputs(donor)))

    @pytest.mark.parametrize("tied", [False, True])
    def test_a_larger_vocabulary_of_the_donor_is_never_cut_in_silence(self, tied: bool, tmp_path: Path) -> None:
        donor = perturbed(self.resized(tmp_path, tied))
        donor.save_pretrained(tmp_path / "donor")
        told = r"donor should have as many rows as the base, got 66 for 64 in .*resize_token_embeddings\(66\)"
        with pytest.warns(UserWarning, match=told):
            extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=0.1)
        with pytest.warns(UserWarning, match=told):
            graft(tiny_llama(tied=tied), donor, density=0.1)
        with pytest.raises(DonorError, match="resized vocabulary.*66 in the donor"):
            extract(tmp_path / "base", tmp_path / "donor", tmp_path / "all", density=0.1, target_modules="all")


class TestChangedBases:
    """The base in memory is not what its files hold."""

    def test_a_merged_adapter_is_told(self, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path / "base")
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        base = get_peft_model(copy.deepcopy(plain), lora).merge_and_unload()
        donor = perturbed(base)
        with pytest.warns(UserWarning, match=r"base should be as its files in .*self_attn\.q_proj\.weight"):
            grafted = graft(base, donor, density=1.0, target_modules="all")
        assert torch.equal(output(grafted, inputs(base)), output(donor, inputs(base)))
        grafted.save_pretrained(tmp_path / "out")
        with pytest.raises(PatchError, match=r"all of them in .*q_proj\.weight"):
            PeftModel.from_pretrained(plain, tmp_path / "out")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
    def test_other_dtypes_are_no_change(self, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
        tiny_llama(stored).save_pretrained(tmp_path / "base")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
        for each in (base, copy.deepcopy(base).float()):  # warnings are errors
            graft(each, perturbed(each), density=0.1, target_modules="all")

    def test_files_that_cannot_be_read_tell_nothing(self, tmp_path: Path) -> None:
        tiny_llama().save_pretrained(tmp_path / "base")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        (tmp_path / "base" / "model.safetensors").unlink()
        graft(base, perturbed(base), density=0.1)


def test_the_error_of_the_loader_names_tensors_that_are_new(tmp_path: Path) -> None:
    """An adapter that was made without the files, so that nothing could be known then."""
    base, donor = masked_lm_base(tmp_path)
    made = load_classifier(base, 1)
    made.name_or_path = ""
    graft(made, donor, density=1.0, target_modules="all").save_pretrained(tmp_path / "out")
    with pytest.raises(PatchError, match=r"new at every load.*modules_to_save=\[.*'bert\.pooler\.dense'"):
        PeftModel.from_pretrained(load_classifier(base, 2), tmp_path / "out")


def test_a_wrapped_base_file_that_transformers_does_not_read_is_told(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file({f"module.{name}": value for name, value in load_file(file).items()}, file, {"format": "pt"})
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")  # with new values everywhere
    with pytest.warns(UserWarning, match="base should be as its files in"):
        graft(base, perturbed(base), density=0.1)
