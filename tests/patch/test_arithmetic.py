"""The graft equation on single tensors, and sums over patches that do not depend on the order of the patches."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from grafts import DTYPES, same_bits
from peft_graft.patch.arithmetic import align_indices, grafted_values, masked_sum, scatter_rows


def never() -> torch.Tensor:
    raise AssertionError("the base is not needed at alpha = 1")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_1_gives_the_bits_of_the_donor(dtype: torch.dtype) -> None:
    base, donor = torch.tensor([1e4, 1.0, 0.0]).to(dtype), torch.tensor([1e-4, -0.0, 0.1]).to(dtype)
    assert not same_bits((base.float() + (donor.float() - base.float())).to(dtype), donor)  # or this would show nothing
    assert same_bits(grafted_values(base, donor, 1), donor)
    assert same_bits(grafted_values(never, donor, 1.0), donor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.7, -3.0])
def test_another_alpha_is_computed_in_float32(dtype: torch.dtype, alpha: float) -> None:
    base, donor = torch.tensor([0.1, 2.0]).to(dtype), torch.tensor([0.3, -1.0]).to(dtype)
    wanted = base.float() + alpha * (donor.float() - base.float())
    assert same_bits(grafted_values(base, donor, alpha), wanted)
    assert same_bits(grafted_values(lambda: base, donor, alpha), wanted)


def test_gradients_reach_an_alpha_that_is_a_tensor() -> None:
    alpha = torch.tensor(1.0, requires_grad=True)
    base, donor = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 0.0])
    grafted_values(base, donor, alpha).sum().backward()
    assert alpha.grad == (donor - base).sum()


def test_patches_side_by_side() -> None:
    indices, positions = align_indices([torch.tensor([2, 9]), torch.tensor([0, 2, 5])])
    assert indices.tolist() == [0, 2, 5, 9]
    rows, taken = scatter_rows([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])], positions, 4)
    assert rows.tolist() == [[0, 1, 0, 2], [3, 4, 5, 0]] and rows.dtype == torch.float64
    assert taken.tolist() == [[False, True, False, True], [True, True, True, False]]


def test_a_sum_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = torch.tensor([[1e20, -0.0, 1.0], [-1e20, -0.0, 2.0], [1.0, 7.0, 4.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, True]])
    sums = [masked_sum(rows[list(order)], mask[list(order)]) for order in permutations(range(3))]
    assert all(same_bits(one, sums[0]) for one in sums)
    assert sums[0][1:].tolist() == [0.0, 5.0] and bool(torch.signbit(sums[0][1]))
