"""The host whose link is slow has the longest messages."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist

from cp_megatron.faults import host_links
from tests.ranks import run_ranks


def seconds(rank: int, world_size: int, ranks_per_host: int, slow_host: int | None) -> float:
    """``message_seconds``, with messages from and to one host that are 0.3 s late."""
    world, shift = dist.group.WORLD, host_links._shift
    assert world is not None

    def slowed(control: dist.ProcessGroup, receiver: int, sender: int) -> float:
        late = 0.3 if rank // ranks_per_host == slow_host else 0.0
        time.sleep(late)
        return late + shift(control, receiver, sender)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_links, "_shift", slowed)
        return host_links.message_seconds(world, ranks_per_host)


def test_only_the_host_with_the_slow_link_is_slow() -> None:
    times = run_ranks(seconds, 3, 1, 1)
    assert times[1] > 0.3
    assert max(times[0], times[2]) < 0.3
    times = run_ranks(seconds, 4, 2, 0)
    # A rank that begins later waits less.
    assert min(times) > 0.2, "of two hosts, each waits for the other"


def test_one_host_sends_nothing() -> None:
    assert run_ranks(seconds, 2, 2, 0) == [0.0, 0.0]
