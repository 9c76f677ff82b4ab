"""Ranks that the others wait for are reported, in a run within one log interval."""

from __future__ import annotations

from dataclasses import replace

import torch

from cp_megatron.faults.stragglers import Stragglers, judge, probe
from cp_megatron.plan import Grid
from tests.ranks import run_ranks
from tests.train.test_loop import Place, StoppingView, assembled, finish
from tests.train.test_loop import place as place  # the fixture
from tests.train.test_skipping import faults_of

ALIKE = [0.003] * 4


def test_the_last_to_come_waits_least() -> None:
    (finding,) = judge([0.2, 0.21, 0.0, 0.2], ALIKE, 0.5)
    assert finding == "rank 2 is 0.20 s late in a step of 0.50 s"
    assert judge([0.2, 0.21, 0.19, 0.2], ALIKE, 0.5) == []
    # A tenth of the step, and 10 ms at least.
    assert judge([0.04, 0.0], ALIKE[:2], 0.5) == []
    assert judge([0.004, 0.0], ALIKE[:2], 0.01) == []
    assert len(judge([0.06, 0.0], ALIKE[:2], 0.5)) == 1


def test_a_device_that_takes_more_than_twice_as_long() -> None:
    even = [0.1] * 4
    (finding,) = judge(even, [0.001, 0.0011, 0.001, 0.0025], 0.5)
    assert finding == "rank 3 computes 2.5 times as long as the others"
    assert judge(even, [0.001, 0.0011, 0.001, 0.0019], 0.5) == []


def test_messages_that_take_more_than_three_times_as_long() -> None:
    even, messages = [0.1] * 3, [0.01, 0.011, 0.08]
    (finding,) = judge(even, ALIKE[:3], 0.5, messages)
    assert finding == (
        "messages of rank 2 to other hosts take 7.6 times as long as those of the others"
    )
    assert judge(even, ALIKE[:3], 0.5, [0.01, 0.011, 0.03]) == []
    assert judge(even, ALIKE[:3], 0.5, [0.0] * 3) == []


def test_stages_of_a_pipeline_end_a_step_at_different_times() -> None:
    """The ranks of stage 1 arrive last by the schedule; rank 3 is late among them."""
    grid = Grid(pp=2, cp=2)
    assert judge([0.5, 0.5, 0.02, 0.02], ALIKE, 0.5, grid=grid) == []
    (finding,) = judge([0.5, 0.5, 0.22, 0.02], ALIKE, 0.5, grid=grid)
    assert finding == "rank 3 (stage 1) is 0.20 s late in a step of 0.50 s"


def test_a_probe_takes_some_time() -> None:
    assert 0 < probe(torch.device("cpu")) < 10


def train(rank: int, world_size: int, argv: list[str], slow: tuple[int, int] | None) -> list[str]:
    """The findings of a run in which a rank is late from a step on."""
    view = StoppingView()
    faults = faults_of(rank, *([("slow", *slow)] if slow else []))
    finish(replace(assembled(rank, world_size, argv), faults=faults), view)
    return [text for text in view.stragglers if "late" in text]


def test_a_slow_rank_is_named_within_one_interval(place: Place) -> None:
    flags = ["--context-parallel-size", "2"]
    findings = run_ranks(train, 2, place.argv("run", *flags), (1, 3))
    assert findings[0] == findings[1]
    assert [text.split(" is ")[0] for text in findings[0]] == ["step 3: rank 1", "step 4: rank 1"]
    assert run_ranks(train, 2, place.argv("off", *flags, "--no-log-straggler"), (1, 3)) == [[], []]


def alone(rank: int, world_size: int) -> list[str]:
    control = torch.distributed.group.WORLD
    assert control is not None
    return Stragglers(control, torch.device("cpu")).find(1.0)


def test_one_rank_alone_has_no_findings() -> None:
    assert run_ranks(alone, 1) == [[]]
