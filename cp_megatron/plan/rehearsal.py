"""A schedule's exchange gone through on one process: does everybody expect what is sent?

Every rank's rounds are laid side by side. What a rank sends in a slot must be what its receiver
waits for in the same slot, position by position: then no message is lost, none is waited for in
vain, and no two ranks wait for each other.

    slot 0   rank 1 sends keys 8-15 to rank 0      rank 0 waits for keys 8-15 of rank 1
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.tiles import Span, merge_spans

ROUNDS = 4096
"""Gone through at most, a second's work: of more than 64 ranks fewer, neighbours, and the messages
between them."""

Wire = tuple[int, str, int, int]
"""Slot, kind, sender, receiver."""


@dataclass(frozen=True)
class Rehearsal:
    """What was gone through.

    Attributes:
        num_ranks: whose parts were laid side by side.
        num_messages: of keys or gradients between two of them; of collectives, one per rank.
    """

    num_ranks: int
    num_messages: int


def rehearse(schedule: Schedule) -> Rehearsal:
    """Goes through one attention, forward and backward.

    Raises:
        AssertionError: two ranks do not expect the same of each other: a fault of the plan.
    """
    size = schedule.layout.cp_size
    ranks = range(min(size, max(2, ROUNDS // size)))
    sent: dict[Wire, list[Span]] = {}
    expected: dict[Wire, list[Span]] = {}
    for rank in ranks:
        for wire, spans, sending in _wires(schedule.rounds(rank), rank):
            if wire[2] in ranks and wire[3] in ranks:
                (sent if sending else expected)[wire] = spans
    odd = [wire for wire in sent.keys() | expected.keys() if sent.get(wire) != expected.get(wire)]
    assert not odd, f"slot, kind, sender, receiver: {min(odd)} is not what is waited for"
    return Rehearsal(len(ranks), len(sent) + _collectives(schedule, ranks))


def _wires(rounds: Sequence[Round], rank: int) -> Iterator[tuple[Wire, list[Span], bool]]:
    """Every message of a rank: its wire, the positions in it, and whether it is sent."""
    shard = rounds[0].keys
    for slot, turn in enumerate(rounds):
        following = rounds[slot + 1].keys if slot + 1 < len(rounds) else ()
        # What a rank sends on lies in its arrival, what is its own in its shard.
        ends: tuple[tuple[str, Message | None, Sequence[Span], bool], ...] = (
            ("keys", turn.send_keys, _source(turn, rounds[0]), True),
            ("keys", turn.receive_keys, following, False),
            ("passed", turn.pass_grads, turn.keys, True),
            ("passed", turn.receive_passed, following, False),
            ("returned", turn.return_grads, turn.keys, True),
            ("returned", turn.receive_returned, shard, False),
        )
        for kind, message, runs, sending in ends:
            if message is not None:
                pair = (rank, message.peer) if sending else (message.peer, rank)
                yield (slot, kind, *pair), _picked(runs, message.spans), sending


def _source(turn: Round, first: Round) -> Sequence[Span]:
    own = turn.send_keys is not None and turn.send_keys.owner == first.owner
    return first.keys if own else turn.keys


def _picked(runs: Sequence[Span], spans: Iterable[Span]) -> list[Span]:
    """The positions that lie at ``spans`` of a buffer that holds ``runs`` one after the other."""
    found: list[Span] = []
    for begin, end in spans:
        offset = 0
        for start, stop in runs:
            a, b = max(begin - offset, 0), min(end - offset, stop - start)
            if a < b:
                found.append((start + a, start + b))
            offset += stop - start
        assert end <= offset, "a message reads behind the end of its buffer"
    return merge_spans(found)


def _collectives(schedule: Schedule, ranks: range) -> int:
    """Gathers and trades that all ranks see alike."""
    gathers = [schedule.gather(rank) for rank in ranks]
    trades = [schedule.heads(rank) for rank in ranks]
    widths = {gather.width if gather else 0 for gather in gathers}
    assert len(widths) == 1, "ranks give parts of different lengths to one gather"
    for rank, trade in zip(ranks, trades):
        if trade is None:
            continue
        assert trade.peers[trade.index] == rank
        for other in (trades[peer] for peer in trade.peers if peer in ranks):
            assert other is not None
            assert (other.peers, other.kv_heads) == (trade.peers, trade.kv_heads)
            assert (other.query_heads, other.rows) == (trade.query_heads, trade.rows)
    return sum(found is not None for found in (*gathers, *trades))
