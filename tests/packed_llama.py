"""A rank's part of a Llama, with weights packed and sharded as an inference engine holds them. It computes nothing.

`load_weights` takes tensors by the names of a checkpoint and writes the rank's part of each with one `copy_`, as the
loaders of vLLM's models do: q, k and v into one parameter, gate and up into one, rows or columns of each by rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

PACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class PackedLlama(nn.Module):
    """Parameters of one rank of `size`.

    Args:
        config: Shape of the model.
        rank: Number of this rank.
        size: Number of ranks; it divides the heads.
        dtype: Dtype of the parameters, which may differ from the checkpoint's.
    """

    def __init__(self, config: Any, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.rank, self.size = rank, size
        hidden, heads = config.hidden_size, config.num_attention_heads
        width = hidden // heads
        self.parts = {
            "qkv_proj": [heads * width, config.num_key_value_heads * width, config.num_key_value_heads * width],
            "gate_up_proj": [config.intermediate_size] * 2,
        }
        # One row of padding on every rank, which a loader fills with zeros.
        vocabulary = (config.vocab_size // size + 1, hidden)
        shapes = {"model.embed_tokens.weight": vocabulary, "model.norm.weight": (hidden,), "lm_head.weight": vocabulary}
        for layer in range(config.num_hidden_layers):
            at = f"model.layers.{layer}"
            shapes |= {
                f"{at}.self_attn.qkv_proj.weight": (sum(self.parts["qkv_proj"]) // size, hidden),
                f"{at}.self_attn.o_proj.weight": (hidden, hidden // size),
                f"{at}.mlp.gate_up_proj.weight": (sum(self.parts["gate_up_proj"]) // size, hidden),
                f"{at}.mlp.down_proj.weight": (hidden, config.intermediate_size // size),
                f"{at}.input_layernorm.weight": (hidden,),
                f"{at}.post_attention_layernorm.weight": (hidden,),
            }
        self.weights = nn.ParameterDict(
            {name.replace(".", "/"): nn.Parameter(torch.zeros(shape, dtype=dtype)) for name, shape in shapes.items()}
        )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Write this rank's part of each tensor; return the names of the parameters that were written."""
        return {self._load(name, tensor) for name, tensor in weights}

    @torch.no_grad()
    def _load(self, name: str, tensor: torch.Tensor) -> str:
        kind = name.split(".")[-2]
        packed, part = PACKED.get(kind, (kind, None))
        target = name.replace(f".{kind}.", f".{packed}.")
        parameter = self.weights[target.replace(".", "/")].data
        if part is not None:
            start, rows = sum(self.parts[packed][:part]) // self.size, self.parts[packed][part] // self.size
            parameter.narrow(0, start, rows).copy_(tensor.narrow(0, self.rank * rows, rows))
        elif kind in ("o_proj", "down_proj"):
            columns = parameter.shape[1]
            parameter.copy_(tensor.narrow(1, self.rank * columns, columns))
        elif kind in ("embed_tokens", "lm_head"):
            rows = parameter.shape[0] - 1
            parameter[:rows].copy_(tensor.narrow(0, self.rank * rows, rows))
            parameter[rows:].fill_(0)
        else:
            parameter.copy_(tensor)
        return target


def engine_config(directory: Any) -> Any:
    """Return the shape of a saved model."""
    return LlamaConfig.from_pretrained(directory)
