"""Running rounds: ring attention, forward and backward. The plan is in plan/ring.py.

Shapes: B batch, S tokens of the shard, H query heads, G key/value heads, D head dim, E value dim.

Each round: post what the next round needs, compute this round's tiles, merge, wait.

What is held for messages, each at most the tokens of a shard, whatever the number of ranks:

    keys               2   the round's arrival and the next one's
    sent keys          1   where what is sent is not one run of the arrival
    gradients          2   sums of the round, and of the round before, which leave
    passed, returned   2   what comes in to be added
    sent gradients     1   together, where they are not one run of the sums each

Own keys are packed as they are sent: in round 0, which has no arrival yet, in the second buffer for
keys; later, over the direct route, as ``sent keys``. The last three rows are backward's, in float32
(float64 for float64).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cp_megatron.comm.p2p import Pending, post
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues, take
from cp_megatron.context_parallel.partials import Call, Gradients, Results, Rows
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype
from cp_megatron.plan.heads import cut_heads
from cp_megatron.plan.rounds import Message, Round


def ring_forward(
    plan: RankPlan, call: Call, memory: Workspace, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of the shard's queries over every key the mask lets them see.

    Args:
        plan: this rank's part of the schedule.
        call: what tiles are computed with.
        memory: where messages live; nothing of it is returned.
        q: [B, S, H, D].
        k: [B, S, G, D].
        v: [B, S, G, E].

    Returns:
        out [B, S, H, E] and lse [B, H, S], float32 (float64 for float64).
    """
    results = Results(call, q)
    keys = _Keys(plan, memory, KeyValues(k, v))
    for turn in plan.rounds:
        sends = keys.sends(turn)
        incoming = keys.buffer(turn.receive_keys)
        receives = _receives((turn.receive_keys, incoming))
        pending = post(plan.group, sends=sends, receives=receives, sums=plan.link_sums)
        results.add(turn, keys.arrival, plan.groups)
        with traced("wait for keys"):
            pending.wait()
        keys.arrived(incoming)
    return results.sums()


def ring_backward(
    plan: RankPlan, call: Call, memory: Workspace, x: BackwardInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's queries, and of its keys and values from the queries of all ranks.

    Args:
        plan, call, memory: as in forward.
        x: forward's inputs and results, and dout [B, S, H, E], the gradient of ``out``.

    Returns:
        dq [B, S, H, D], dk [B, S, G, D], dv [B, S, G, E], float32 (float64 for float64).
    """
    rows = Rows.of(call.kernel, x)
    shard = KeyValues(x.k, x.v)
    keys = _Keys(plan, memory, shard)
    # The own tiles need no message: half of their heads are kept for the end, where they hide the
    # last gradients' way home as the first half hides the first keys' way here.
    num_heads = x.k.shape[2]
    middle = num_heads // 2 if len(plan.rounds) > 1 else 0
    late, early = cut_heads(plan.groups, 0, middle), cut_heads(plan.groups, middle, num_heads)
    own = latest = Gradients.returned(call, rows, plan.rounds[0], shard)
    own.zero(late, queries=True)
    before: Round | None = None
    for number, turn in enumerate((*plan.rounds, None)):
        slot = _BackwardSlot.post(plan, memory, before, turn, keys, latest.grads)
        if turn is None:
            own.add(late)
        elif before is None:
            own.store_own(early)
        elif turn.num_keys:
            # The sums of the round before are on their way.
            shape = shard.message_shape(turn.num_keys)
            sums = memory.room(f"gradients {number % 2}", shape, rows.dq.dtype)
            latest = Gradients(call, rows, turn, keys.arrival, sums)
            latest.store_remote(plan.groups)
        slot.wait_and_add(arrival=latest.grads, own=own.grads)
        keys.arrived(slot.keys)
        before = turn
    return rows.dq, own.grads.k, own.grads.v


class _Keys:
    """The own keys and those that arrived last, as they are sent on."""

    def __init__(self, plan: RankPlan, memory: Workspace, shard: KeyValues) -> None:
        self._first, self._memory = plan.rounds[0], memory
        self._filled = 0  # which of the two buffers the next arrival fills
        self.shard = self.arrival = shard

    def sends(self, turn: Round) -> list[tuple[Tensor, int]]:
        """The message of ``turn`` to the next reader, if any."""
        message = turn.send_keys
        if message is None:
            return []
        if message.owner != self._first.owner:
            assert self.arrival.packed is not None
            packed = take(self.arrival.packed, message.spans, self._memory, "sent keys")
        else:
            room = f"keys {1 - self._filled}" if turn is self._first else "sent keys"
            packed = self.shard.pack(message.spans, self._room(room, message))
        return [(packed, message.peer)]

    def buffer(self, message: Message | None) -> Tensor | None:
        """Where the next arrival will be received."""
        return self._room(f"keys {self._filled}", message) if message else None

    def arrived(self, packed: Tensor | None) -> None:
        """What the next round computes."""
        if packed is not None:
            self.arrival = KeyValues.unpack(packed, self.shard)
            self._filled = 1 - self._filled

    def _room(self, name: str, message: Message) -> Tensor:
        shape = self.shard.message_shape(message.num_tokens)
        return self._memory.room(name, shape, self.shard.k.dtype)


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
        memory: Workspace,
        before: Round | None,
        turn: Round | None,
        keys: _Keys,
        grads: KeyValues,
    ) -> _BackwardSlot:
        """Both ends list keys first, then gradients passed on, then gradients going home."""
        sends = keys.sends(turn) if turn else []
        leaving = {"pass": before.pass_grads, "return": before.return_grads} if before else {}
        for name, message in leaving.items():
            if message:
                assert grads.packed is not None
                packed = take(grads.packed, message.spans, memory, f"sent gradients, {name}")
                sends.append((packed, message.peer))
        receive_keys = turn.receive_keys if turn else None
        incoming = keys.buffer(receive_keys)

        def expected(name: str, message: Message | None) -> tuple[Message | None, Tensor | None]:
            if message is None:
                return None, None
            shape = keys.shard.message_shape(message.num_tokens)
            return message, memory.room(name, shape, accumulation_dtype(keys.shard.k.dtype))

        passed = expected("passed", before.receive_passed if before else None)
        returned = expected("returned", before.receive_returned if before else None)
        receives = _receives((receive_keys, incoming), passed, returned)
        return cls(
            pending=post(plan.group, sends=sends, receives=receives, sums=plan.link_sums),
            keys=incoming,
            passed=passed,
            returned=returned,
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
