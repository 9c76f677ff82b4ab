"""Runs the chains of a ``StatePlan``: two collectives of forward, two of backward.

Shapes: B batch, H heads, h those of them whose chains this rank follows, D key dim, E value dim;
i, o and t the pieces of this rank that a state enters, leaves and passes through; I, O and T those
of all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.send_receive import all_to_all
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.kernels.linear_interface import apply_transition
from cp_megatron.plan.buffer_sizes import RECEIVED_HEADS, SENT_HEADS
from cp_megatron.plan.states import StatePlan


@dataclass(frozen=True)
class StateExchange:
    """The messages of one pass. ``memory`` provides their buffers."""

    plan: StatePlan
    rank: int
    group: dist.ProcessGroup | None
    memory: Workspace
    sums: LinkSums

    def entering_states(self, increments: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor]:
        """Chains what the pieces of all ranks give.

        Args:
            increments: U of this rank's leaving pieces, [B, o, H, D, E].
            transitions: M of its through pieces, [B, t, H, ..] as in ``LinearSummary``.

        Returns:
            S_in of its entering pieces, [B, i, H, D, E], and the transitions of all ranks for this
            rank's share of the heads, [B, T, h, ..], which ``leaving_gradients`` needs.
        """
        plan = self.plan
        given = self._to_heads([(increments, plan.leaving), (transitions, plan.through)])
        increment_of, transition_of = self._row_of(plan.leaving), self._row_of(plan.through)
        entering = increments.new_empty(self._all_shape(increments, plan.entering))
        row_of = self._row_of(plan.entering)
        for first, *others in plan.chains:
            state = given[0][:, increment_of[first]]
            for number in others:
                entering[:, row_of[number]] = state
                if number in transition_of:
                    matrix = given[1][:, transition_of[number]]
                    state = apply_transition(matrix, state)
                    state = state + given[0][:, increment_of[number]]
        return self._to_pieces(entering, plan.entering), given[1]

    def leaving_gradients(self, own: Tensor, transitions: Tensor) -> Tensor:
        """Follows the same chains from their last piece to their first.

        Args:
            own: dS_in of this rank's entering pieces without what leaves them, [B, i, H, D, E].
            transitions: as ``entering_states`` returned them.

        Returns:
            dS_out of its leaving pieces, [B, o, H, D, E].
        """
        plan = self.plan
        (given,) = self._to_heads([(own, plan.entering)])
        own_of, transition_of = self._row_of(plan.entering), self._row_of(plan.through)
        leaving = own.new_empty(self._all_shape(own, plan.leaving))
        row_of = self._row_of(plan.leaving)
        for chain in plan.chains:
            *others, last = chain
            grad = given[:, own_of[last]]
            for number in reversed(others):
                leaving[:, row_of[number]] = grad
                if number in transition_of:
                    grad = apply_transition(
                        transitions[:, transition_of[number]], grad, transposed=True
                    )
                    grad = grad + given[:, own_of[number]]
        return self._to_pieces(leaving, plan.leaving)

    @cached_property
    def _share(self) -> int:
        return self.plan.num_heads_of(self.rank)

    def _all_shape(self, like: Tensor, numbers: Sequence[Sequence[int]]) -> tuple[int, ...]:
        return like.shape[0], sum(map(len, numbers)), self._share, *like.shape[3:]

    @staticmethod
    def _row_of(numbers: Sequence[Sequence[int]]) -> dict[int, int]:
        """Maps a piece to the place of its tensor if those of rank 0 come first, then rank 1's."""
        return {number: row for row, number in enumerate(n for own in numbers for n in own)}

    def _to_heads(self, parts: Sequence[tuple[Tensor, Sequence[Sequence[int]]]]) -> list[Tensor]:
        """Exchanges [B, pieces of this rank, H, ..] for [B, pieces of all ranks, h, ..], each."""
        outgoing = [
            [tensor[:, :, start:stop] for tensor, _ in parts] for start, stop in self.plan.heads
        ]
        shapes = [
            [(x.shape[0], len(numbers[peer]), self._share, *x.shape[3:]) for x, numbers in parts]
            for peer in range(len(self.plan.heads))
        ]
        incoming = self._exchange(outgoing, shapes)
        return [torch.cat([of_peer[i] for of_peer in incoming], 1) for i in range(len(parts))]

    def _to_pieces(self, whole: Tensor, numbers: Sequence[Sequence[int]]) -> Tensor:
        """Exchanges [B, pieces of all ranks, h, D, E] for [B, pieces of this rank, H, D, E]."""
        outgoing = [[part] for part in whole.split([len(own) for own in numbers], dim=1)]
        count = len(numbers[self.rank])
        shapes = [
            [(whole.shape[0], count, stop - start, *whole.shape[3:])]
            for start, stop in self.plan.heads
        ]
        return torch.cat([x for (x,) in self._exchange(outgoing, shapes)], dim=2)

    def _exchange(
        self, outgoing: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[tuple[int, ...]]]
    ) -> list[list[Tensor]]:
        """Sends a list of tensors to every rank; returns what each sends, of the given shapes.

        Results are views of a buffer that the next exchange uses again.
        """
        sizes = [sum(map(math.prod, of_peer)) for of_peer in shapes]
        counts = [sum(x.numel() for x in of_peer) for of_peer in outgoing]
        dtype = outgoing[0][0].dtype
        sent = self.memory.take(SENT_HEADS, (sum(counts),), dtype)
        received = self.memory.take(RECEIVED_HEADS, (sum(sizes),), dtype)
        for message, of_peer in zip(sent.split(counts), outgoing):
            for target, x in zip(message.split([x.numel() for x in of_peer]), of_peer):
                target.view(x.shape).copy_(x)
        with traced("all-to-all of states"):
            assert self.group is not None
            all_to_all(self.group, sent, received, (counts, sizes), self.sums)
        return [
            [
                x.view(shape)
                for x, shape in zip(message.split(list(map(math.prod, of_peer))), of_peer)
            ]
            for message, of_peer in zip(received.split(sizes), shapes)
        ]
