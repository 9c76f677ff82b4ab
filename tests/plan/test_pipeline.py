"""Pipeline plans: small ones literally; of all, each pass once, in an order that messages keep."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.plan.pipeline import Action, Channel, Kind, PipelineMessage, PipelinePlan
from tests.plan.cases import property_settings


def written(plan: PipelinePlan, stage: int) -> str:
    """The passes in short: F or B, the micro batch, and a letter for the chunk if there are any."""
    letters = "abcdefgh" if plan.num_chunks > 1 else " "
    return " ".join(
        f"{kind[0].upper()}{microbatch}{letters[chunk]}".strip()
        for kind, microbatch, chunk in plan.actions(stage)
    )


@pytest.mark.parametrize(
    ("plan", "stages"),
    [
        (PipelinePlan(1, 3), ["F0 B0 F1 B1 F2 B2"]),
        (PipelinePlan(2, 1), ["F0 B0", "F0 B0"]),
        (PipelinePlan(2, 4), ["F0 F1 B0 F2 B1 F3 B2 B3", "F0 B0 F1 B1 F2 B2 F3 B3"]),
        (PipelinePlan(4, 2), ["F0 F1 B0 B1", "F0 F1 B0 B1", "F0 F1 B0 B1", "F0 B0 F1 B1"]),
        (
            PipelinePlan(2, 2, 2),
            ["F0a F1a F0b F1b B0b B1b B0a B1a", "F0a F1a F0b B0b F1b B1b B0a B1a"],
        ),
        (
            PipelinePlan(2, 3, 2),
            [
                "F0a F1a F2a F0b F1b F2b B0b B1b B2b B0a B1a B2a",
                "F0a F1a F2a F0b B0b F1b B1b F2b B2b B0a B1a B2a",
            ],
        ),
        (
            PipelinePlan(2, 4, 2),
            [
                "F0a F1a F0b F1b F2a B0b F3a B1b F2b B0a F3b B1a B2b B3b B2a B3a",
                "F0a F1a F0b B0b F1b B1b F2a B0a F3a B1a F2b B2b F3b B3b B2a B3a",
            ],
        ),
        (PipelinePlan(2, 3, 1, has_backward=False), ["F0 F1 F2", "F0 F1 F2"]),
        (
            PipelinePlan(2, 4, 2, has_backward=False),
            ["F0a F1a F0b F1b F2a F3a F2b F3b", "F0a F1a F0b F1b F2a F3a F2b F3b"],
        ),
    ],
)
def test_orders_literally(plan: PipelinePlan, stages: list[str]) -> None:
    assert [written(plan, stage) for stage in range(plan.num_stages)] == stages


def test_messages_of_two_stages_literally() -> None:
    plan = PipelinePlan(2, 2, 2)
    there, back = Channel("forward", wraps=False), Channel("forward", wraps=True)
    first, second = Action("forward", 0, 0), Action("forward", 0, 1)
    places = [plan.chunk_of_model(stage, chunk) for chunk in (0, 1) for stage in (0, 1)]
    assert places == [0, 1, 2, 3]
    assert plan.received(0, first) is None
    assert plan.sent(0, first) == PipelineMessage(there, 1)
    assert plan.received(1, first) == PipelineMessage(there, 0)
    assert plan.sent(1, first) == PipelineMessage(back, 0)
    assert plan.received(0, second) == PipelineMessage(back, 1)
    assert plan.sent(1, second) is None
    last = Action("backward", 0, 1)
    there, back = Channel("backward", wraps=False), Channel("backward", wraps=True)
    assert plan.received(1, last) is None
    assert plan.sent(1, last) == PipelineMessage(there, 0)
    assert plan.sent(0, last) == PipelineMessage(back, 1)
    assert plan.received(1, Action("backward", 0, 0)) == PipelineMessage(back, 0)
    assert plan.sent(0, Action("backward", 0, 0)) is None


@st.composite
def plans(draw: st.DrawFn) -> PipelinePlan:
    return PipelinePlan(
        draw(st.integers(1, 16)),
        draw(st.integers(1, 64)),
        draw(st.integers(1, 4)),
        has_backward=draw(st.sampled_from([True, True, False])),
    )


@given(plans())
@property_settings(150)
def test_each_micro_batch_passes_each_chunk_once(plan: PipelinePlan) -> None:
    kinds: list[Kind] = ["forward", "backward"] if plan.has_backward else ["forward"]
    every = {
        Action(kind, microbatch, chunk)
        for kind in kinds
        for microbatch in range(plan.num_microbatches)
        for chunk in range(plan.num_chunks)
    }
    for stage in range(plan.num_stages):
        actions = plan.actions(stage)
        assert set(actions) == every
        assert len(actions) == len(every)
        at = {action: number for number, action in enumerate(actions)}
        for action in every:
            assert at[action._replace(kind="forward")] <= at[action]


@given(plans())
@property_settings(150)
def test_both_ends_of_a_channel_list_the_same_messages(plan: PipelinePlan) -> None:
    Content = tuple[str, int, int]
    ends: dict[bool, dict[tuple[Channel, int, int], list[Content]]]
    ends = {sends: defaultdict(list) for sends in (False, True)}
    for stage in range(plan.num_stages):
        for action in plan.actions(stage):
            kind, microbatch, chunk = action
            number = plan.chunk_of_model(stage, chunk)
            if received := plan.received(stage, action):
                channel, peer = received
                ends[False][channel, peer, stage].append((kind, microbatch, number))
            if sent := plan.sent(stage, action):
                step = 1 if kind == "forward" else -1
                ends[True][sent.channel, stage, sent.peer].append((kind, microbatch, number + step))
    assert ends[True] == ends[False]
    borders = plan.num_stages * plan.num_chunks - 1 if plan.num_stages > 1 else 0
    count = Counter(kind for contents in ends[True].values() for kind, *_ in contents)
    messages = plan.num_microbatches * borders
    both = Counter(forward=messages, backward=messages if plan.has_backward else 0)
    assert count == both


@given(plans())
@property_settings(150)
def test_passes_in_flight(plan: PipelinePlan) -> None:
    found = [plan.in_flight(stage) for stage in range(plan.num_stages)]
    most = plan.num_microbatches * plan.num_chunks
    if not plan.has_backward:
        assert not any(found)
    elif plan.num_chunks == 1:
        assert found == [
            min(plan.num_microbatches, plan.num_stages - stage) for stage in range(plan.num_stages)
        ]
    elif plan.num_microbatches % plan.num_stages == 0:
        chunks, size = plan.num_chunks - 1, plan.num_stages
        assert found == [
            min(most, 2 * (size - 1 - stage) + chunks * size + 1) for stage in range(size)
        ]
    assert all(following <= one <= most for one, following in pairwise(found))


def test_passes_in_flight_literally() -> None:
    assert [PipelinePlan(4, 8).in_flight(stage) for stage in range(4)] == [4, 3, 2, 1]
    assert [PipelinePlan(4, 8, 2).in_flight(stage) for stage in range(4)] == [11, 9, 7, 5]
    assert PipelinePlan(4, 8).bubble == pytest.approx(3 / 11)
    assert PipelinePlan(4, 8, 2).bubble == pytest.approx(3 / 19)
