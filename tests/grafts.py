"""What tests of a live graft share: making one, looking at bits, and small modules with odd shapes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from peft_graft import GraftConfig
from peft_graft.tuner.apply.in_place import has_patch

FAMILIES = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def graft(base: nn.Module, donor: Any, adapter_name: str = "default", **options: Any) -> PeftModel:
    """Graft a copy of the base."""
    return get_peft_model(copy.deepcopy(base), GraftConfig(donor=donor, **options), adapter_name=adapter_name)


def output(model: nn.Module, batch: Any) -> torch.Tensor:
    """Logits (or what a plain module returns) in evaluation mode."""
    with torch.no_grad():
        result = model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
    return getattr(result, "logits", result)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit, also of zeros and NaN."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    one, other = (tensor.detach().reshape(-1).contiguous().view(torch.uint8) for tensor in (one, other))
    return torch.equal(one, other)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of a plain model's parameters; tied ones once."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Both hold the same tensors, bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not same_bits(one[name], other[name])] == []


def runs(model: nn.Module) -> list[str]:
    """Names of the parameters that a call runs on right now: none, once every patch is off again."""
    return [name for name, parameter in model.named_parameters() if has_patch(parameter)]


def largest(base: nn.Module, donor: nn.Module, names: list[str], k: int) -> dict[str, list[int]]:
    """Flat indices of the k largest |donor - base| of these tensors, by a sort of everything at once."""
    before, after = dict(base.named_parameters()), dict(donor.named_parameters())
    entries = []
    for name in names:
        delta = (after[name].detach().float() - before[name].detach().float()).abs().flatten()
        entries += [(-value, name, index) for index, value in enumerate(delta.tolist())]
    found: dict[str, list[int]] = {}
    for _, name, index in sorted(entries)[:k]:
        found.setdefault(name, []).append(index)
    return {name: sorted(found[name]) for name in sorted(found)}


def held(model: PeftModel, adapter_name: str = "default") -> dict[str, list[int]]:
    """Flat indices that an adapter holds, by tensor name."""
    found = {}
    for name, (layer, param) in model.base_model.targets(adapter_name).items():
        slot = layer.graft_patch[adapter_name]
        if layer.keys[param] in slot.params:
            found[name] = slot.indices(layer.keys[param]).tolist()
    return found


class MLP(nn.Module):
    """Two Linears and a norm; the smallest thing to graft."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.LayerNorm(width)
        self.second = nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(x))))


class Single(nn.Module):
    """One module."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.unit(x)
