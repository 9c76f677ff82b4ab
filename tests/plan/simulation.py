"""Simulates a schedule with integers: what each rank holds, sends and receives, slot by slot.

The simulation shares no code with the engine. A key is represented by its position. The gradient of
a key is a row of counters, one per reader, which shows contributions that are lost, counted twice
or sent to the wrong place.

Slot t has the keys for round t + 1, then the gradients passed on and returned after round t - 1.

If heads are exchanged, a rank holds what its group holds together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cp_megatron.plan import Schedule
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.tiling import Band, Span, Tile

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Rounds = list[tuple[Round, ...]]
MESSAGES = ("keys", "passed", "returned")


@dataclass(frozen=True)
class Wire:
    """One end of a message: its kind, the owner of its keys, and its positions."""

    slot: int
    kind: str
    owner: int
    positions: tuple[int, ...]


def all_rounds(schedule: Schedule) -> Rounds:
    """The rounds of every rank."""
    return [schedule.rounds(rank) for rank in range(schedule.layout.cp_size)]


def all_gathers(schedule: Schedule) -> list[Gather]:
    """Every rank's part of the all-gather; empty under other exchanges."""
    found = [schedule.gather(rank) for rank in range(schedule.layout.cp_size)]
    return [gather for gather in found if gather is not None]


def all_head_exchanges(schedule: Schedule) -> list[HeadExchange]:
    """Every rank's part of the all-to-all; empty if heads are not exchanged."""
    found = [schedule.heads(rank) for rank in range(schedule.layout.cp_size)]
    return [head_exchange for head_exchange in found if head_exchange is not None]


def held(schedule: Schedule, rank: int) -> Ints:
    """The positions of the rows that ``rank`` computes, in the order in which its tiles count."""
    return schedule.group_layout.positions(rank // schedule.all_to_all_size)


def expand(spans: Iterable[Span]) -> Ints:
    """The numbers in ``spans``, one after the other."""
    return np.concatenate([np.empty(0, np.int64), *(np.arange(a, b) for a, b in spans)])


def band_matrix(band: Band, num_rows: int, num_columns: int) -> Bools:
    """bool [rows, columns]: ``i - left <= j <= i + right``, written out."""
    i, j = np.arange(num_rows)[:, None], np.arange(num_columns)[None, :]
    low = i - (num_rows if band.left is None else band.left)
    high = i + (num_columns if band.right is None else band.right)
    return np.asarray((low <= j) & (j <= high))


def tile_matrix(tile: Tile) -> Bools:
    """bool [rows, columns] of the pairs that a kernel computes for ``tile``."""
    return band_matrix(tile.band, tile.q1 - tile.q0, tile.k1 - tile.k0)


def slot_messages(
    rounds: tuple[Round, ...], slot: int
) -> tuple[list[tuple[str, Message]], list[tuple[str, Message]]]:
    """The messages that a rank sends and receives in ``slot``, in the order of its lists."""
    now = rounds[slot] if slot < len(rounds) else None
    before = rounds[slot - 1] if slot else None
    sends = [
        ("keys", now and now.send_keys),
        ("passed", before and before.pass_grads),
        ("returned", before and before.return_grads),
    ]
    receives = [
        ("keys", now and now.receive_keys),
        ("passed", before and before.receive_passed),
        ("returned", before and before.receive_returned),
    ]
    return [(k, m) for k, m in sends if m], [(k, m) for k, m in receives if m]


def sent_positions(schedule: Schedule, rounds: Rounds, rank: int, slot: int, kind: str) -> Ints:
    """The sender's buffer in which the spans of a message count, as global positions."""
    own = held(schedule, rank)
    if kind == "keys":
        from_shard = slot == 0 or schedule.route == "direct"
        return own if from_shard else expand(rounds[rank][slot].keys)
    return expand(rounds[rank][slot - 1].keys)


def received_positions(schedule: Schedule, rounds: Rounds, rank: int, slot: int, kind: str) -> Ints:
    """The receiver's buffer in which the spans of a message count, as global positions."""
    if kind == "returned":
        return held(schedule, rank)
    return expand(rounds[rank][slot + 1 if kind == "keys" else slot].keys)


def wires(
    schedule: Schedule, rounds: Rounds, *, sending: bool
) -> dict[tuple[int, int], list[Wire]]:
    """For each ordered pair (from, to), the messages as one end lists them."""
    found: dict[tuple[int, int], list[Wire]] = {}
    for rank, mine in enumerate(rounds):
        for slot in range(len(mine) + 1):
            for kind, message in slot_messages(mine, slot)[0 if sending else 1]:
                place = sent_positions if sending else received_positions
                buffer = place(schedule, rounds, rank, slot, kind)
                picked = tuple(buffer[expand(message.spans)].tolist())
                assert message.num_tokens == len(picked) > 0
                pair = (rank, message.peer) if sending else (message.peer, rank)
                found.setdefault(pair, []).append(Wire(slot, kind, message.owner, picked))
    return found


def read_columns(round_: Round) -> Bools:
    """bool [keys]: the arrived keys that some tile attends."""
    read = np.zeros(round_.num_keys, dtype=np.bool_)
    for tile in round_.tiles:
        read[tile.k0 : tile.k1] |= tile_matrix(tile).any(axis=0)
    return read


class Machine:
    """All ranks in lockstep, with buffers of positions for keys and counters for gradients."""

    def __init__(self, schedule: Schedule, rounds: Rounds) -> None:
        self.rounds = rounds
        self.size, self.all_to_all_size = schedule.layout.cp_size, schedule.all_to_all_size
        self.shards = [held(schedule, rank) for rank in range(self.size)]
        self.arrived: list[Ints] = list(self.shards)
        self.home = [np.zeros((len(shard), self.size), np.int64) for shard in self.shards]
        self.partial = [np.zeros((0, self.size), np.int64) for _ in self.shards]

    def run(self) -> None:
        """Runs all slots. All messages of a slot leave before any of them arrives."""
        num_rounds = len(self.rounds[0])
        for slot in range(num_rounds + 1):
            flights = list(self._departures(slot))
            if slot < num_rounds:
                self._compute(slot)
            for rank in range(self.size):
                self._arrive(rank, slot, [f for f in flights if f[1] == rank])

    def _departures(self, slot: int) -> Iterator[tuple[int, int, str, Ints]]:
        for rank in range(self.size):
            for kind, message in slot_messages(self.rounds[rank], slot)[0]:
                if kind != "keys":
                    source = self.partial[rank]
                elif message.owner == rank // self.all_to_all_size:
                    source = self.shards[rank]
                else:
                    source = self.arrived[rank]
                payload = source[expand(message.spans)].copy()
                assert kind == "keys" or payload.any(axis=1).all(), (
                    "a gradient without a contribution"
                )
                yield rank, message.peer, kind, payload

    def _compute(self, slot: int) -> None:
        for rank in range(self.size):
            round_ = self.rounds[rank][slot]
            assert np.array_equal(self.arrived[rank], expand(round_.keys)), (rank, slot)
            counts = np.zeros((round_.num_keys, self.size), np.int64)
            if slot:
                counts[read_columns(round_), rank] += 1
            self.partial[rank] = counts

    def _arrive(self, rank: int, slot: int, flights: list[tuple[int, int, str, Ints]]) -> None:
        self.arrived[rank] = np.empty(0, np.int64)
        for kind, message in slot_messages(self.rounds[rank], slot)[1]:
            match = [f for f in flights if f[0] == message.peer and f[2] == kind]
            assert len(match) == 1, (rank, slot, kind)
            payload = match[0][3]
            if kind == "keys":
                self.arrived[rank] = payload
            elif kind == "passed":
                np.add.at(self.partial[rank], expand(message.spans), payload)
            else:
                np.add.at(self.home[rank], expand(message.spans), payload)


def step_messages(
    rounds: tuple[Round, ...], step: int, parts: int
) -> tuple[list[tuple[str, Message]], list[tuple[str, Message]]]:
    """What a rank sends and receives in the slot of a step, one part of a round.

    These are the part's keys for the next round, and the gradients of the step before.
    """
    now, before = step // parts, (step - 1) // parts
    sends, receives = (
        [(k, m) for k, m in slot_messages(rounds, now)[end] if k == "keys"]
        + [(k, m) for k, m in slot_messages(rounds, before + 1)[end] if k != "keys"]
        if before < len(rounds)
        else []
        for end in (0, 1)
    )
    return sends, receives


def runs_without_deadlock(rounds: Rounds, order: list[int], parts: int = 1) -> bool:
    """Whether ranks reach the end, and no message meets another one.

    Each rank posts the slot of a step at once, and before it the slot ``parts`` steps earlier must
    have completed. A message completes once both ends have posted it. The n-th send from one rank
    to another meets the n-th receive there. ``order`` is the order in which ranks are checked.
    """
    sent: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
    expected: dict[tuple[int, int], list[tuple[str, int, int]]] = {}
    waiting: list[list[list[tuple[tuple[int, int], int]]]] = [[] for _ in rounds]
    num_steps = (max(map(len, rounds)) + 1) * parts

    def completed(rank: int, step: int) -> bool:
        return step < 0 or all(
            min(len(sent.get(pair, ())), len(expected.get(pair, ()))) >= n
            for pair, n in waiting[rank][step]
        )

    progress = True
    while progress:
        progress = False
        for rank in order:
            step = len(waiting[rank])
            if step == num_steps or not completed(rank, step - parts):
                continue
            progress = True
            posted = []
            sends, receives = step_messages(rounds[rank], step, parts)
            for kind, message in sends:
                pair = rank, message.peer
                sent.setdefault(pair, []).append((kind, step, message.num_tokens))
                posted.append((pair, len(sent[pair])))
            for kind, message in receives:
                pair = message.peer, rank
                expected.setdefault(pair, []).append((kind, step, message.num_tokens))
                posted.append((pair, len(expected[pair])))
            waiting[rank].append(posted)
    ranks = range(len(rounds))
    ended = all(len(steps) == num_steps for steps in waiting)
    return (
        ended
        and sent == expected
        and all(completed(rank, step) for rank in ranks for step in range(num_steps))
    )


def gathered(schedule: Schedule, gathers: list[Gather]) -> Ints:
    """The keys that every rank gathers, -1 for padding."""
    parts = []
    for rank, gather in enumerate(gathers):
        given = schedule.layout.positions(rank)[expand(gather.given)]
        parts.append(np.pad(given, (0, gather.width - len(given)), constant_values=-1))
    assert len({len(part) for part in parts}) == 1, "a collective of unequal parts"
    return np.concatenate(parts)


def heads_of_tokens(tokens: Ints, heads: Span) -> Ints:
    """int64 [tokens, heads, 2]: position and head of each element of a message."""
    pairs = np.broadcast_arrays(tokens[:, None], np.arange(*heads)[None, :])
    return np.stack(pairs, axis=-1)


def exchanged_heads(
    schedule: Schedule, head_exchanges: list[HeadExchange], rank: int, kind: str
) -> tuple[Ints, int]:
    """Simulates the all-to-all of ``query`` or ``kv`` heads for ``rank``.

    Returns:
        int64 [tokens of the group, heads of the rank, 2]: position and head that arrived, -1 if
        nothing did; and the number of (token, head) pairs that came from other ranks.
    """
    mine = head_exchanges[rank]
    start, stop = (mine.query_heads if kind == "query" else mine.kv_heads)[mine.index]
    buffer = np.full((len(held(schedule, rank)), stop - start, 2), -1, np.int64)
    moved = 0
    for place, peer in enumerate(mine.peers):
        theirs = head_exchanges[peer]
        heads = (theirs.query_heads if kind == "query" else theirs.kv_heads)[mine.index]
        sent = heads_of_tokens(schedule.layout.positions(peer), heads)
        rows = expand(mine.rows[place])
        assert (buffer[rows] == -1).all(), "two tokens in one place"
        buffer[rows] = sent
        moved += sent[..., 0].size if peer != rank else 0
    return buffer, moved


def results_returned(
    schedule: Schedule, head_exchanges: list[HeadExchange], rank: int
) -> tuple[Ints, int]:
    """The way back: int64 [tokens of the shard, query heads, 2], and the number received."""
    mine = head_exchanges[rank]
    parts, moved = [], 0
    for peer in mine.peers:
        theirs = head_exchanges[peer]
        rows = held(schedule, peer)[expand(theirs.rows[mine.index])]
        parts.append(heads_of_tokens(rows, theirs.query_heads[theirs.index]))
        moved += parts[-1][..., 0].size if peer != rank else 0
    return np.concatenate(parts, axis=1), moved
