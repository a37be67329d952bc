"""Run patched layers under autograd, with gradients at the candidates only and without a copy of the weight."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ...peft_compat.torch_names import hooks_of, without_view_mark
from ...peft_compat.transformers_names import is_experts
from .in_place import ResolvedTensor, patched_copy, written

Kernel = Literal["gathered", "sampled", "dense"]

# Their forward is one function of input, weight and bias, and returns no view of these.
_SIMPLE = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class SparseGrad(NamedTuple):
    """A patch of one parameter under autograd: entries to write, and entries whose gradients are wanted.

    Attributes:
        indices: Flat indices whose gradients are wanted, int64 [n], increasing.
        values: Takes these gradients, float [n]; its numbers do not matter.
        at: Flat indices to write to, int64 [k], increasing.
        put: What to write there, [k], in the parameter's dtype.
    """

    indices: torch.Tensor
    values: torch.Tensor
    at: torch.Tensor
    put: torch.Tensor


class Costs(NamedTuple):
    """Costs of the gradient per token, in any unit: only ratios matter."""

    dense: float  # per entry of the weight: a matrix product that computes all of them
    transposed: float  # per row and column: laying out what the product at single entries reads
    sampled: float  # per candidate: that product
    gathered: float  # per candidate: gathering both factors


# Nanoseconds on one core of a Xeon with AVX-512, and AMX for half precision: benchmarks/mask_kernels.py.
_COSTS = {
    "float": Costs(dense=0.0094, transposed=1.1, sampled=0.07, gathered=1.3),
    "half": Costs(dense=0.0025, transposed=1.1, sampled=0.07, gathered=1.3),
}
# Other devices, by the numbers of a data sheet: there a dense product costs next to nothing.
_ELSEWHERE = Costs(dense=1, transposed=float("inf"), sampled=float("inf"), gathered=7000)
_TOKENS = 256  # at a time: what is laid out or gathered stays in the cache, and below a weight's size
_GATHERED = 1 << 17  # entries of a factor at a time, for the same reason


def choose_kernel(candidates: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Kernel:
    """Choose how to compute the gradient of a weight at its candidates.

    All costs are proportional to the number of tokens, so it does not matter.

    Args:
        candidates: Number of entries whose gradient is wanted.
        shape: Of the weight.
        device: Where it is.
        dtype: Of the factors.

    Returns:
        `"gathered"`, columns of both factors, multiplied and summed; `"sampled"`, a matrix product at single entries;
        or `"dense"`, the whole gradient and then its entries.
    """
    if device.type == "cpu":
        costs = _COSTS["float" if dtype in (torch.float32, torch.float64) else "half"]
    else:
        costs = _ELSEWHERE
    times: dict[Kernel, float] = {
        "gathered": costs.gathered * candidates,
        "sampled": costs.transposed * sum(shape) + costs.sampled * candidates,
        "dense": costs.dense * shape[0] * shape[1],
    }
    if not _can_sample():
        del times["sampled"]
    return min(times, key=lambda kernel: times[kernel])


@functools.cache
def _can_sample() -> bool:
    """Return whether this build of torch has the sampled product on the CPU; silence its warning on sparse tensors."""
    pattern, one = (torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1)), torch.ones(1, 1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", UserWarning)
        try:
            torch.sparse.sampled_addmm(torch.sparse_csr_tensor(*pattern, size=(1, 1)), one, one)
        except RuntimeError:
            return False
    return True


def product_at(
    left: torch.Tensor, right: torch.Tensor, indices: torch.Tensor, kernel: Kernel | None = None
) -> torch.Tensor:
    """Compute entries of left^T @ right, summed over tokens in float32 or more precisely.

    Args:
        left: Float [tokens, rows].
        right: Float [tokens, columns], same dtype.
        indices: Flat indices into [rows, columns], int64 [n], increasing.
        kernel: How, where this build of torch can; None for the fastest.

    Returns:
        Float [n], float64 where the factors are, else float32.
    """
    shape = (left.shape[1], right.shape[1])
    if kernel is None or (kernel == "sampled" and not _can_sample()):
        kernel = choose_kernel(len(indices), shape, left.device, left.dtype)
    wide = torch.promote_types(left.dtype, torch.float32)
    if kernel == "dense":
        return (left.t() @ right).view(-1)[indices].to(wide)
    columns = indices % shape[1]
    if kernel == "sampled":
        starts = torch.searchsorted(indices, torch.arange(0, shape[0] + 1, device=indices.device) * shape[1])
        sums = torch.zeros(len(indices), dtype=wide, device=left.device)
        result = torch.sparse_csr_tensor(starts, columns, sums, size=shape, check_invariants=False)
        for part, other in zip(left.split(_TOKENS), right.split(_TOKENS), strict=True):
            torch.sparse.sampled_addmm(result, part.to(wide).t(), other.to(wide), out=result)
        return result.values()
    rows = indices // shape[1]
    total = torch.zeros(len(indices), dtype=wide, device=left.device)
    tokens = max(1, _GATHERED // max(1, len(indices)))
    for part, other in zip(left.split(tokens), right.split(tokens), strict=True):
        products = part.to(wide).index_select(1, rows).mul_(other.to(wide).index_select(1, columns))
        total.addmv_(products.t(), products.new_ones(len(products)))
    return total


class _PatchedLinear(torch.autograd.Function):
    """y = x W^T + b (x W + b for Conv1D) with patches on W and b, whose gradients are taken only where wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        part: SparseGrad,
        bias_part: SparseGrad | None,
        values: torch.Tensor,
        bias_values: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.transposed, ctx.dtype = transposed, values.dtype
        wanted = part.indices if ctx.needs_input_grad[6] else None
        bias_wanted = bias_part.indices if bias_part is not None and ctx.needs_input_grad[7] else None
        ctx.save_for_backward(None if wanted is None else x, weight, part.at, part.put, wanted, bias_wanted)
        if bias is not None and bias_part is not None:
            bias = patched_copy(bias, bias_part.at, bias_part.put)
        with written(weight, ResolvedTensor(None, part.at, part.put)) as patched:
            if bias is None or not transposed:  # Conv1D has a bias
                y = F.linear(x, patched, bias)
            else:
                y = torch.addmm(bias, x.view(-1, x.size(-1)), patched).view(*x.shape[:-1], -1)
        return without_view_mark(y)  # models write to what a layer returns, and a Function's views forbid it

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, at, put, wanted, bias_wanted = ctx.saved_tensors
        grads: list[torch.Tensor | None] = [None] * 8
        rows = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            with written(weight, ResolvedTensor(None, at, put)) as patched:
                patched = patched.to(grad.dtype)
                grads[0] = grad @ (patched.t() if ctx.transposed else patched)
        if wanted is not None:
            inputs = x.reshape(-1, x.shape[-1]).to(grad.dtype)
            left, right = (inputs, rows) if ctx.transposed else (rows, inputs)
            grads[6] = product_at(left, right, wanted).to(ctx.dtype)
        if bias_wanted is not None:
            few = 8 * len(bias_wanted) < rows.shape[1]
            grads[7] = rows.index_select(1, bias_wanted).sum(0) if few else rows.sum(0)[bias_wanted]
        return tuple(grads)


class _PatchedEmbedding(torch.autograd.Function):
    """Rows of W with a patch on it; the gradient of W is computed only at the candidates, from the rows looked up."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: torch.Tensor,
        weight: torch.Tensor,
        padding: int | None,
        part: SparseGrad,
        values: torch.Tensor,
    ) -> torch.Tensor:
        ctx.padding, ctx.dtype = padding, values.dtype
        ctx.save_for_backward(ids, part.indices)
        with written(weight, ResolvedTensor(None, part.at, part.put)) as patched:
            return F.embedding(ids, patched)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ids, indices = ctx.saved_tensors
        width = grad.shape[-1]
        rows = grad.reshape(-1, width).to(torch.promote_types(grad.dtype, torch.float32))
        looked_up, where = ids.reshape(-1).unique(return_inverse=True)
        sums = rows.new_zeros(len(looked_up), width).index_add_(0, where, rows)
        if ctx.padding is not None:
            sums[looked_up == ctx.padding] = 0
        wanted = indices // width
        at = torch.searchsorted(looked_up, wanted).clamp_(max=len(looked_up) - 1)
        found = torch.where(looked_up[at] == wanted, sums[at, indices % width], 0)
        return None, None, None, None, found.to(ctx.dtype)


def is_simple(module: nn.Module) -> bool:
    """Return whether the output is computed anew from the parameters, and nobody else looks at these meanwhile."""
    return _is_known(module) and not hooks_of(module)


def _is_known(module: nn.Module) -> bool:
    # Each model of transformers has a norm class of its own, and their experts have a mark. A class from elsewhere that
    # is only called so may keep its weight, or return a view of it.
    kind = type(module)
    norm = kind.__name__.endswith("RMSNorm") and kind.__module__.startswith("transformers.models.")
    return (kind in _SIMPLE or norm or is_experts(module)) and "forward" not in vars(module)


def _gathers(hook: Any) -> bool:
    """Return whether this is a hook of ZeRO-3, which gathers for the layer around the module as well."""
    return getattr(hook, "__module__", "").startswith("deepspeed.")


def patched_run(module: nn.Module) -> Callable[..., torch.Tensor] | None:
    """Find the kernel that runs a module with a patch on its weight.

    Args:
        module: A wrapped module.

    Returns:
        A function of (module, input, part of the weight, part of the bias or None) that returns what the module
        returns. None where there is none, so that the module itself must run on a patched copy.
    """
    if not _is_known(module) or not all(map(_gathers, hooks_of(module))):
        return None
    if any(parameter.requires_grad for parameter in module.parameters()):
        return None
    if isinstance(module, nn.Linear | Conv1D):
        return _run_linear
    if isinstance(module, nn.Embedding) and not (module.max_norm or module.scale_grad_by_freq or module.sparse):
        return _run_embedding
    return None


def _run_linear(module: Any, x: torch.Tensor, weight: SparseGrad, bias: SparseGrad | None) -> torch.Tensor:
    values = weight.values, None if bias is None else bias.values
    return _PatchedLinear.apply(x, module.weight, module.bias, isinstance(module, Conv1D), weight, bias, *values)


def _run_embedding(module: Any, ids: torch.Tensor, weight: SparseGrad, bias: None) -> torch.Tensor:
    return _PatchedEmbedding.apply(ids, module.weight, module.padding_idx, weight, weight.values)
