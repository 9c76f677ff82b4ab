"""Tests gathers and reduce-scatters of CPU tensors against torch's own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.host_collectives import start_host_gather, start_host_reduce_scatter
from tests.ranks import run_ranks


def both(rank: int, world_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """What the messages give, and what torch's collectives give; beside a message of tag 0."""
    group = dist.group.WORLD
    assert group is not None
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    other, peer = torch.full((2,), float(rank)), (rank + 1) % world_size
    got = torch.empty(2)
    gathered = x.new_zeros(3 * world_size, 5)
    work = start_host_gather(gathered, x, group)
    messages = [dist.irecv(got, (rank - 1) % world_size), dist.isend(other, peer)]
    for message in (*messages, work):
        assert message is not None
        message.wait()
    assert got.tolist() == [(rank - 1) % world_size] * 2
    in_place = torch.zeros_like(gathered)
    own = in_place[3 * rank : 3 * rank + 3]
    start_host_gather(in_place, own.copy_(x), group).wait()
    summed = x.new_empty(3, 5)
    start_host_reduce_scatter(summed, gathered * (rank + 1), group).wait()
    parts = [torch.empty_like(x) for _ in range(world_size)]
    dist.all_gather(parts, x)
    whole = torch.cat(parts)
    total = sum(n + 1 for n in range(world_size))
    return [gathered, in_place, summed], [whole, whole, parts[rank] * total]


def test_they_equal_torchs_collectives() -> None:
    for found, expected in run_ranks(both, 3):
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-14)
