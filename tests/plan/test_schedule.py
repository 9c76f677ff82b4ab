"""Every schedule computes exactly its mask and moves exactly what is needed, on both ends alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.rounds import Round
from tests.plan.cases import large_schedules, property_settings, schedules
from tests.plan.simulation import (
    KINDS,
    Ints,
    Machine,
    Rounds,
    all_rounds,
    expand,
    read_columns,
    runs_without_deadlock,
    slot_messages,
    tile_matrix,
    wires,
)

LARGE = pytest.mark.parametrize(
    "schedule",
    large_schedules(),
    ids=lambda s: f"{s.mask.kind}-{s.layout.kind}-{s.layout.cp_size}-{s.route}",
)


def computed(schedule: Schedule, rank: int) -> Ints:
    """int64 [S, S]: how often ``rank`` computes each pair."""
    rows = schedule.layout.positions(rank)
    count = np.zeros((schedule.mask.seq_len,) * 2, np.int64)
    for turn in schedule.rounds(rank):
        columns = expand(turn.keys)
        for tile in turn.tiles:
            where = np.ix_(rows[tile.q0 : tile.q1], columns[tile.k0 : tile.k1])
            count[where] += tile_matrix(tile)
    return count


def check_tiles(schedule: Schedule, rounds: tuple[Round, ...]) -> int:
    """What kernels rely on: lengths, trimming, kinds, which tile is a row's first."""
    touched = np.zeros(schedule.layout.shard_len, np.bool_)
    total = 0
    for number, turn in enumerate(rounds):
        for tile in turn.tiles:
            assert 0 <= tile.q0 < tile.q1 <= len(touched)
            assert 0 <= tile.k0 < tile.k1 <= turn.num_keys
            matrix = tile_matrix(tile)
            assert matrix.any(axis=1).all(), "a row without a key"
            assert matrix.any(axis=0).all(), "a column without a query"
            assert tile.pairs == matrix.sum()
            cuts = not matrix.all() or matrix.size == 1  # one token under a causal band
            assert cuts or tile.kind == "full", "a band that cuts nothing"
            if tile.kind == "causal":
                assert np.array_equal(matrix, np.tri(len(matrix), dtype=np.bool_))
            rows = touched[tile.q0 : tile.q1]
            assert rows.all() or not rows.any(), "stored over some rows, merged into others"
            assert tile.first == (not rows.any())
            rows[:] = True
            total += tile.pairs
        assert touched.all(), f"a row without a key after round {number}"
    return total


def check_messages(schedule: Schedule) -> None:
    """Both ends of every message tell the same story, and tell it in the same order."""
    rounds = all_rounds(schedule)
    sent = wires(schedule, rounds, sending=True)
    assert sent == wires(schedule, rounds, sending=False)
    for (source, target), messages in sent.items():
        assert source != target
        seen = [(wire.slot, KINDS.index(wire.kind)) for wire in messages]
        assert seen == sorted(set(seen)), "two of a kind, or not keys, passed, returned"


def check_needed_only(schedule: Schedule) -> None:
    """An arrival holds what its tiles read and, on a ring, what is passed on; nothing else."""
    for rounds in all_rounds(schedule):
        for number, turn in enumerate(rounds[1:], start=1):
            needed = read_columns(turn)
            if schedule.route == "ring" and turn.send_keys:
                needed[expand(turn.send_keys.spans)] = True
            assert needed.all()
            received = rounds[number - 1].receive_keys
            assert turn.num_keys == (received.num_tokens if received else 0)


def check_run(schedule: Schedule, rounds: Rounds) -> None:
    """Keys arrive, and every reader's gradient comes home exactly once."""
    machine = Machine(schedule, rounds)
    machine.run()
    dense = schedule.mask.dense()
    readers = [np.asarray(dense[shard].any(axis=0)) for shard in machine.shards]
    for owner, home in enumerate(machine.home):
        expected = np.stack([read[machine.shards[owner]] for read in readers], axis=1)
        expected[:, owner] = False  # a rank's own contribution never travels
        assert np.array_equal(home, expected.astype(np.int64)), owner


@given(schedules())
@property_settings(120)
def test_every_pair_is_computed_once(schedule: Schedule) -> None:
    dense = schedule.mask.dense()
    counts = [computed(schedule, rank) for rank in range(schedule.layout.cp_size)]
    assert np.array_equal(np.sum(counts, axis=0), dense.astype(np.int64))
    for rank, count in enumerate(counts):
        outside = np.delete(count, schedule.layout.positions(rank), axis=0)
        assert not outside.any(), "a rank computes rows it does not hold"


@given(schedules())
@property_settings(120)
def test_tiles_are_what_kernels_need(schedule: Schedule) -> None:
    for rank in range(schedule.layout.cp_size):
        assert check_tiles(schedule, schedule.rounds(rank)) == schedule.pairs(rank)


@given(schedules())
@property_settings(120)
def test_both_ends_of_every_message_agree(schedule: Schedule) -> None:
    check_messages(schedule)


@given(schedules())
@property_settings(100)
def test_only_what_is_needed_moves(schedule: Schedule) -> None:
    check_needed_only(schedule)


@given(schedules())
@property_settings(100)
def test_keys_arrive_and_gradients_come_home_once(schedule: Schedule) -> None:
    check_run(schedule, all_rounds(schedule))


@given(schedules(), st.randoms(use_true_random=False))
@property_settings(100)
def test_no_order_of_ranks_ends_in_a_deadlock(schedule: Schedule, random: object) -> None:
    order = list(range(schedule.layout.cp_size))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert runs_without_deadlock(all_rounds(schedule), order)


@given(schedules())
@property_settings(100)
def test_gradients_travel_no_more_than_their_keys(schedule: Schedule) -> None:
    tokens = dict.fromkeys(KINDS, 0)
    for rounds in all_rounds(schedule):
        for slot in range(len(rounds) + 1):
            for kind, message in slot_messages(rounds, slot)[1]:
                tokens[kind] += message.num_tokens
    assert tokens["passed"] + tokens["returned"] <= tokens["keys"]
    assert schedule.route == "ring" or tokens["passed"] == 0


@LARGE
def test_many_ranks(schedule: Schedule) -> None:
    size = schedule.layout.cp_size
    rounds = all_rounds(schedule)
    for rank in (0, size // 2, size - 1):
        assert check_tiles(schedule, rounds[rank]) > 0
    pairs = sum(tile.pairs for mine in rounds for turn in mine for tile in turn.tiles)
    assert pairs == schedule.mask.pairs()
    assert runs_without_deadlock(rounds, list(range(size)))
    check_run(schedule, rounds)


def test_the_simulated_deadlock_is_seen() -> None:
    """Three ranks of which one forgets a send."""
    mask = Mask.causal(12)
    rounds = all_rounds(Schedule.build(mask, SequenceLayout.make(mask, 3)))
    assert runs_without_deadlock(rounds, [0, 1, 2])
    rounds[0] = (replace(rounds[0][0], send_keys=None), *rounds[0][1:])
    assert not runs_without_deadlock(rounds, [0, 1, 2])


def test_two_ranks_literally() -> None:
    """Positions 0 1 6 7 and 2 3 4 5: rank 0 reads all of rank 1, which reads its early half."""
    mask = Mask.causal(8)
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 2, "zigzag"))
    own, other = schedule.rounds(0)
    assert (own.owner, own.keys) == (0, ((0, 2), (6, 8)))
    assert [(t.q0, t.q1, t.k0, t.k1, t.kind) for t in own.tiles] == [(0, 4, 0, 4, "causal")]
    assert own.send_keys is not None
    assert (own.send_keys.peer, own.send_keys.owner, own.send_keys.spans) == (1, 0, ((0, 2),))
    assert own.receive_keys is not None
    assert (own.receive_keys.peer, own.receive_keys.owner) == (1, 1)
    assert (other.owner, other.keys) == (1, ((2, 6),))
    assert [(t.q0, t.q1, t.k0, t.k1, t.kind) for t in other.tiles] == [(2, 4, 0, 4, "full")]
    assert other.return_grads is not None
    assert (other.return_grads.peer, other.return_grads.spans) == (1, ((0, 4),))
    assert other.receive_returned is not None
    assert other.receive_returned.spans == ((0, 2),)
    assert other.pass_grads is other.receive_passed is None
    (one,) = schedule.rounds(1)[1].tiles
    assert (one.q0, one.q1, one.k0, one.k1, one.kind) == (0, 4, 0, 2, "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "carrier pigeon"}, "--cp-comm-type carrier pigeon"),
        ({"route": "scenic"}, "route scenic"),
        ({"hierarchical_sizes": (2, 2)}, "hierarchical sizes"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, object], message: str) -> None:
    mask = Mask.causal(8)
    with pytest.raises(ConfigError, match=message):
        Schedule.build(mask, SequenceLayout.make(mask, 2), **options)  # type: ignore[arg-type]


def test_a_layout_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold the mask's 16 positions"):
        Schedule.build(Mask.causal(16), SequenceLayout.make(Mask.causal(8), 2))
