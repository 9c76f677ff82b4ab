"""A rehearsal counts the messages of a schedule and finds those that no receiver expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.rehearsal import rehearse
from cp_megatron.plan.rounds import Message, Round
from tests.plan.cases import any_schedules, property_settings


def ring(cp_size: int = 4, route: str = "ring") -> Schedule:
    mask = Mask.causal(8 * cp_size)
    return Schedule.build(mask, SequenceLayout.make(mask, cp_size, "zigzag"), "p2p", route)


def test_two_ranks_send_keys_and_get_gradients_back() -> None:
    assert rehearse(ring(2)).num_messages == 4
    assert rehearse(ring(1)).num_messages == 0
    in_parts = replace(ring(2), num_heads=4, num_kv_heads=4, message_parts=4)
    assert rehearse(in_parts).num_messages == 16
    mask = Mask.causal(32)
    layout = SequenceLayout.make(mask, 4, "zigzag")
    assert rehearse(Schedule.build(mask, layout, "all_gather")).num_messages == 4
    assert rehearse(Schedule.build(mask, layout, "a2a", num_heads=4)).num_messages == 4


def test_many_ranks_are_rehearsed_in_part() -> None:
    found = rehearse(ring(256))
    assert found.num_ranks == 16
    assert found.num_messages > 256


@property_settings(60)
@given(any_schedules())
def test_every_schedule_can_be_rehearsed(schedule: Schedule) -> None:
    assert rehearse(schedule).num_ranks == schedule.layout.cp_size


def moved(message: Message | None) -> Message | None:
    if message is None:
        return None
    (start, stop), *rest = message.spans
    return replace(message, spans=((start, stop - 1), *rest))


BROKEN: dict[str, Callable[[Round], Round]] = {
    "not sent": lambda round_: replace(round_, send_keys=None),
    "not received": lambda round_: replace(round_, receive_keys=None),
    "shorter": lambda round_: replace(round_, send_keys=moved(round_.send_keys)),
    "to another": lambda round_: replace(
        round_, send_keys=round_.send_keys and replace(round_.send_keys, peer=0)
    ),
    "gradients kept": lambda round_: replace(round_, return_grads=None),
    "gradients not awaited": lambda round_: replace(round_, receive_returned=None),
    "gradients not passed": lambda round_: replace(round_, pass_grads=None),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_message_that_the_receiver_does_not_expect(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = Schedule.rounds

    def broken(self: Schedule, rank: int) -> tuple[Round, ...]:
        found = rounds(self, rank)
        return tuple(map(BROKEN[fault], found)) if rank == 2 else found

    schedule = ring()
    rehearse(schedule)
    monkeypatch.setattr(Schedule, "rounds", broken)
    with pytest.raises(AssertionError, match="is not what the receiver expects"):
        rehearse(schedule)
