"""One rank's part of a schedule, and the group that it exchanges messages with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, cast

import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.kernels.interface import BackwardInputs, JoiningKernel, Kernel
from cp_megatron.kernels.segments import Segments
from cp_megatron.plan import Schedule
from cp_megatron.plan.buffer_sizes import ring_buffers
from cp_megatron.plan.heads import all_heads
from cp_megatron.plan.joining import TileRun, join, single_runs
from cp_megatron.plan.rounds import Round


class TileCall:
    """One call of a kernel: for a tile, or for the tiles of a run.

    Attributes:
        rows, columns: what the call computes, as indices into the shard and the arrival.
        first: as of a tile: the results are stored, not merged.
    """

    def __init__(self, run: TileRun) -> None:
        self.rows, self.columns, self.first = slice(*run.rows), slice(*run.columns), run.first
        self._band = run.band
        self._segments = Segments(run) if len(run.tiles) > 1 else None

    def forward(
        self, kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Calls ``Kernel.forward`` or ``JoiningKernel.forward_many`` for the call's rows."""
        if self._segments is None:
            return kernel.forward(q, k, v, self._band, scale)
        return cast(JoiningKernel, kernel).forward_many(q, k, v, self._segments, scale)

    def backward(
        self, kernel: Kernel, x: BackwardInputs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Calls ``Kernel.backward`` or ``JoiningKernel.backward_many`` for the call's rows."""
        if self._segments is None:
            return kernel.backward(x, self._band, scale)
        return cast(JoiningKernel, kernel).backward_many(x, self._segments, scale)


@dataclass(frozen=True, kw_only=True)
class RankRound(Round):
    """A round with the calls of the kernel that compute its tiles.

    Attributes:
        calls: one for each tile.
        joined_calls: one for each run of tiles, for kernels that can join them.
    """

    calls: tuple[TileCall, ...]
    joined_calls: tuple[TileCall, ...]

    @classmethod
    def of(cls, round_: Round) -> Self:
        """Adds the calls to a round."""
        calls = tuple(map(TileCall, single_runs(round_.tiles)))
        joined = tuple(map(TileCall, join(round_.tiles)))
        return cls(**vars(round_), calls=calls, joined_calls=joined)


class RankPlan:
    """The part of one rank in a schedule that knows its numbers of heads, and the rank's group.

    Attributes:
        rounds: tiles and messages, in order.
        parts: the key/value heads of each part in which a message is sent.
        part_buffers: for each part and round, the buffers of its messages.
        gather: the collective that brings the keys of round 1; None if messages bring the keys.
        merges: whether several tiles have a row in common, so that results and the gradients of
            queries are sums.
        receives: whether the rounds receive any message.
        sums_own_keys: whether the gradients of this rank's keys may be sums.
        is_alone: whether this rank exchanges no keys and no row has several tiles.
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
        self.rounds = tuple(map(RankRound.of, schedule.rounds(rank)))
        self.gather = schedule.gather(rank)
        self.parts = schedule.parts(rank)
        self.part_buffers = tuple(
            ring_buffers(self.rounds, part) for part in range(len(self.parts))
        )
        self.receives = any(round_.receives for round_ in self.rounds)
        self.merges = any(not tile.first for round_ in self.rounds for tile in round_.tiles)
        width = self.gather.width if self.gather else 0
        # First tiles lie on the diagonal, so they have no columns in common either.
        is_sum = self.receives or width > 0 or not all(tile.first for tile in self.rounds[0].tiles)
        self.sums_own_keys = is_sum
        self.is_alone = not is_sum and not any(round_.messages for round_ in self.rounds)
        self.sends_latents = schedule.latent is not None
        self.head_exchange = exchange = schedule.heads(rank)
        # A latent and a rotary key are sent as one head, which all query heads read.
        kv_heads = schedule.num_kv_heads if schedule.latent is None else 1
        own_heads = all_heads(schedule.num_heads, kv_heads)
        self.groups = exchange.groups if exchange else own_heads
        self.group, self.buffers, self.link_sums = group, buffers, link_sums
