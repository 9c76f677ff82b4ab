"""Ring attention: running the rounds of a schedule, forward and backward. plan/ring.py plans them.

Shapes: B = batch, S = tokens of the shard, H = query heads, G = key/value heads, D = head dim,
E = value head dim.

Each round posts the messages of the next round, computes its own tiles, merges their results, and
waits. plan/buffer_sizes.py describes the memory of the messages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_megatron.comm.send_receive import Pending, post
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues, contiguous_runs
from cp_megatron.context_parallel.partials import (
    BackwardQueries,
    Call,
    Gradients,
    MergedResults,
    gradients_at_once,
)
from cp_megatron.context_parallel.rank_plan import RankPlan, RankRound
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype
from cp_megatron.plan.buffer_sizes import Buffer, RoundBuffers
from cp_megatron.plan.heads import halves
from cp_megatron.plan.rounds import Message, Round


def ring_forward(
    plan: RankPlan, call: Call, memory: Workspace, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the attention of the shard's queries over every key that the mask allows.

    Args:
        plan: this rank's part of the schedule.
        call: the kernel and its options.
        memory: provides the buffers of messages. Results do not lie in it.
        q, k, v: [B, S, H, D], [B, S, G, D] and [B, S, G, E].

    Returns:
        out [B, S, H, E] and lse [B, H, S], float32 (float64 for float64); out of rows that see one
        tile each has the type that the kernel returned.
    """
    results = MergedResults(plan, call, q)
    keys = _Keys(plan, memory, KeyValues(k, v))
    for round_, buffers in zip(plan.rounds, plan.round_buffers):
        sends = keys.sends(round_, buffers)
        incoming = keys.take(buffers.arrival)
        receives = _receives((round_.receive_keys, incoming))
        pending = post(plan.group, sends=sends, receives=receives, sums=plan.link_sums)
        results.add(round_, keys.arrival, plan.groups)
        with traced("wait for keys"):
            pending.wait()
        keys.arrived(incoming)
    return results.result()


def ring_backward(
    plan: RankPlan, call: Call, memory: Workspace, x: BackwardInputs, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of the shard: of its queries, and of its keys from all queries.

    Args:
        plan, call, memory: as in forward.
        x: forward's inputs and results, and dout [B, S, H, E], the gradient of ``out``.
        dlse: [B, H, S], the gradient of ``lse``; None is zero.

    Returns:
        dq [B, S, H, D], dk [B, S, G, D], dv [B, S, G, E]. Sums are float32 (float64 for float64);
        what one tile gave has the type that the kernel returned.
    """
    if (complete := gradients_at_once(plan, call, x, dlse)) is not None:
        return complete
    queries = BackwardQueries.of(plan, call, x, dlse)
    shard = KeyValues(x.k, x.v)
    keys = _Keys(plan, memory, shard)
    # The tiles of this rank's keys need no message. The first half of their heads hides the arrival
    # of the first keys; the other half is kept for the end and hides the last gradients.
    late, early = halves(plan.groups) if plan.receives else ((), plan.groups)
    own = latest = Gradients.of_shard(plan, call, queries, shard)
    own.zero(late, queries=plan.merges)
    before: tuple[RankRound, RoundBuffers] | None = None
    for current in (*zip(plan.rounds, plan.round_buffers), None):
        slot = _BackwardSlot.post(plan, memory, before, current, keys, latest.grads)
        if current is None:
            own.add(late, queries=plan.merges)
        elif before is None:
            own.store_own(early)
        elif current[1].gradients:
            # The sums of the round before are being sent, so this round sums in another buffer.
            sums = shard.take(memory, current[1].gradients, accumulation_dtype(x.k.dtype))
            latest = Gradients(call, queries, current[0], keys.arrival, sums)
            latest.store_remote(plan.groups)
        slot.wait_and_add(arrival=latest.grads, own=own.grads)
        keys.arrived(slot.keys)
        before = current
    return queries.dq, own.grads.k, own.grads.v


class _Keys:
    """The rank's own keys, and the keys that arrived last."""

    def __init__(self, plan: RankPlan, memory: Workspace, shard: KeyValues) -> None:
        self._owner, self._memory = plan.rounds[0].owner, memory
        self.shard = self.arrival = shard

    def sends(self, round_: Round, buffers: RoundBuffers) -> list[tuple[Tensor, int]]:
        """The message of keys that ``round_`` sends and its receiver; empty if it sends none."""
        message = round_.send_keys
        if message is None:
            return []
        if message.owner == self._owner:
            target = self.take(buffers.sent_keys)
            assert target is not None
            packed = self.shard.pack(message.spans, target)
        else:
            assert self.arrival.packed is not None
            packed = contiguous_runs(
                self.arrival.packed, message.spans, self._memory, buffers.sent_keys
            )
        return [(packed, message.peer)]

    def take(self, buffer: Buffer | None, dtype: torch.dtype | None = None) -> Tensor | None:
        return self.shard.take(self._memory, buffer, dtype) if buffer else None

    def arrived(self, packed: Tensor | None) -> None:
        """Makes a message the keys of the next round."""
        if packed is not None:
            self.arrival = KeyValues.unpack(packed, self.shard)


_Expected = tuple[Message | None, Tensor | None]


@dataclass(frozen=True, kw_only=True)
class _BackwardSlot:
    """The messages of one slot: keys for the next round, gradients of the round before."""

    pending: Pending
    keys: Tensor | None
    passed: _Expected
    returned: _Expected

    @classmethod
    def post(
        cls,
        plan: RankPlan,
        memory: Workspace,
        before: tuple[RankRound, RoundBuffers] | None,
        current: tuple[RankRound, RoundBuffers] | None,
        keys: _Keys,
        grads: KeyValues,
    ) -> _BackwardSlot:
        """Posts the messages of the slot: keys, then gradients passed on, then those returned."""
        sends = keys.sends(*current) if current else []
        incoming = keys.take(current[1].arrival) if current else None
        arriving = current[0].receive_keys if current else None, incoming
        passed: _Expected = None, None
        returned: _Expected = None, None
        if before:
            round_, buffers = before
            for message, buffer in (
                (round_.pass_grads, buffers.sent_passed),
                (round_.return_grads, buffers.sent_returned),
            ):
                if message:
                    assert grads.packed is not None
                    packed = contiguous_runs(grads.packed, message.spans, memory, buffer)
                    sends.append((packed, message.peer))
            dtype = accumulation_dtype(keys.shard.k.dtype)
            passed = round_.receive_passed, keys.take(buffers.passed, dtype)
            returned = round_.receive_returned, keys.take(buffers.returned, dtype)
        receives = _receives(arriving, passed, returned)
        pending = post(plan.group, sends=sends, receives=receives, sums=plan.link_sums)
        return cls(pending=pending, keys=incoming, passed=passed, returned=returned)

    def wait_and_add(self, *, arrival: KeyValues, own: KeyValues) -> None:
        """Adds passed gradients to those of the arrival, returned gradients to the shard's."""
        with traced("wait for keys and gradients"):
            self.pending.wait()
        for (message, buffer), target in ((self.passed, arrival), (self.returned, own)):
            if message is not None and buffer is not None:
                target.add_(message.spans, buffer)


def _receives(*expected: _Expected) -> list[tuple[Tensor, int]]:
    return [
        (buffer, message.peer) for message, buffer in expected if message and buffer is not None
    ]
