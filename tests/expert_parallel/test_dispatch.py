"""Dispatch and combine against a loop over experts on whole tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.expert_parallel import Dispatch, Splits, count_rows
from tests.ranks import run_ranks

TOKENS, EXPERTS, TOPK, HIDDEN = 10, 8, 3, 6


def whole(world_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, choices, weights and a matrix per expert; the last two experts are never chosen."""
    generator = torch.Generator().manual_seed(world_size)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    n = TOKENS * world_size
    scores = torch.rand(n, EXPERTS - 2, **options)
    scores[:, 1] += 0.5  # a busy expert
    x = torch.randn(n, HIDDEN, **options).requires_grad_()
    weights = torch.rand(n, TOPK, **options).requires_grad_()
    matrices = torch.randn(EXPERTS, HIDDEN, HIDDEN, **options)
    return x, scores.topk(TOPK).indices, weights, matrices


def expected(world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    x, experts, weights, matrices = whole(world_size)
    out = torch.zeros_like(x)
    for k in range(TOPK):
        product = torch.einsum("ni,noi->no", x, matrices[experts[:, k]])
        out = out + weights[:, k : k + 1] * product.sin()
    (out * torch.arange(HIDDEN)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return out.detach(), x.grad, weights.grad


def dispatched(rank: int, world_size: int) -> tuple[Tensor, Tensor, Tensor, Splits]:
    group = dist.group.WORLD
    x, experts, weights, matrices = whole(world_size)
    own = slice(rank * TOKENS, (rank + 1) * TOKENS)
    splits = count_rows(experts[own], EXPERTS, group)
    way = Dispatch(experts[own], splits, group)
    rows, factors = way.send(x[own], weights[own])
    here = matrices.chunk(world_size)[rank]
    parts = [part @ matrix.T for part, matrix in zip(rows.split(splits.counts), here)]
    out = way.back(torch.cat(parts).sin() * factors[:, None])
    (out * torch.arange(HIDDEN)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return out.detach(), x.grad[own], weights.grad[own], splits


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_token_gets_the_weighted_sum_of_its_experts(world_size: int) -> None:
    found = run_ranks(dispatched, world_size)
    for place, tensor in enumerate(expected(world_size)):
        parts = [result[place] for result in found]
        assert isinstance(parts[0], Tensor)
        torch.testing.assert_close(torch.cat(parts), tensor, rtol=1e-13, atol=1e-13)  # type: ignore[arg-type]
    assert sum(found[-1][3].counts) < TOKENS * TOPK or world_size == 1  # its experts are idle
    assert sum(sum(result[3].counts) for result in found) == TOKENS * TOPK * world_size


def test_rows_have_the_order_of_the_drawing() -> None:
    splits = Splits(sent=(2, 2), received=((1, 1), (2, 1)))
    assert (splits.from_ranks, splits.counts) == ((2, 3), (3, 2))
