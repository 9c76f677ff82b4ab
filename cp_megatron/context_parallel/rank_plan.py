"""What one rank of a schedule does, and with whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadExchange, HeadGroup, all_heads
from cp_megatron.plan.rounds import Round


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One rank's part of a schedule, and its group.

    Attributes:
        rounds: tiles and messages, in order.
        gather: the collective that brings round 1 its keys; None where messages do.
        trade: tokens for heads, before the rounds and after; None where heads stay.
        groups: the heads this rank computes, as its kernel takes them.
        group: whom to talk to; None is one rank.
        buffers: where messages live, shared with the plans of other layers and masks.
        link_sums: notes what is sent and received, shared as well.
    """

    rounds: tuple[Round, ...]
    gather: Gather | None
    trade: HeadExchange | None
    groups: tuple[HeadGroup, ...]
    group: dist.ProcessGroup | None
    buffers: Buffers
    link_sums: LinkSums

    @classmethod
    def create(
        cls,
        *,
        rounds: tuple[Round, ...],
        gather: Gather | None,
        trade: HeadExchange | None,
        num_heads: int,
        num_kv_heads: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        link_sums: LinkSums,
    ) -> RankPlan:
        """With all heads as the rank's own where none are traded."""
        groups = trade.groups if trade else all_heads(num_heads, num_kv_heads)
        return cls(
            rounds=rounds,
            gather=gather,
            trade=trade,
            groups=groups,
            group=group,
            buffers=buffers,
            link_sums=link_sums,
        )
