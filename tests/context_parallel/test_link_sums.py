"""Both ends of every exchange sum its messages, so that one flipped bit is found.

The bit flips below the engine, in the buffer that torch has received into.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm import nonblocking
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.plan import Mask
from tests.context_parallel.test_buffers import EXCHANGES
from tests.ranks import run_ranks

CPU = torch.device("cpu")


class Work:
    """A message in flight, one of whose bits flips as it arrives."""

    def __init__(self, work: Any, arrival: Tensor) -> None:
        self._work, self._arrival = work, arrival

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._arrival.view(-1)[:1].view(torch.uint8)[0] ^= 16


@contextmanager
def flipping(number: int) -> Iterator[list[int]]:
    """Flips a bit in message ``number`` of those that arrive; yields how many there were."""
    seen = [0]
    batch, gather, all_to_all = (
        dist.batch_isend_irecv,
        nonblocking.start_host_gather,
        dist.all_to_all_single,
    )

    def arrives() -> bool:
        seen[0] += 1
        return seen[0] - 1 == number

    def batched(operations: list[dist.P2POp]) -> list[Any]:
        works: list[Any] = list(batch(operations))
        hit = [operation for operation in operations if operation.op is dist.irecv and arrives()]
        return [*works, *(Work(None, operation.tensor) for operation in hit)]

    def gathered(result: Tensor, x: Tensor, group: dist.ProcessGroup) -> Any:
        work = gather(result, x, group)
        other = (group.rank() + 1) % group.size()
        if x.dtype is torch.int64 or not arrives():  # ranks compare inputs by integers
            return work
        return Work(work, result.chunk(group.size())[other])

    def corrupted(result: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
        work = all_to_all(result, x, *args, **options)
        if args and arrives():  # checksums are exchanged without sizes
            sizes: list[int] = args[0]
            first = options["group"].rank() == 0  # its own part comes first
            Work(None, result[sizes[0] :] if first else result).wait()
        return work

    with (
        mock.patch.object(dist, "batch_isend_irecv", batched),
        mock.patch.object(nonblocking, "start_host_gather", gathered),
        mock.patch.object(dist, "all_to_all_single", corrupted),
    ):
        yield seen


def attend(
    rank: int, world_size: int, kind: str, victim: int, number: int
) -> tuple[list[int], int]:
    """The senders of corrupted messages that this rank found, and how many messages came."""
    group = dist.group.WORLD
    assert group is not None
    cp = ContextParallel(group, Mask.causal(64), **EXCHANGES.get(kind, {}))
    generator = torch.Generator().manual_seed(rank)
    q, k, v = (torch.randn(1, 16, 4, 8, generator=generator).requires_grad_() for _ in range(3))
    cp.link_sums.open()
    with flipping(number if rank == victim else -1) as seen:
        if kind == "states":
            convolved = cp.short_conv(v.flatten(2), torch.ones(32, 4)).view_as(v)
            cp.linear_attention(q, k, convolved, -k[..., 0].square()).sum().backward()
        else:
            cp.attention(q, k, v).sum().backward()
        messages = seen[0]
    return cp.link_sums.close(group, CPU), messages


@pytest.mark.parametrize("kind", [*EXCHANGES, "states"])
def test_a_bit_that_flips_on_the_way_is_found_by_the_receiver(kind: str) -> None:
    unharmed = run_ranks(attend, 4, kind, 1, -1)
    assert [found for found, _ in unharmed] == [[]] * 4
    num_messages = unharmed[1][1]
    assert num_messages > 1
    for number in {0, num_messages - 1}:
        results = [found for found, _ in run_ranks(attend, 4, kind, 1, number)]
        assert [len(found) for found in results] == [0, 1, 0, 0], (kind, number, results)
        assert results[1] != [1]


def silent(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether checksums changed a bit of the gradients, and whether closed links keep anything."""
    group = dist.group.WORLD
    grads = []
    for opens in (False, True):
        cp = ContextParallel(group, Mask.causal(64))
        x = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_()
        if opens:
            cp.link_sums.open()
        cp.attention(x, x, x).sum().backward()
        grads.append(x.grad)
        if not opens:
            assert not cp.link_sums._sent
    assert grads[0] is not None
    assert grads[1] is not None
    return torch.equal(grads[0], grads[1]), bool(cp.link_sums._sent)


def test_links_are_recorded_only_while_they_are_open() -> None:
    assert run_ranks(silent, 4) == [(True, True)] * 4
