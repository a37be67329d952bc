"""A cache of the Hub with tiny random models under the names that PEFT's suites load, so that they need no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_WIDTHS: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
# PEFT's tests take the end of a text for padding when they compare generations.
_IDS = {"bos_token_id": 2, "eos_token_id": 97, "pad_token_id": 97}


def _make(name: str, task: str, **options: Any) -> Callable[[], nn.Module]:
    """How to make a random model: prefix of its config's class, ending of its own."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name.removesuffix('Text')}{task}")(config)

    return make


_LLAMA = _WIDTHS | _IDS | {"num_key_value_heads": 2}
_BERT = _WIDTHS | {"pad_token_id": 0}
_ROBERTA = _WIDTHS | {"pad_token_id": 1}
_GPT2 = _IDS | {"vocab_size": 128, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 4}
_GPTJ = _GPT2 | {"rotary_dim": 2}
_OPT = _IDS | {
    "vocab_size": 128,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "ffn_dim": 37,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 16,
}
_T5 = {
    "vocab_size": 128,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 97,
}
_BART = {
    "vocab_size": 128,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 97,
    "pad_token_id": 98,
    "decoder_start_token_id": 97,
    "forced_eos_token_id": 97,
}
_GEMMA = _LLAMA | {"head_dim": 4, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = _LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _make("OPT", "ForCausalLM", **_OPT),
    "peft-internal-testing/opt-125m": _make("OPT", "ForCausalLM", **_OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _make("GPT2", "LMHeadModel", **_GPT2),
    "hf-internal-testing/tiny-random-gpt2": _make("GPT2", "LMHeadModel", **_GPT2),
    "gpt2": _make("GPT2", "LMHeadModel", **_GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _make("GPTJ", "ForCausalLM", **_GPTJ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _make("Llama", "ForCausalLM", **_LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _make("Llama", "ForCausalLM", **_LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": _make("Qwen2", "ForCausalLM", **_LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _make("Gemma3Text", "ForCausalLM", **_GEMMA),
    "peft-internal-testing/tiny-random-BloomForCausalLM": _make(
        "Bloom", "ForCausalLM", vocab_size=128, hidden_size=16, n_layer=5, n_head=4, **_IDS
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": _make(
        "Llama4Text", "ForCausalLM", **_EXPERTS, intermediate_size_mlp=37, moe_layers=[0, 1], no_rope_layers=[1, 1]
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": _make(
        "GptOss", "ForCausalLM", **_EXPERTS | {"intermediate_size": 32}, sliding_window=8
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _make(
        "T5", "ForConditionalGeneration", **_T5
    ),
    "google/flan-t5-small": _make("T5", "ForConditionalGeneration", **_T5),
    "peft-internal-testing/tiny-random-t5": _make("T5", "ForConditionalGeneration", **_T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _make(
        "Bart", "ForConditionalGeneration", **_BART
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _make(
        "ResNet", "ForImageClassification", hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8, num_labels=3
    ),
    "bert-base-uncased": _make("Bert", "ForPreTraining", **_BERT),
    "peft-internal-testing/tiny-random-BertModel": _make("Bert", "Model", **_BERT),
    "peft-internal-testing/tiny-random-RobertaModel": _make("Roberta", "Model", **_ROBERTA),
    "peft-internal-testing/tiny-random-DebertaModel": _make(
        "Deberta", "Model", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _make(
        "DebertaV2", "Model", **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _make(
        "Bert", "ForSequenceClassification", **_BERT
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _make(
        "Roberta", "ForSequenceClassification", **_ROBERTA
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": _make(
        "Llama", "ForSequenceClassification", **_LLAMA
    ),
}


def fill(home: Path) -> None:
    """Write the models into a cache of the Hub.

    Args:
        home: What `HF_HOME` will say.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    for name, make in MODELS.items():
        torch.manual_seed(0)
        folder = home / "hub" / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(commit)
        model = make()
        model.save_pretrained(folder / "snapshots" / commit)
        if model.main_input_name == "pixel_values":
            from transformers import ConvNextImageProcessorPil

            ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(folder / "snapshots" / commit)
