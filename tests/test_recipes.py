"""Recipes of the guides that no function of the package wraps."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertModel

from grafts import output
from models import inputs, perturbed, tiny_bert, tiny_llama, word_tokenizer
from peft_graft.workflows.export import export
from peft_graft.workflows.extract import extract


def test_a_sentence_transformer_takes_an_adapter(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = BertModel(tiny_bert().config).eval()
    donor = perturbed(base)
    for name, model in (("base", base), ("donor", donor)):
        model.save_pretrained(tmp_path / name)
        word_tokenizer().save_pretrained(tmp_path / name)
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", density=1.0, target_modules="all")
    first = sentence_transformers.SentenceTransformer(str(tmp_path / "base"), device="cpu")[0]
    wanted = sentence_transformers.SentenceTransformer(str(tmp_path / "donor"), device="cpu")[0]
    first.auto_model = PeftModel.from_pretrained(first.auto_model, tmp_path / "out")
    batch = {key: value for key, value in inputs(tiny_bert()).items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(first(dict(batch))["token_embeddings"], wanted(dict(batch))["token_embeddings"])


def test_two_steps_of_a_chain_become_one(tmp_path: Path) -> None:
    """base -> first -> second: export each step, then extract the last from the first base."""
    base = tiny_llama(torch.bfloat16)
    first = perturbed(base, seed=1)
    base.save_pretrained(tmp_path / "base")
    first.save_pretrained(tmp_path / "first")
    extract(tmp_path / "base", tmp_path / "first", tmp_path / "step1", density=0.05, target_modules="all")
    export(tmp_path / "step1", to="checkpoint", output_dir=tmp_path / "after1")
    perturbed(type(base).from_pretrained(tmp_path / "after1"), seed=2).save_pretrained(tmp_path / "second")
    extract(tmp_path / "after1", tmp_path / "second", tmp_path / "step2", density=0.05, target_modules="all")
    export(tmp_path / "step2", to="checkpoint", output_dir=tmp_path / "after2")
    extract(tmp_path / "base", tmp_path / "after2", tmp_path / "squashed", exact=True, target_modules="all")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "squashed")
    wanted = type(base).from_pretrained(tmp_path / "after2").eval()
    assert torch.equal(output(loaded, inputs(base)), output(wanted, inputs(base)))
