"""The buffers that the messages of one attention occupy: their names and their sizes.

``context_parallel`` asks these functions which buffers to take, and ``memory`` adds up their sizes
before a tensor exists. A buffer is kept from one attention to the next and grows to its largest
message. Each buffer of p2p holds at most the tokens of a shard, whatever the number of ranks:

    keys               2   this round's arrival and the next one
    sent keys          1   keys to send that are not one run of the arrival
    gradients          2   the sums of this round, and those of the round before, which are sent
    sent gradients     2   gradients to pass on or to return that are not one run of the sums
    passed, returned   2   gradients that arrive

Round 0 has no arrival yet, so its keys to send are packed into the second buffer for keys. The last
three rows occur in backward only and hold sums: float32, or float64 for float64 inputs. If messages
are sent in parts (ring.py), each part of the heads has such buffers for its share of a message.

If latents are sent, their messages occupy these buffers too. The keys and values of one arrival are
expanded for a few heads at a time into another buffer, and in backward a second one sums their
gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from cp_megatron.plan.gather import Gather
from cp_megatron.plan.halo import Halo
from cp_megatron.plan.heads import HeadExchange, all_heads, even_runs, halves
from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.states import StatePlan, StateSize
from cp_megatron.plan.tiling import Span, num_positions

MAX_PORTIONS = 4
"""Each further portion is one more collective and makes tiles smaller; four hide all but a quarter
of the communication."""
LEAST_PORTION = 4 << 20
"""Bytes: below this size of a portion, starting another collective costs more than it hides."""

MOST_EXPANDED = 128 << 20
"""Bytes: as many heads of an arrival are expanded together as take no more, but at least one."""

SENT_HEADS, RECEIVED_HEADS = "keys 0", "keys 1"
"""An all-to-all uses the buffers for keys, because it never runs at the same time as the rounds."""
EXPANDED, EXPANDED_GRADIENTS = "expanded", "expanded gradients"
"""Keys and values that are expanded from latents, and in backward the sums of their gradients."""


class Buffer(NamedTuple):
    """A named buffer and the number of tokens that a message occupies in it."""

    name: str
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class RoundBuffers:
    """The buffers of one round of p2p. None means that the round does not need the buffer.

    Attributes:
        sent_keys: keys to send. Keys that form one run of the arrival are sent in place.
        arrival: the keys of the next round.
        gradients: sums of the gradients of this round's keys; None for this rank's keys, whose
            gradients are returned to the caller and need memory of their own.
        sent_passed, sent_returned: gradients to pass on or to return; one run is sent in place.
        passed, returned: gradients that arrive after this round.
    """

    sent_keys: Buffer | None
    arrival: Buffer | None
    gradients: Buffer | None
    sent_passed: Buffer | None
    sent_returned: Buffer | None
    passed: Buffer | None
    returned: Buffer | None


def ring_buffers(rounds: Sequence[Round], part: int = 0) -> tuple[RoundBuffers, ...]:
    """Assigns the messages of each round, or part number ``part`` of each, to buffers."""
    assigned = []
    suffix = f", part {part}" if part else ""
    filled = 0  # which of the two buffers for keys the next arrival fills
    for number, round_ in enumerate(rounds):
        sent = round_.send_keys
        is_own = sent is not None and sent.owner == rounds[0].owner
        name = ("sent keys" if number else f"keys {1 - filled}") + suffix
        sums = Buffer(f"gradients {number % 2}{suffix}", round_.num_keys)
        assigned.append(
            RoundBuffers(
                sent_keys=_buffer(name, sent) if is_own else _unless_one_run(name, sent),
                arrival=_buffer(f"keys {filled}{suffix}", round_.receive_keys),
                gradients=sums if number and round_.num_keys else None,
                sent_passed=_unless_one_run(f"sent gradients, pass{suffix}", round_.pass_grads),
                sent_returned=_unless_one_run(
                    f"sent gradients, return{suffix}", round_.return_grads
                ),
                passed=_buffer(f"passed{suffix}", round_.receive_passed),
                returned=_buffer(f"returned{suffix}", round_.receive_returned),
            )
        )
        if round_.receive_keys:
            filled = 1 - filled
    return tuple(assigned)


def _buffer(name: str, message: Message | None) -> Buffer | None:
    return Buffer(name, message.num_tokens) if message else None


def _unless_one_run(name: str, message: Message | None) -> Buffer | None:
    return _buffer(name, message) if message and len(message.spans) > 1 else None


@dataclass(frozen=True, kw_only=True)
class GatherBuffers:
    """The buffers of one portion of an all-gather.

    Attributes:
        given, gathered: input and output of the all-gather. Two portions alternate, because one is
            gathered while the other is computed.
        picked: the gathered keys that this rank reads; None if they are one run, or none at all.
        gradients: gradients of the picked keys.
        spread, returned: input and output of the reduce-scatter of gradients.
    """

    given: Buffer
    gathered: Buffer
    picked: Buffer | None
    gradients: Buffer | None
    spread: Buffer
    returned: Buffer


def gather_buffers(gather: Gather, num_ranks: int, number: int) -> GatherBuffers:
    """Assigns portion ``number`` of an all-gather over ``num_ranks`` to buffers."""
    width, total, num_picked = gather.width, num_ranks * gather.width, num_positions(gather.picked)
    return GatherBuffers(
        given=Buffer(f"given {number % 2}", width),
        gathered=Buffer(f"gathered {number % 2}", total),
        picked=Buffer("picked", num_picked) if len(gather.picked) > 1 else None,
        gradients=Buffer("gradients", num_picked) if num_picked else None,
        spread=Buffer("spread", total),
        returned=Buffer("returned", width),
    )


def gather_portions(
    gather: Gather, num_ranks: int, num_kv_heads: int, head_bytes: int
) -> list[Span]:
    """Splits key/value heads into the nearly equal runs that are gathered one after the other.

    ``head_bytes`` counts the keys and values of one head of one token, for the whole batch.
    """
    num_bytes = num_ranks * gather.width * num_kv_heads * head_bytes
    count = min(num_kv_heads, MAX_PORTIONS, max(1, num_bytes // LEAST_PORTION))
    return list(even_runs(num_kv_heads, count))


def expanded_portions(heads: Span, head_bytes: int) -> list[Span]:
    """Splits query heads into the runs whose keys and values are expanded one after the other.

    ``head_bytes`` counts the expanded keys and values of one head of an arrival.
    """
    at_once = max(1, MOST_EXPANDED // head_bytes)
    start, stop = heads
    return [(first, min(first + at_once, stop)) for first in range(start, stop, at_once)]


def message_widths(
    exchange: HeadExchange, tensors: Iterable[tuple[Sequence[Span], int]], *, to_heads: bool
) -> tuple[list[int], list[int]]:
    """Elements per token of the messages that a rank sends to and receives from each peer.

    Args:
        exchange: this rank's part of the all-to-all.
        tensors: for each tensor, the heads that each peer computes, and the width of a head.
        to_heads: whether tokens are exchanged for heads; otherwise heads for tokens.
    """
    tensors = list(tensors)
    peers = range(len(exchange.peers))
    all_heads = [sum(num_positions([heads[i]]) * dim for heads, dim in tensors) for i in peers]
    own_heads = [all_heads[exchange.index]] * len(all_heads)
    return (all_heads, own_heads) if to_heads else (own_heads, all_heads)


@dataclass(frozen=True, kw_only=True)
class AttentionSizes:
    """Sizes of one rank's queries, keys and values.

    Attributes:
        batch, num_tokens: rows, and tokens of each row on this rank.
        kv_heads, head_dim: as this rank holds them before any all-to-all.
        v_head_dim: the width of a value head; None: that of a key head.
        element: bytes of one element of the activations.
        exact: bytes of one element of a sum.
    """

    batch: int
    num_tokens: int
    kv_heads: int
    head_dim: int
    element: int
    exact: int
    v_head_dim: int | None = None

    @property
    def key_width(self) -> int:
        """Elements of the key and the value of one token and head."""
        return self.head_dim + self.value_dim

    @property
    def value_dim(self) -> int:
        """The width of a value head, with the default filled in."""
        return self.head_dim if self.v_head_dim is None else self.v_head_dim


@dataclass(frozen=True, kw_only=True)
class RecurrenceSizes:
    """Sizes of one rank's recurrence and of the convolution before it.

    Attributes:
        batch: number of rows.
        num_heads: heads with a state, of one tensor parallel rank.
        state: elements of a head's transition and state.
        channels: channels that are convolved.
        element, exact: as in ``AttentionSizes``.
    """

    batch: int
    num_heads: int
    state: StateSize
    channels: int
    element: int
    exact: int


class BufferSizes:
    """The size in bytes of each buffer, grown to the largest message so far."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    @property
    def num_bytes(self) -> int:
        """The sum over all buffers."""
        return sum(self._sizes.values())

    def add(self, schedule: Schedule, rank: int, x: AttentionSizes, *, backward: bool) -> None:
        """Grows the buffers to what one pass of an attention, forward or backward, needs."""
        head, kv_heads = x.batch * x.key_width, x.kv_heads
        if schedule.latent is not None:
            self._expand(schedule, rank, x, backward=backward)
            head, kv_heads = x.batch * sum(schedule.latent), 1
        if gather := schedule.gather(rank):
            num_ranks = schedule.layout.cp_size
            portions = gather_portions(gather, num_ranks, kv_heads, head * x.element)
            for number, (start, stop) in enumerate(portions if gather.width else []):
                use, token = gather_buffers(gather, num_ranks, number), (stop - start) * head
                self._grow(token * x.element, use.given, use.gathered, use.picked)
                if backward:
                    self._grow(token * x.exact, use.gradients, use.spread, use.returned)
            return
        if exchange := schedule.heads(rank):
            self._exchange_heads(exchange, x, backward=backward)
            kv_heads = num_positions([exchange.kv_heads[exchange.index]])
        rounds = schedule.rounds(rank)
        for part, heads in enumerate(even_runs(kv_heads, schedule.message_parts)):
            token = num_positions([heads]) * head
            for buffers in ring_buffers(rounds, part):
                self._grow(token * x.element, buffers.sent_keys, buffers.arrival)
                if backward:
                    sent = buffers.sent_passed, buffers.sent_returned
                    sums = buffers.gradients, buffers.passed, buffers.returned
                    self._grow(token * x.exact, *sent, *sums)

    def add_recurrence(
        self, plan: StatePlan, halo: Halo, rank: int, x: RecurrenceSizes, *, backward: bool
    ) -> None:
        """Grows the buffers to what one pass of a recurrence and its convolution needs."""
        sent, received = sum(map(len, halo.send)), len(halo.received)
        tokens = (received, sent) if backward else (sent, received)
        names = SENT_HEADS, RECEIVED_HEADS
        self._grow(x.batch * x.channels * x.element, *map(Buffer, names, tokens))
        if not plan.chains:
            return
        given, returned = zip(*plan.elements(x.state, backward=backward))
        share = plan.num_heads_of(rank)
        messages = (
            (given[rank] * x.num_heads, sum(given) * share),
            (sum(returned) * share, returned[rank] * x.num_heads),
        )
        for elements in messages:
            self._grow(x.batch * x.exact, *map(Buffer, names, elements))

    def _expand(self, schedule: Schedule, rank: int, x: AttentionSizes, *, backward: bool) -> None:
        """Adds the keys and values of the heads that are expanded together, and their gradients."""
        assert schedule.num_heads is not None
        groups, rounds = all_heads(schedule.num_heads, 1), schedule.rounds(rank)
        in_halves = backward and any(round_.receives for round_ in rounds)
        for number, round_ in enumerate(rounds):
            if not round_.tiles:
                continue
            token = x.batch * x.key_width
            head_bytes = round_.num_keys * token * x.element
            for group in chain(*halves(groups)) if in_halves and number == 0 else groups:
                heads = num_positions(expanded_portions(group.queries, head_bytes)[:1])
                self._grow(heads * token * x.element, Buffer(EXPANDED, round_.num_keys))
                if backward:
                    self._grow(heads * token * x.exact, Buffer(EXPANDED_GRADIENTS, round_.num_keys))

    def _exchange_heads(self, exchange: HeadExchange, x: AttentionSizes, *, backward: bool) -> None:
        kv = [(exchange.kv_heads, x.head_dim), (exchange.kv_heads, x.value_dim)]
        q, out = [(exchange.query_heads, x.head_dim)], [(exchange.query_heads, x.value_dim)]
        messages = [(q + kv, x.element, True), (out, x.element, False)]
        if backward:
            exact = x.exact if exchange.repeats_kv_heads else x.element
            parts = [(q + kv, exact)] if exact == x.element else [(q, x.element), (kv, exact)]
            messages = [(out, x.element, True), *((*part, False) for part in parts)]
        for tensors, element, to_heads in messages:
            widths = message_widths(exchange, tensors, to_heads=to_heads)
            for name, per_peer in zip((SENT_HEADS, RECEIVED_HEADS), widths):
                self._grow(x.batch * sum(per_peer) * element, Buffer(name, x.num_tokens))

    def _grow(self, token_bytes: int, *buffers: Buffer | None) -> None:
        for name, num_tokens in filter(None, buffers):
            self._sizes[name] = max(num_tokens * token_bytes, self._sizes.get(name, 0))
