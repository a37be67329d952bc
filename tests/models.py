"""Tiny random models of the three families: encoder, decoder, encoder-decoder. Built in milliseconds, never trained."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB_SIZE = 64


def _build(model_class: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, seed: int) -> nn.Module:
    """Build a model in eval mode from its own stream of random numbers, leaving the global one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).to(dtype).eval()


def tiny_bert(dtype: torch.dtype = torch.float32, seed: int = 0, num_labels: int = 2) -> BertForSequenceClassification:
    """Encoder with a classification head: Linear, Embedding and LayerNorm, all with biases."""
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        num_labels=num_labels,
    )
    return _build(BertForSequenceClassification, config, dtype, seed)


def tiny_gpt2(dtype: torch.dtype = torch.float32, seed: int = 0) -> GPT2LMHeadModel:
    """Decoder with Conv1D layers (weights transposed) and a head tied to the embedding."""
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _build(GPT2LMHeadModel, config, dtype, seed)


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0, tied: bool = False) -> LlamaForCausalLM:
    """Decoder with RMSNorm, no biases, grouped key-value heads, and a head of its own (unless `tied`)."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _build(LlamaForCausalLM, config, dtype, seed)


def tiny_t5(dtype: torch.dtype = torch.float32, seed: int = 0) -> T5ForConditionalGeneration:
    """Encoder-decoder whose embedding is shared by encoder and decoder; in float16 two layers stay in float32."""
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = _build(T5ForConditionalGeneration, config, dtype, seed)
    if dtype == torch.float16:  # as from_pretrained does: these overflow
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    return model


def perturbed(model: nn.Module, scale: float = 0.02, seed: int = 1) -> nn.Module:
    """Copy a model and add N(0, scale) to every parameter: a donor.

    The sum is rounded to the parameter's dtype, so in half precision some entries stay at the base. Tied parameters
    stay tied and move once; buffers stay.
    """
    donor = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_((parameter.float() + noise).to(parameter.dtype))
    return donor


def inputs(model: nn.Module, batch: int = 3, length: int = 7, seed: int = 2) -> dict[str, torch.Tensor]:
    """Random token ids that the model's forward takes, with labels, so that there is a loss."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(2, VOCAB_SIZE, (batch, length), generator=generator)
    if isinstance(model, BertForSequenceClassification):
        labels = torch.randint(model.config.num_labels, (batch,), generator=generator)
    elif isinstance(model, T5ForConditionalGeneration):
        labels = torch.randint(2, VOCAB_SIZE, (batch, length - 2), generator=generator)
    else:
        labels = input_ids.clone()
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
