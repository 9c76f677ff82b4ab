"""Ring attention: running the rounds of a schedule, forward and backward. plan/ring.py plans them.

Shapes: B = batch, S = tokens of the shard, H = query heads, G = key/value heads, D = head dim,
E = value head dim.

A step is one round of one part of the heads; there is one part unless messages are split. Each step
waits for what it reads, posts the messages of a later step, computes its own tiles, and merges
their results. plan/buffer_sizes.py describes the memory of the messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from cp_megatron.comm.send_receive import Pending, post
from cp_megatron.comm.trace import waiting_for
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.context_parallel.keys import KeyValues, contiguous_runs
from cp_megatron.context_parallel.partials import (
    BackwardQueries,
    Call,
    Gradients,
    MergedResults,
    gradients_at_once,
)
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels.interface import BackwardInputs, accumulation_dtype
from cp_megatron.plan.buffer_sizes import Buffer
from cp_megatron.plan.heads import cut_heads, from_zero, halves
from cp_megatron.plan.rounds import Message
from cp_megatron.plan.tiling import Span


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
    parts = _parts(plan, memory, KeyValues(k, v))
    messages = _Messages(plan)
    for number, round_ in enumerate(plan.rounds):
        for part in parts:
            messages.exchange(part, number)
            results.add(round_, part.arrival, part.groups)
    messages.finish()
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
    # The tiles of this rank's keys need no message. The first half of their heads hides the arrival
    # of the first keys; the other half is kept for the end and hides the last gradients.
    late, early = halves(plan.groups) if plan.receives else ((), plan.groups)
    own = Gradients.of_shard(plan, call, queries, shard)
    own.zero(late, queries=plan.merges)
    parts = _parts(plan, memory, shard)
    messages = _Messages(plan, own.grads)
    for number, round_ in enumerate((*plan.rounds, None)):
        for part in parts:
            messages.exchange(part, number)
            if round_ is None:
                own.add(cut_heads(late, *part.heads), queries=plan.merges)
            elif number == 0:
                own.store_own(cut_heads(early, *part.heads))
            elif (sums := part.take(part.buffers[number].gradients, exact=True)) is not None:
                # The sums of the round before are being sent, so these lie in another buffer.
                gradients = Gradients(call, queries, round_, part.arrival, sums)
                gradients.store_remote(part.groups)
                part.grads = gradients.grads
    messages.finish()
    return queries.dq, own.grads.k, own.grads.v


class _Part:
    """The key/value heads of one part of each message.

    Attributes:
        heads: which of this rank's heads they are.
        groups: the heads as kernels take them; key/value heads count in the part.
        buffers: for each round, the buffers of the messages.
        own: the rank's own keys.
        arrival: the keys of the current round.
        grads: the sums of their gradients, in backward; None for the rank's own keys.
    """

    def __init__(self, plan: RankPlan, memory: Workspace, shard: KeyValues, number: int) -> None:
        self.heads = plan.parts[number]
        self.groups = from_zero(cut_heads(plan.groups, *self.heads))
        self.buffers = plan.part_buffers[number]
        self.own = self.arrival = shard.heads(self.heads)
        self.grads: KeyValues | None = None
        self._memory = memory

    def take(self, buffer: Buffer | None, *, exact: bool = False) -> Tensor | None:
        """Memory for a message of keys or, with ``exact``, of sums of gradients."""
        dtype = self.own.k.dtype
        dtype = accumulation_dtype(dtype) if exact else dtype
        return self.own.take(self._memory, buffer, dtype) if buffer else None

    def keys(self, message: Message, buffer: Buffer | None, *, own: bool) -> Tensor:
        """The message, with the rank's own keys or with keys of the arrival."""
        if own:
            target = self.take(buffer)
            assert target is not None
            return self.own.pack(message.spans, target)
        return self._runs(self.arrival, message, buffer)

    def gradients(self, message: Message, buffer: Buffer | None) -> Tensor:
        """The message, with sums of gradients."""
        assert self.grads is not None
        return self._runs(self.grads, message, buffer)

    def receive_keys(self, _: Sequence[Span], packed: Tensor) -> None:
        """Makes a message the keys of the next round."""
        self.arrival = KeyValues.unpack(packed, self.own)

    def add_passed(self, spans: Sequence[Span], packed: Tensor) -> None:
        """Adds the sums of the rank above to those of the current round."""
        assert self.grads is not None
        self.grads.add_(spans, packed)

    def _runs(self, source: KeyValues, message: Message, buffer: Buffer | None) -> Tensor:
        assert source.packed is not None
        return contiguous_runs(source.packed, message.spans, self._memory, buffer)


def _parts(plan: RankPlan, memory: Workspace, shard: KeyValues) -> list[_Part]:
    return [_Part(plan, memory, shard, number) for number in range(len(plan.parts))]


class _Slot:
    """The messages that one step posts, and what is done with those that arrive."""

    def __init__(self) -> None:
        self.sends: list[tuple[Tensor, int]] = []
        self.receives: list[tuple[Tensor, int]] = []
        self._then: list[Callable[[], None]] = []
        self._pending: Pending | None = None

    def receive(
        self,
        message: Message | None,
        buffer: Tensor | None,
        then: Callable[[Sequence[Span], Tensor], None],
    ) -> None:
        """Expects a message in ``buffer``; ``then`` takes its place and the buffer."""
        if message is not None and buffer is not None:
            self.receives.append((buffer, message.peer))
            self._then.append(partial(then, message.spans, buffer))

    def post(self, plan: RankPlan) -> None:
        self._pending = post(
            plan.group, sends=self.sends, receives=self.receives, sums=plan.link_sums
        )

    def finish(self, name: str) -> None:
        """Waits until all has been sent and received, and uses what has arrived.

        Args:
            name: what is waited for.
        """
        assert self._pending is not None
        with waiting_for(name):
            self._pending.wait()
        for then in self._then:
            then()


class _Messages:
    """The slots of the last steps, as many as a message has parts.

    Args:
        own: the gradients of this rank's keys, to which those from other ranks are added; None in
            forward, which sends no gradients.
    """

    def __init__(self, plan: RankPlan, own: KeyValues | None = None) -> None:
        self._plan, self._own = plan, own
        self._name = "keys" if own is None else "keys and gradients"
        self._slots: deque[_Slot] = deque()
        self._before: tuple[_Part, int] | None = None

    def exchange(self, part: _Part, number: int) -> None:
        """Waits for what round ``number`` of a part reads, and posts the messages of its slot."""
        if len(self._slots) == len(self._plan.parts):
            self._slots.popleft().finish(self._name)
        slot = _Slot()
        is_round = number < len(self._plan.rounds)
        if is_round:
            self._add_keys(slot, part, number)
        if self._own is not None and self._before is not None:
            self._add_gradients(slot, self._own, *self._before)
        self._before = (part, number) if is_round else None
        slot.post(self._plan)
        self._slots.append(slot)

    def finish(self) -> None:
        """Waits for all messages."""
        while self._slots:
            self._slots.popleft().finish(self._name)

    def _add_keys(self, slot: _Slot, part: _Part, number: int) -> None:
        """Adds the keys for the next round of the part."""
        round_, buffers = self._plan.rounds[number], part.buffers[number]
        if (message := round_.send_keys) is not None:
            own = message.owner == self._plan.rounds[0].owner
            slot.sends.append((part.keys(message, buffers.sent_keys, own=own), message.peer))
        slot.receive(round_.receive_keys, part.take(buffers.arrival), part.receive_keys)

    def _add_gradients(self, slot: _Slot, own: KeyValues, part: _Part, number: int) -> None:
        """Adds the gradients that the step before has summed: passed on, then returned."""
        round_, buffers = self._plan.rounds[number], part.buffers[number]
        for message, buffer in (
            (round_.pass_grads, buffers.sent_passed),
            (round_.return_grads, buffers.sent_returned),
        ):
            if message is not None:
                slot.sends.append((part.gradients(message, buffer), message.peer))
        passed, returned = (part.take(x, exact=True) for x in (buffers.passed, buffers.returned))
        slot.receive(round_.receive_passed, passed, part.add_passed)
        slot.receive(round_.receive_returned, returned, own.heads(part.heads).add_)
