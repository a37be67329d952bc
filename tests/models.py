"""Tiny random models of every kind that the package meets. Built in milliseconds, never trained."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
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


def tiny_roberta(dtype: torch.dtype = torch.float32, seed: int = 0) -> RobertaForSequenceClassification:
    """Encoder whose head is a module with two Linears of its own."""
    config = RobertaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=1,
    )
    return _build(RobertaForSequenceClassification, config, dtype, seed)


def tiny_qwen(dtype: torch.dtype = torch.float32, seed: int = 0) -> Qwen2ForCausalLM:
    """Decoder with biases in the attention only, and a tied head."""
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _build(Qwen2ForCausalLM, config, dtype, seed)


def tiny_mixtral(dtype: torch.dtype = torch.float32, seed: int = 0) -> MixtralForCausalLM:
    """Decoder whose experts are parameters with three dimensions."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _build(MixtralForCausalLM, config, dtype, seed)


def tiny_mamba(dtype: torch.dtype = torch.float32, seed: int = 0) -> MambaForCausalLM:
    """State-space decoder: bare parameters beside submodules, and code that reads a Conv1d's weight directly."""
    config = MambaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=2,
        state_size=4,
        time_step_rank=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return _build(MambaForCausalLM, config, dtype, seed)


def tiny_vit(dtype: torch.dtype = torch.float32, seed: int = 0) -> ViTForImageClassification:
    """Vision encoder: a Conv2d, and bare parameters (class token, positions) of a module that has submodules."""
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=2,
    )
    return _build(ViTForImageClassification, config, dtype, seed)


def tiny_whisper(dtype: torch.dtype = torch.float32, seed: int = 0) -> WhisperForConditionalGeneration:
    """Speech encoder-decoder: two Conv1d, position embeddings, and a tied head."""
    config = WhisperConfig(
        vocab_size=VOCAB_SIZE,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=8,
        max_target_positions=16,
        decoder_start_token_id=0,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return _build(WhisperForConditionalGeneration, config, dtype, seed)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the words "t1" ... "t61"; "t0" ends a sequence."""
    vocabulary = {f"t{i}": i for i in range(VOCAB_SIZE - 2)} | {"<pad>": VOCAB_SIZE - 2, "<unk>": VOCAB_SIZE - 1}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="t0", unk_token="<unk>")


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
    """Random inputs (token ids where it takes any) that the model's forward takes, with labels for a loss."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    if isinstance(model, ViTForImageClassification):
        pixels = torch.randn(batch, 3, 8, 8, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.randint(2, (batch,), generator=generator)}
    if isinstance(model, WhisperForConditionalGeneration):
        features = torch.randn(batch, 8, 16, generator=generator).to(dtype)
        return {"input_features": features, "labels": torch.randint(2, VOCAB_SIZE, (batch, 4), generator=generator)}
    input_ids = torch.randint(2, VOCAB_SIZE, (batch, length), generator=generator)
    if isinstance(model, BertForSequenceClassification | RobertaForSequenceClassification):
        labels = torch.randint(model.config.num_labels, (batch,), generator=generator)
    elif isinstance(model, T5ForConditionalGeneration):
        labels = torch.randint(2, VOCAB_SIZE, (batch, length - 2), generator=generator)
    else:
        labels = input_ids.clone()
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
