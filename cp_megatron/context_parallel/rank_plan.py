"""One rank's part of a schedule, and the group that it exchanges messages with."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.plan import Schedule
from cp_megatron.plan.buffer_sizes import RoundBuffers, ring_buffers
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadExchange, HeadGroup, all_heads
from cp_megatron.plan.rounds import Round


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part of a schedule, and its group.

    Attributes:
        rounds: tiles and messages, in order.
        round_buffers: for each round, the buffers of its messages.
        gather: the collective that brings the keys of round 1; None if messages bring the keys.
        head_exchange: the all-to-all before and after the rounds; None if heads stay where they
            are.
        groups: the heads that this rank computes, as its kernel takes them.
        group: the context parallel group; None is one rank.
        buffers: the memory of the messages, shared with the plans of other layers and masks.
        link_sums: checksums of what is sent and received, shared likewise.
    """

    rounds: tuple[Round, ...]
    round_buffers: tuple[RoundBuffers, ...]
    gather: Gather | None
    head_exchange: HeadExchange | None
    groups: tuple[HeadGroup, ...]
    group: dist.ProcessGroup | None
    buffers: Buffers
    link_sums: LinkSums

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        rank: int,
        *,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        link_sums: LinkSums,
    ) -> RankPlan:
        """Takes the part of ``rank`` out of a schedule that knows its numbers of heads."""
        assert schedule.num_heads is not None
        assert schedule.num_kv_heads is not None
        rounds, exchange = schedule.rounds(rank), schedule.heads(rank)
        own_heads = all_heads(schedule.num_heads, schedule.num_kv_heads)
        return cls(
            rounds=rounds,
            round_buffers=ring_buffers(rounds),
            gather=schedule.gather(rank),
            head_exchange=exchange,
            groups=exchange.groups if exchange else own_heads,
            group=group,
            buffers=buffers,
            link_sums=link_sums,
        )
