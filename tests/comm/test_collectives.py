"""Every collective against literal results, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.collectives import (
    all_gather_dim,
    copy_to_group,
    exchange_rows,
    reduce_from_group,
    reduce_scatter_dim,
)
from tests.ranks import run_ranks


def value(rank: int, *shape: int) -> Tensor:
    """Distinct numbers on every rank: rank 0 has 0, 1, 2, .., rank 1 has 100, 101, .."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(count, dtype=torch.float64) + 100 * rank
    return numbers.view(shape).requires_grad_()


def backward(out: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(output, gradient of x) of the objective sum(out * weight)."""
    (out * weight).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad


def copy(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    x = value(rank, 2)
    return backward(copy_to_group(x, dist.group.WORLD), x, torch.tensor([1.0, 10.0]) * (rank + 1))


def reduce(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x = value(rank, 2)
    out, grad = backward(reduce_from_group(x, dist.group.WORLD), x, torch.tensor([1.0, 10.0]))
    return out, grad, x.detach()


def gather(rank: int, world_size: int, dim: int) -> tuple[Tensor, Tensor]:
    x = value(rank, 2, 2)
    out = all_gather_dim(x, dim, dist.group.WORLD)
    return backward(out, x, torch.arange(8.0).view_as(out) * 10**rank)


def scatter(rank: int, world_size: int, dim: int) -> tuple[Tensor, Tensor]:
    x = value(rank, 4, 2) if dim == 0 else value(rank, 2, 4)
    out = reduce_scatter_dim(x, dim, dist.group.WORLD)
    return backward(out, x, torch.arange(4.0).view_as(out) + 10 * rank)


def strided(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transposed inputs and, through expand, gradients without memory of their own."""
    x = value(rank, 2, 4)
    gathered = all_gather_dim(x.t(), -1, dist.group.WORLD)  # [4, 2 * ranks]
    summed = reduce_scatter_dim(x.t(), 0, dist.group.WORLD)  # [4 / ranks, 2]
    reduced = reduce_from_group(copy_to_group(x.t(), dist.group.WORLD), dist.group.WORLD)
    (gathered.sum() + summed.sum() + reduced.sum()).backward()
    assert x.grad is not None
    return gathered.detach(), summed.detach(), x.grad


def dtype_of_sum(rank: int, world_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x = torch.full((2, 2), float(rank + 1), dtype=dtype)
    group = dist.group.WORLD
    return reduce_scatter_dim(x, 1, group), all_gather_dim(x, 0, group)


def equal(actual: Tensor, expected: list[object]) -> bool:
    return torch.equal(actual, torch.tensor(expected, dtype=actual.dtype))


def test_copy_is_the_identity_and_its_gradient_the_sum() -> None:
    first, second = run_ranks(copy, 2)
    assert equal(first[0], [0, 1])
    assert equal(second[0], [100, 101])
    assert equal(first[1], [3, 30])
    assert equal(second[1], [3, 30])


def test_reduce_is_the_sum_and_its_gradient_the_identity() -> None:
    for rank, (out, grad, x) in enumerate(run_ranks(reduce, 2)):
        assert equal(out, [100, 102])
        assert equal(grad, [1, 10])
        assert equal(x, [100 * rank, 100 * rank + 1])  # the input is not modified


def test_gather_concatenates_along_rows() -> None:
    for rank, (out, grad) in enumerate(run_ranks(gather, 2, 0)):
        assert equal(out, [[0, 1], [2, 3], [100, 101], [102, 103]])
        # both ranks' weights (1 and 10 times 0..7), summed
        assert equal(grad, [[[0, 11], [22, 33]], [[44, 55], [66, 77]]][rank])


def test_gather_concatenates_along_columns() -> None:
    for rank, (out, grad) in enumerate(run_ranks(gather, 2, 1)):
        assert equal(out, [[0, 1, 100, 101], [2, 3, 102, 103]])
        assert equal(grad, [[[0, 11], [44, 55]], [[22, 33], [66, 77]]][rank])


def test_scatter_sums_and_keeps_rows() -> None:
    for rank, (out, grad) in enumerate(run_ranks(scatter, 2, 0)):
        assert equal(out, [[[100, 102], [104, 106]], [[108, 110], [112, 114]]][rank])
        assert equal(grad, [[0, 1], [2, 3], [10, 11], [12, 13]])


def test_scatter_sums_and_keeps_columns() -> None:
    for rank, (out, grad) in enumerate(run_ranks(scatter, 2, -1)):
        assert equal(out, [[[100, 102], [108, 110]], [[104, 106], [112, 114]]][rank])
        assert equal(grad, [[0, 1, 10, 11], [2, 3, 12, 13]])


def test_strides_do_not_matter() -> None:
    for rank, (gathered, summed, grad) in enumerate(run_ranks(strided, 2)):
        assert equal(gathered, [[c, c + 4, c + 100, c + 104] for c in range(4)])
        assert equal(summed, [[100 + 2 * c, 108 + 2 * c] for c in (2 * rank, 2 * rank + 1)])
        # gathered: 1 from each rank; summed: 1; copied: 1 from each rank
        assert equal(grad, [[5] * 4] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_are_kept(dtype: torch.dtype) -> None:
    for out, gathered in run_ranks(dtype_of_sum, 2, dtype):
        assert out.dtype == gathered.dtype == dtype
        assert equal(out, [[3], [3]])
        assert equal(gathered, [[1, 1]] * 2 + [[2, 2]] * 2)


def test_no_group_is_the_identity() -> None:
    x = torch.ones(2)
    assert copy_to_group(x, None) is x
    assert reduce_from_group(x, None) is x
    assert all_gather_dim(x, 0, None) is x
    assert reduce_scatter_dim(x, 0, None) is x


SENT = ((1, 0, 2), (0, 0, 1), (2, 1, 0))
"""Rows that each rank sends to each rank."""


def exchange(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    received = [row[rank] for row in SENT]
    x = value(rank, sum(SENT[rank]), 2)
    out = exchange_rows(x, SENT[rank], received, dist.group.WORLD)
    return backward(out, x, torch.arange(2.0 * len(out)).view_as(out) + 1000 * rank)


def test_rows_are_exchanged_and_their_gradients_return() -> None:
    (first, dfirst), (second, dsecond), (third, dthird) = run_ranks(exchange, 3)
    assert first.tolist() == [[0, 1], [200, 201], [202, 203]]
    assert second.tolist() == [[204, 205]]
    assert third.tolist() == [[2, 3], [4, 5], [100, 101]]
    assert dfirst.tolist() == [[0, 1], [2000, 2001], [2002, 2003]]
    assert dsecond.tolist() == [[2004, 2005]]
    assert dthird.tolist() == [[2, 3], [4, 5], [1000, 1001]]
    alone = value(0, 2)
    assert exchange_rows(alone, [2], [2], None) is alone
