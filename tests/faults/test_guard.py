"""Which steps are skipped, and the state that a checkpoint keeps."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.faults.guard import LEAST_WINDOW, SPAN, WINDOW, Guard

LOSS = st.one_of(st.floats(0, 20), st.floats(allow_nan=True, allow_infinity=True))
LOSSES = st.lists(LOSS, max_size=300)
BUDGET = st.integers(0, 8)
THRESHOLD = st.one_of(st.none(), st.floats(0.5, 50))


def accepted(guard: Guard, losses: list[float], first: int = 1) -> list[bool]:
    return [guard.judge(first + i, loss, 1.0).accepted for i, loss in enumerate(losses)]


@given(LOSSES, BUDGET)
def test_only_finite_numbers_are_accepted_and_without_a_threshold_all_of_them(
    losses: list[float], budget: int
) -> None:
    assert accepted(Guard(budget=budget), losses) == [math.isfinite(x) for x in losses]
    guard = Guard(budget=budget)
    assert not any(
        guard.judge(1 + i, 1.0, x).accepted != math.isfinite(x) for i, x in enumerate(losses)
    )


@given(LOSSES, BUDGET, THRESHOLD, st.integers(0, 300))
def test_a_guard_with_kept_state_gives_the_same_verdicts(
    losses: list[float], budget: int, threshold: float | None, cut: int
) -> None:
    whole = Guard(budget=budget, spike_threshold=threshold)
    expected = [whole.judge(1 + i, loss, 1.0) for i, loss in enumerate(losses)]
    before = Guard(budget=budget, spike_threshold=threshold)
    found = [before.judge(1 + i, loss, 1.0) for i, loss in enumerate(losses[:cut])]
    kept = json.loads(json.dumps(before.state(), allow_nan=False))
    after = Guard(budget=budget, spike_threshold=threshold, kept=kept)
    rest = enumerate(losses[cut:], 1 + len(found))
    found += [after.judge(number, loss, 1.0) for number, loss in rest]
    assert found == expected
    assert after.state() == whole.state()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [4.0, 10.0])
def test_a_spike_lies_that_many_standard_deviations_above(seed: int, threshold: float) -> None:
    """The estimate of the standard deviation, from 128 normal losses, is good to about a third."""
    random, guard = Random(seed), Guard(spike_threshold=threshold)
    noise = [5 + max(-0.5, min(0.5, random.gauss(0, 0.25))) for _ in range(WINDOW)]
    assert accepted(guard, noise) == [True] * WINDOW
    assert not guard.judge(WINDOW + 1, 5 + 1.5 * threshold * 0.25, 1.0).accepted
    assert guard.judge(WINDOW + 2, 5 + 0.6 * threshold * 0.25, 1.0).accepted
    assert guard.judge(WINDOW + 3, 0.0, 1.0).accepted


def test_only_the_last_accepted_losses_count() -> None:
    noise = [0.1 * math.sin(17 * i) for i in range(WINDOW)]
    guard = Guard(spike_threshold=6.0)
    assert accepted(guard, [4.0] * (LEAST_WINDOW - 1) + [400.0]) == [True] * LEAST_WINDOW
    assert accepted(guard, [4 + x for x in noise], LEAST_WINDOW + 1) == [True] * WINDOW
    # Skipped losses do not raise the limit, accepted ones lower it.
    assert accepted(guard, [9.0] * WINDOW, 1000) == [False] * WINDOW
    assert accepted(guard, [2 + x for x in noise], 2000) == [True] * WINDOW
    assert accepted(guard, [4.0], 3000) == [False]


def test_ten_times_the_loss_is_a_spike_and_noise_is_none() -> None:
    guard = Guard(spike_threshold=6.0)
    noise = [2 + 0.1 * math.sin(17 * i) for i in range(WINDOW)]
    assert accepted(guard, noise) == [True] * WINDOW
    spike = guard.judge(WINDOW + 1, 20.0, 1.0)
    assert (spike.accepted, spike.finite, spike.over, spike.num_skipped) == (False, True, False, 1)
    assert "a spike: above" in spike.numbers
    assert guard.judge(WINDOW + 2, 2.1, 1.0).accepted


def test_equal_losses_still_tolerate_a_small_rise() -> None:
    guard = Guard(spike_threshold=5.0)
    assert accepted(guard, [2.0] * LEAST_WINDOW + [2.09, 2.11]) == [True] * 33 + [False]


@given(st.sets(st.integers(1, 4 * SPAN)), BUDGET)
def test_the_budget_holds_for_any_thousand_consecutive_steps(bad: set[int], budget: int) -> None:
    guard = Guard(budget=budget)
    for step in range(1, 4 * SPAN + 1):
        verdict = guard.judge(step, math.nan if step in bad else 1.0, 1.0)
        count = sum(step - SPAN < other <= step for other in bad)
        assert verdict.num_skipped == count
        assert verdict.over == (step in bad and count > budget)


@pytest.mark.parametrize(
    "kept",
    [
        *(None, 3, "x", [], {"losses": 3}, {"losses": "12", "skipped": {}}),
        *({"losses": [1.0, None]}, {"losses": [True]}, {"skipped": [1.5]}, {"skipped": ["1"]}),
        *({"losses": [math.nan, math.inf]}, {"skipped": [-3, 0]}),
    ],
)
def test_entries_of_a_wrong_type_are_ignored(kept: object) -> None:
    assert Guard(kept=kept).state() == {"losses": [], "skipped": []}


def test_a_long_list_is_cut_to_the_window() -> None:
    kept = {"losses": [*range(500)], "skipped": []}
    assert Guard(kept=kept).state()["losses"] == [float(x) for x in range(500 - WINDOW, 500)]
