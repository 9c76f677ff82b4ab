"""Times messages between hosts, to find a host whose link is slow.

    hosts  0 -> 1 -> 2 -> 0     first all send to the next host,
           0 <- 1 <- 2 <- 0     then to the one before

A rank's time is that of the faster of its two neighbours. So a host whose link is slow has a long
time, and the neighbours of that host do not. Of two hosts, both have the same time.

The messages take the network of gloo. If NCCL uses other devices, they say nothing about those.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from cp_megatron.comm.host_numbers import gather_numbers

MESSAGE_BYTES = 256 << 10
"""Enough that the rate of a link counts, and not only its delay."""
TRIES = 2
_TAG = 2
"""Keeps these messages apart from others in the same group."""


def message_seconds(control: dist.ProcessGroup, ranks_per_host: int) -> float:
    """Seconds that a message between hosts takes; 0 if there is one host. For every rank.

    Args:
        control: a group of all ranks for CPU tensors.
        ranks_per_host: on each host; every rank exchanges messages with the ranks at its place.
    """
    size, rank = control.size(), control.rank()
    if size <= ranks_per_host:
        return 0.0
    ahead, behind = (rank + ranks_per_host) % size, (rank - ranks_per_host) % size
    times = []
    for _ in range(TRIES):
        for receiver, sender in ((ahead, behind), (behind, ahead)):
            gather_numbers([0.0], control)  # all start together
            times.append(_shift(control, receiver, sender))
    return min(times)


def _shift(control: dist.ProcessGroup, receiver: int, sender: int) -> float:
    """Sends a message and receives one; the seconds until it is received.

    The message to a slow host takes long too, but that time is not this rank's.
    """
    begin = time.perf_counter()
    message, room = (torch.zeros(MESSAGE_BYTES, dtype=torch.uint8) for _ in range(2))
    received = dist.irecv(room, group=control, group_src=sender, tag=_TAG)
    sent = dist.isend(message, group=control, group_dst=receiver, tag=_TAG)
    assert received is not None, "this rank is in the group"
    assert sent is not None
    received.wait()
    seconds = time.perf_counter() - begin
    sent.wait()
    return seconds
