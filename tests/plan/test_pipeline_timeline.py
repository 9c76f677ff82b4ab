"""Simulated pipelines: when passes run, and that messages pass in every plan but a broken one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.plan.pipeline import Action, PipelinePlan
from cp_megatron.plan.pipeline_timeline import PipelineTimeline
from tests.plan.cases import property_settings
from tests.plan.test_pipeline import plans

simulate = PipelineTimeline.simulate


def times(timeline: PipelineTimeline, stage: int) -> list[tuple[str, float, float]]:
    return [
        (f"{action.kind[0].upper()}{action.microbatch}", start, end)
        for action, start, end in timeline.passes[stage]
    ]


def test_two_stages_literally() -> None:
    """The drawing of ``plan/pipeline.py``."""
    timeline = simulate(PipelinePlan(2, 4))
    assert times(timeline, 0) == [
        ("F0", 0, 1), ("F1", 1, 2), ("B0", 4, 6), ("F2", 6, 7), ("B1", 7, 9), ("F3", 9, 10),
        ("B2", 10, 12), ("B3", 13, 15),
    ]  # fmt: skip
    assert times(timeline, 1) == [
        ("F0", 1, 2), ("B0", 2, 4), ("F1", 4, 5), ("B1", 5, 7), ("F2", 7, 8), ("B2", 8, 10),
        ("F3", 10, 11), ("B3", 11, 13),
    ]  # fmt: skip
    assert timeline.duration == 15
    assert timeline.idle(0) == timeline.idle(1) == pytest.approx(3 / 15)


def test_chunks_have_their_own_durations() -> None:
    """Chunk 0 is of stage 0; the second stage is the slower one, and stage 0 waits for it."""
    timeline = simulate(PipelinePlan(2, 2), forward=[1, 3], backward=[2, 5])
    assert times(timeline, 1) == [("F0", 1, 4), ("B0", 4, 9), ("F1", 9, 12), ("B1", 12, 17)]
    assert times(timeline, 0) == [("F0", 0, 1), ("F1", 1, 2), ("B0", 9, 11), ("B1", 17, 19)]
    assert timeline.idle(0) == pytest.approx(13 / 19)
    assert timeline.bubble == pytest.approx((13 / 19 + 3 / 19) / 2)


@given(plans(), st.floats(0.5, 4))
@property_settings(100)
def test_no_pass_runs_before_what_it_needs(plan: PipelinePlan, backward: float) -> None:
    timeline = simulate(plan, backward=backward)
    ends: dict[tuple[str, int, int], float] = {}
    for stage, passes in enumerate(timeline.passes):
        assert tuple(timed.action for timed in passes) == plan.actions(stage)
        now = 0.0
        for (kind, microbatch, chunk), start, end in passes:
            assert start >= now
            now = end
            ends[kind, microbatch, plan.chunk_of_model(stage, chunk)] = end
    last = plan.num_stages * plan.num_chunks - 1
    for stage, passes in enumerate(timeline.passes):
        previous = 0.0
        for (kind, microbatch, chunk), start, end in passes:
            number = plan.chunk_of_model(stage, chunk)
            step = -1 if kind == "forward" else 1
            needed = previous
            if 0 <= number + step <= last:
                needed = max(needed, ends[kind, microbatch, number + step])
            elif kind == "backward":
                needed = max(needed, ends["forward", microbatch, number])
            assert start == needed, "a pass waits for nothing else"
            previous = end


@given(plans(), st.sampled_from([1.0, 2.0, 2.5]))
@property_settings(150)
def test_the_bubble_is_the_formulas(plan: PipelinePlan, backward: float) -> None:
    assert simulate(plan, backward=backward).bubble == pytest.approx(plan.bubble, abs=1e-9)


def check_all(sizes: Iterable[int], num_microbatches: Iterable[int]) -> None:
    for num_stages, num_chunks, number in product(sizes, range(1, 5), num_microbatches):
        simulate(PipelinePlan(num_stages, number, num_chunks))


def test_messages_pass_in_many_plans() -> None:
    check_all(range(1, 7), range(1, 15))
    check_all(range(7, 17), (1, 6, 16, 17, 33))
    simulate(PipelinePlan(16, 64, 4))


@pytest.mark.slow
def test_messages_pass_in_every_plan() -> None:
    check_all(range(1, 17), range(1, 65))


@pytest.mark.parametrize("has_backward", [False, True])
def test_messages_pass_with_few_open_sends(has_backward: bool) -> None:
    """One open send a channel is enough if the stages divide the micro batches, as many as there
    are stages always."""
    for num_stages, num_chunks, number in product(range(2, 7), (1, 2, 3), range(1, 16)):
        even = num_chunks == 1 or number % num_stages == 0
        plan = PipelinePlan(num_stages, number, num_chunks, has_backward=has_backward)
        limited = simulate(plan, open_sends=1 if even else num_stages)
        assert limited.duration == pytest.approx(simulate(plan).duration)


def test_one_open_send_is_not_enough_if_a_group_is_larger() -> None:
    with pytest.raises(AssertionError, match="stage 0 waits for the send to stage"):
        simulate(PipelinePlan(4, 15, 2), open_sends=1)


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8, 9])
@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_one_group_for_both_directions_is_found(num_stages: int, number: int) -> None:
    with pytest.raises(AssertionError, match="stage 0 waits for the receive from stage 1"):
        simulate(PipelinePlan(num_stages, number), group_of=lambda channel: 0)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 7])
def test_the_wrap_in_the_neighbours_group_is_found(num_stages: int) -> None:
    plan = PipelinePlan(num_stages, 2 * num_stages, 2)
    with pytest.raises(AssertionError, match="stage 0 waits for the receive from stage"):
        simulate(plan, group_of=lambda channel: channel.kind)


@pytest.mark.parametrize("num_stages", [2, 3, 4, 7])
def test_a_group_for_each_direction_suffices_without_a_wrap(num_stages: int) -> None:
    for number in range(1, 18):
        plan = PipelinePlan(num_stages, number)
        shared = simulate(plan, group_of=lambda channel: channel.kind)
        assert shared.passes == simulate(plan).passes


def test_the_wait_says_what_is_in_front() -> None:
    text = (
        "messages do not pass: "
        "stage 0 waits for the receive from stage 1 for the backward of micro batch 0 in chunk 0; "
        "stage 1 waits for the receive from stage 0 for the forward of micro batch 0 in chunk 1"
    )
    with pytest.raises(AssertionError) as caught:
        simulate(PipelinePlan(2, 1), group_of=lambda channel: 0)
    assert str(caught.value) == text
    with pytest.raises(AssertionError, match=r"in chunk 4, which is behind the send to stage 1"):
        simulate(PipelinePlan(4, 15, 2), group_of=lambda channel: 0)


@dataclass(frozen=True)
class BrokenPlan(PipelinePlan):
    """A plan in which one stage has two of its passes in the other's place, or lacks one."""

    stage: int = 0
    places: tuple[int, int] = (0, 0)
    keeps_all: bool = True

    def actions(self, stage: int) -> tuple[Action, ...]:
        found = list(super().actions(stage))
        if stage == self.stage:
            one, two = self.places
            found[one], found[two] = found[two], found[one]
            if not self.keeps_all:
                del found[one]
        return tuple(found)


def broken_plans() -> Iterator[tuple[BrokenPlan, str]]:
    # Stage 1: F0 B0 F1 B1 ..., stage 0: F0 F1 B0 F2 B1 F3 B2 B3.
    yield BrokenPlan(2, 4, stage=1, places=(0, 2)), "both ends have messages in another order"
    yield BrokenPlan(2, 4, stage=0, places=(2, 4)), "both ends have messages in another order"
    yield BrokenPlan(2, 4, stage=0, places=(0, 2)), "stage 0 waits for the receive from stage 1"
    yield BrokenPlan(2, 4, stage=0, places=(7, 7), keeps_all=False), "stage 1 ends with the send"
    yield BrokenPlan(2, 4, stage=1, places=(7, 7), keeps_all=False), "stage 0 waits for"
    yield BrokenPlan(4, 8, 2, stage=2, places=(4, 5)), "both ends have messages in another order"
    yield BrokenPlan(4, 8, 2, stage=3, places=(0, 4)), "messages"


@pytest.mark.parametrize(("plan", "text"), [*broken_plans()])
def test_a_broken_order_is_found(plan: BrokenPlan, text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        simulate(plan)
