"""One rank's part of a schedule, and the group that it exchanges messages with."""

from __future__ import annotations

import torch.distributed as dist

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.plan import Schedule
from cp_megatron.plan.buffer_sizes import ring_buffers
from cp_megatron.plan.heads import all_heads


class RankPlan:
    """The part of one rank in a schedule that knows its numbers of heads, and the rank's group.

    Attributes:
        rounds: tiles and messages, in order.
        round_buffers: for each round, the buffers of its messages.
        gather: the collective that brings the keys of round 1; None if messages bring the keys.
        head_exchange: the all-to-all before and after the rounds; None if heads stay in place.
        sends_latents: whether latents are sent instead of keys and values.
        groups: the heads that this rank computes, as its kernel takes them.
        group: the context parallel group; None is one rank.
        buffers: the memory of the messages, shared with the plans of other layers and masks.
        link_sums: checksums of what is sent and received, shared likewise.
    """

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        link_sums: LinkSums,
    ) -> None:
        assert schedule.num_heads is not None
        assert schedule.num_kv_heads is not None
        self.rounds, self.gather = schedule.rounds(rank), schedule.gather(rank)
        self.round_buffers = ring_buffers(self.rounds)
        self.sends_latents = schedule.latent is not None
        self.head_exchange = exchange = schedule.heads(rank)
        # A latent and a rotary key are sent as one head, which all query heads read.
        kv_heads = schedule.num_kv_heads if schedule.latent is None else 1
        own_heads = all_heads(schedule.num_heads, kv_heads)
        self.groups = exchange.groups if exchange else own_heads
        self.group, self.buffers, self.link_sums = group, buffers, link_sums
