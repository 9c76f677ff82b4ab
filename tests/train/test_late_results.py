"""Results that are read late end a run after the same step, with the same words."""

from __future__ import annotations

from typing import Any

import pytest

from cp_megatron.train.late_results import Results
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import Place, changed
from tests.train.test_loop import place as place  # the fixture
from tests.train.test_skipping import disturbed

STEPS = 9
LONG = "--train-iters", str(STEPS), "--log-interval", "5", "--eval-iters", "0"
Answer = tuple[list[str], dict[str, Any], str]


def late(
    rank: int,
    world_size: int,
    argv: list[str],
    lag: int,
    faults: list[tuple[str, int, int]],
    stop_at: int | None,
) -> Answer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Results, "lag_on", lambda _: lag)
        return disturbed(rank, world_size, argv, faults, stop_at)


NAN = [("nan", 0, 3), ("nan", 1, 4), ("nan", 0, 7)]
CASES: dict[str, tuple[list[str], list[tuple[str, int, int]], int | None]] = {
    "enough budget": (["--skip-budget", "5"], NAN, None),
    "exact budget": (["--skip-budget", "3"], NAN, None),
    "ends at the third": (["--skip-budget", "2"], NAN, None),
    "ends at the second": (["--skip-budget", "1"], NAN, None),
    "no budget": (["--skip-budget", "0"], NAN, None),
    "first step": (["--skip-budget", "1"], [("nan", 1, 1)], None),
    "stopped": ([], NAN[:1], 6),
    "stopped in a bad step": ([], NAN, 7),
}
BY_DEFAULT = ("ends at the third", "stopped in a bad step")


@pytest.mark.parametrize(
    "case",
    [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_a_lag_changes_nothing(place: Place, case: str) -> None:
    flags, faults, stop_at = CASES[case]
    argv = ["--context-parallel-size", "2", *flags]
    plain, lagging = (
        run_ranks(late, 2, changed(place.argv(name, *argv), *LONG), lag, faults, stop_at)
        for name, lag in (("plain", 0), ("late", 3))
    )
    for (said, state, ended), (said_late, state_late, ended_late) in zip(
        plain, lagging, strict=True
    ):
        assert said_late == said
        assert state_late == state
        assert ended_late == ended.replace("/plain/", "/late/")
    one, other = place.folder / "plain", place.folder / "late"
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))
    last = sorted(one.glob("step-*"))
    assert [x.name for x in last] == [x.name for x in sorted(other.glob("step-*"))]
    assert all(not differing(x, other / x.name) for x in last)
