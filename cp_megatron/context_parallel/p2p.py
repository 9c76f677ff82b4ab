"""Running rounds: ring attention, forward and backward. The plan is in plan/ring.py.

Shapes: B batch, S tokens of the shard, H query heads, G key/value heads, D head dim, E value dim.

Each round: post what the next round needs, compute this round's tiles, merge, wait.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_megatron.comm.p2p import Pending, post
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.keys import KeyValues, take
from cp_megatron.context_parallel.partials import Call, Gradients, Results, Rows
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype
from cp_megatron.plan.heads import cut_heads
from cp_megatron.plan.rounds import Message, Round


def ring_forward(
    plan: RankPlan, call: Call, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of the shard's queries over every key the mask lets them see.

    Args:
        plan: this rank's part of the schedule.
        call: what tiles are computed with.
        q: [B, S, H, D].
        k: [B, S, G, D].
        v: [B, S, G, E].

    Returns:
        out [B, S, H, E] and lse [B, H, S], float32 (float64 for float64).
    """
    results = Results(call, q)
    keys = _Keys(plan, KeyValues(k, v))
    for turn in plan.rounds:
        sends = keys.sends(turn)
        incoming = keys.buffer(turn.receive_keys, k.dtype)
        pending = post(plan.group, sends=sends, receives=_receives((turn.receive_keys, incoming)))
        results.add(turn, keys.arrival, plan.groups)
        with traced("wait for keys"):
            pending.wait()
        keys.arrived(incoming)
    return results.sums()


def ring_backward(plan: RankPlan, call: Call, x: BackwardInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's queries, and of its keys and values from the queries of all ranks.

    Args:
        plan, call: as in forward.
        x: forward's inputs and results, and dout [B, S, H, E], the gradient of ``out``.

    Returns:
        dq [B, S, H, D], dk [B, S, G, D], dv [B, S, G, E], float32 (float64 for float64).
    """
    rows = Rows.of(call.kernel, x)
    keys = _Keys(plan, KeyValues(x.k, x.v))
    # The own tiles need no message: half of their heads are kept for the end, where they hide the
    # last gradients' way home as the first half hides the first keys' way here.
    num_heads = x.k.shape[2]
    middle = num_heads // 2 if len(plan.rounds) > 1 else 0
    late, early = cut_heads(plan.groups, 0, middle), cut_heads(plan.groups, middle, num_heads)
    own = latest = Gradients(call, rows, plan.rounds[0], keys.shard)
    own.zero(late, queries=True)
    before: Round | None = None
    for turn in (*plan.rounds, None):
        slot = _BackwardSlot.post(plan, before, turn, keys, latest.grads)
        if turn is None:
            own.add(late)
        elif before is None:
            own.store_own(early)
        else:
            latest = Gradients(call, rows, turn, keys.arrival)
            latest.store_remote(plan.groups)
        slot.wait_and_add(arrival=latest.grads, own=own.grads)
        keys.arrived(slot.keys)
        before = turn
    return rows.dq, own.grads.k, own.grads.v


class _Keys:
    """The own keys and those that arrived last, as they are sent on."""

    def __init__(self, plan: RankPlan, shard: KeyValues) -> None:
        self._first = plan.rounds[0]
        self.shard = self.arrival = shard

    def sends(self, turn: Round) -> list[tuple[Tensor, int]]:
        """The message of ``turn`` to the next reader, if any."""
        message = turn.send_keys
        if message is None:
            return []
        from_shard = message.owner == self._first.owner
        if from_shard:
            self.shard = self.shard.pack()
            if turn is self._first:
                self.arrival = self.shard
        source = self.shard if from_shard else self.arrival
        assert source.packed is not None
        return [(take(source.packed, message.spans), message.peer)]

    def buffer(self, message: Message | None, dtype: torch.dtype) -> Tensor | None:
        """Where ``message`` will be received."""
        return self.shard.empty(message.num_tokens, dtype) if message else None

    def arrived(self, packed: Tensor | None) -> None:
        """What the next round computes."""
        if packed is not None:
            self.arrival = KeyValues.unpack(packed, self.shard)


@dataclass(frozen=True, kw_only=True)
class _BackwardSlot:
    """The messages of one slot: keys for the next round, gradients of the round before."""

    pending: Pending
    keys: Tensor | None
    passed: tuple[Message | None, Tensor | None]
    returned: tuple[Message | None, Tensor | None]

    @classmethod
    def post(
        cls,
        plan: RankPlan,
        before: Round | None,
        turn: Round | None,
        keys: _Keys,
        grads: KeyValues,
    ) -> _BackwardSlot:
        """Both ends list keys first, then gradients passed on, then gradients going home."""
        sends = keys.sends(turn) if turn else []
        for message in (before.pass_grads, before.return_grads) if before else ():
            if message:
                assert grads.packed is not None
                sends.append((take(grads.packed, message.spans), message.peer))
        dtype = keys.shard.k.dtype
        receive_keys = turn.receive_keys if turn else None
        passed = before.receive_passed if before else None
        returned = before.receive_returned if before else None
        incoming = keys.buffer(receive_keys, dtype)
        passed_buffer = keys.buffer(passed, accumulation_dtype(dtype))
        returned_buffer = keys.buffer(returned, accumulation_dtype(dtype))
        receives = _receives(
            (receive_keys, incoming), (passed, passed_buffer), (returned, returned_buffer)
        )
        return cls(
            pending=post(plan.group, sends=sends, receives=receives),
            keys=incoming,
            passed=(passed, passed_buffer),
            returned=(returned, returned_buffer),
        )

    def wait_and_add(self, *, arrival: KeyValues, own: KeyValues) -> None:
        """Adds what was passed to this round's gradients, what came home to the shard's."""
        with traced("wait for keys and gradients"):
            self.pending.wait()
        for (message, buffer), target in ((self.passed, arrival), (self.returned, own)):
            if message is not None and buffer is not None:
                target.add_(message.spans, buffer)


def _receives(*expected: tuple[Message | None, Tensor | None]) -> list[tuple[Tensor, int]]:
    return [
        (buffer, message.peer) for message, buffer in expected if message and buffer is not None
    ]
