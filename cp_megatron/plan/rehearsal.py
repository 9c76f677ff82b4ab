"""Rehearses a schedule's exchange on one process: does each rank expect what the others send?

The rounds of all ranks are compared. What a rank sends in a slot must be what its receiver waits
for in the same slot, position by position and in the same parts. Then no message is lost, no rank
waits for a message that never comes, and no two ranks wait for each other.

    slot 0   rank 1 sends keys 8-15 to rank 0      rank 0 waits for keys 8-15 of rank 1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.schedule import Schedule
from cp_megatron.plan.tiling import Span, num_positions, positions_at

ROUNDS = 4096
"""The number of rounds to rehearse at most, about a second's work. On more than 64 ranks it covers
only some neighbours and the messages between them."""

Wire = tuple[int, str, int, int]
"""Slot, kind, sender, receiver."""
Parts = tuple[Span, ...]
"""The key/value heads of each part of a message."""


@dataclass(frozen=True)
class Rehearsal:
    """The ranks that were compared, and the messages of keys or gradients between any two of them.

    Each rank in a collective counts as one message.
    """

    num_ranks: int
    num_messages: int


def rehearse(schedule: Schedule) -> Rehearsal:
    """Rehearses one attention, forward and backward.

    Raises:
        AssertionError: two ranks disagree on a message, which is a bug in the plan.
    """
    size = schedule.layout.cp_size
    ranks = range(min(size, max(2, ROUNDS // size)))
    sent: dict[Wire, tuple[list[Span], Parts]] = {}
    expected: dict[Wire, tuple[list[Span], Parts]] = {}
    for rank in ranks:
        parts = schedule.parts(rank)
        for wire, spans, sending in _wires(schedule.rounds(rank), rank):
            if wire[2] in ranks and wire[3] in ranks:
                (sent if sending else expected)[wire] = spans, parts
    odd = [wire for wire in sent.keys() | expected.keys() if sent.get(wire) != expected.get(wire)]
    assert not odd, f"slot, kind, sender, receiver: {min(odd)} is not what the receiver expects"
    num_messages = sum(len(parts) for _, parts in sent.values())
    return Rehearsal(len(ranks), num_messages + _collectives(schedule, ranks))


def _wires(rounds: Sequence[Round], rank: int) -> Iterator[tuple[Wire, list[Span], bool]]:
    """Every message of a rank: its wire, the positions in it, and whether this rank sends it."""
    shard = rounds[0].keys
    for slot, round_ in enumerate(rounds):
        following = rounds[slot + 1].keys if slot + 1 < len(rounds) else ()
        # Keys to forward lie in this rank's arrival, its own keys in its shard.
        sends_own = round_.send_keys is not None and round_.send_keys.owner == rounds[0].owner
        ends: tuple[tuple[str, Message | None, Sequence[Span], bool], ...] = (
            ("keys", round_.send_keys, shard if sends_own else round_.keys, True),
            ("keys", round_.receive_keys, following, False),
            ("passed", round_.pass_grads, round_.keys, True),
            ("passed", round_.receive_passed, following, False),
            ("returned", round_.return_grads, round_.keys, True),
            ("returned", round_.receive_returned, shard, False),
        )
        for kind, message, runs, sending in ends:
            if message is not None:
                pair = (rank, message.peer) if sending else (message.peer, rank)
                positions = positions_at(runs, message.spans)
                whole = num_positions(positions) == message.num_tokens
                assert whole, "a message reads behind the end of its buffer"
                yield (slot, kind, *pair), positions, sending


def _collectives(schedule: Schedule, ranks: range) -> int:
    """Checks that all ranks agree on gathers and all-to-alls; returns how many there are."""
    gathers = [schedule.gather(rank) for rank in ranks]
    head_exchanges = [schedule.heads(rank) for rank in ranks]
    widths = {gather.width if gather else 0 for gather in gathers}
    assert len(widths) == 1, "ranks give parts of different lengths to one gather"
    for rank, mine in zip(ranks, head_exchanges):
        if mine is not None:
            assert mine.peers[mine.index] == rank
            for other in (head_exchanges[peer] for peer in mine.peers if peer in ranks):
                assert other is not None
                assert replace(other, index=mine.index, groups=mine.groups) == mine
    return sum(found is not None for found in (*gathers, *head_exchanges))
