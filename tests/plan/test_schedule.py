"""Every schedule computes exactly its mask, sends only what is needed, and both ends agree."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.exchange import EXCHANGES
from cp_megatron.plan.layout import KINDS
from tests.plan.cases import any_schedules, large_schedules, property_settings, schedules
from tests.plan.checks import (
    check_bytes,
    check_gather,
    check_head_exchange,
    check_messages,
    check_needed_only,
    check_pairs,
    check_run,
    check_tiles,
)
from tests.plan.simulation import (
    MESSAGES,
    all_gathers,
    all_head_exchanges,
    all_rounds,
    runs_without_deadlock,
    slot_messages,
)

LARGE = pytest.mark.parametrize(
    "schedule",
    large_schedules(),
    ids=lambda s: f"{s.mask.kind}-{s.layout.kind}-{s.layout.cp_size}-{s.route}",
)


def check_all(schedule: Schedule, random: Random) -> None:
    """Checks all properties of a schedule after planning its parts once."""
    rounds, gathers, head_exchanges = (
        all_rounds(schedule),
        all_gathers(schedule),
        all_head_exchanges(schedule),
    )
    ranks = list(range(schedule.layout.cp_size))
    check_pairs(schedule, rounds)
    check_needed_only(schedule, rounds)
    for rank in random.sample(ranks, min(8, len(ranks))):
        check_tiles(schedule, rank, rounds[rank])
        check_bytes(schedule, rank, rounds, gathers, head_exchanges)
        if schedule.all_to_all_size > 1:
            check_head_exchange(schedule, head_exchanges, rank)
    if schedule.exchange == "all_gather":
        check_gather(schedule, rounds, gathers)
    else:
        check_messages(schedule, rounds)
        check_run(schedule, rounds)
        random.shuffle(ranks)
        assert all(runs_without_deadlock(rounds, ranks, parts) for parts in (1, 2, 3))


@given(any_schedules(), st.randoms(use_true_random=False))
@property_settings(250)
def test_everything_holds_on_a_few_ranks(schedule: Schedule, random: Random) -> None:
    check_all(schedule, random)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exchange", EXCHANGES)
@given(data=st.data())
@property_settings(3)
def test_everything_holds_on_many_ranks(exchange: str, kind: str, data: st.DataObject) -> None:
    many = schedules((exchange,), (kind,), min_cp=9, max_cp=64, max_width=3)
    check_all(data.draw(many), data.draw(st.randoms(use_true_random=False)))


@given(schedules())
@property_settings(100)
def test_gradients_move_no_more_than_their_keys(schedule: Schedule) -> None:
    tokens = dict.fromkeys(MESSAGES, 0)
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
        check_tiles(schedule, rank, rounds[rank])
    pairs = sum(tile.pairs for mine in rounds for round_ in mine for tile in round_.tiles)
    assert pairs == schedule.mask.pairs()
    assert runs_without_deadlock(rounds, list(range(size)), 2)
    check_run(schedule, rounds)


def test_the_simulation_detects_a_deadlock() -> None:
    """One of three ranks omits a send."""
    mask = Mask.causal(12)
    rounds = all_rounds(Schedule.build(mask, SequenceLayout.make(mask, 3)))
    assert runs_without_deadlock(rounds, [0, 1, 2])
    rounds[0] = (replace(rounds[0][0], send_keys=None), *rounds[0][1:])
    assert not runs_without_deadlock(rounds, [0, 1, 2])


def test_two_ranks_literally() -> None:
    """Positions 0 1 6 7 and 2 3 4 5: rank 0 reads all of rank 1, rank 1 half of rank 0."""
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
        ({"hierarchical_sizes": (2, 2)}, "2 2: belongs to a2a"),
    ],
)
def test_what_cannot_be_planned_is_refused(options: dict[str, object], message: str) -> None:
    mask = Mask.causal(8)
    with pytest.raises(ConfigError, match=message):
        Schedule.build(mask, SequenceLayout.make(mask, 2), **options)  # type: ignore[arg-type]


def test_a_layout_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="must hold the mask's 16 positions"):
        Schedule.build(Mask.causal(16), SequenceLayout.make(Mask.causal(8), 2))
