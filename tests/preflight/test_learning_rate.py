"""The learning rate against values that are computed here from the formulas, and its properties."""

from __future__ import annotations

from math import cos, pi, sqrt
from typing import Any, get_args

import pytest

from cp_megatron.config import OptimizerConfig
from cp_megatron.config.schema import DecayStyle
from cp_megatron.config.schema.optimizer_config import WsdDecayStyle
from cp_megatron.preflight.learning_rate import LearningRate

LR, MIN_LR = 1.0, 0.2


def curve(
    style: DecayStyle,
    length: int = 100,
    *,
    in_rows: bool = False,
    **more: Any,
) -> LearningRate:
    config = OptimizerConfig(lr=LR, min_lr=MIN_LR, lr_decay_style=style, **more)
    return LearningRate.of(config, length=length, rows_per_step=4, in_rows=in_rows)


def rates(style: DecayStyle, steps: int, *, warmup: int = 0, end: int | None = None) -> list[float]:
    found = curve(style, steps, lr_warmup_iters=warmup, lr_decay_iters=end)
    return [found.at(step) for step in range(1, steps + 1)]


def test_the_warm_up_rises_from_its_first_step_to_the_peak() -> None:
    found = rates("cosine", 10, warmup=4)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] < LR


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_decay_ends_at_the_last_step(style: DecayStyle) -> None:
    found = rates(style, 10, warmup=2)
    assert found[-1] == pytest.approx(MIN_LR)
    assert found[1:] == sorted(found[1:], reverse=True)
    # Half of the 8 steps of decay: both styles are half way down.
    assert found[5] == pytest.approx((LR + MIN_LR) / 2)


def test_linear_and_cosine_differ_between_the_middle_and_the_ends() -> None:
    assert rates("linear", 8)[1] == pytest.approx(MIN_LR + 0.75 * (LR - MIN_LR))
    assert rates("cosine", 8)[1] == pytest.approx(MIN_LR + 0.8535533905932737 * (LR - MIN_LR))


def test_after_the_decay_the_rate_stays() -> None:
    found = rates("cosine", 10, end=4)
    assert found[2] > MIN_LR
    assert found[3:] == pytest.approx([MIN_LR] * 7)


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant", 5, warmup=2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])
    assert curve("constant", lr_decay_iters=10).at(50) == LR


WSD = {"lr_warmup_iters": 10, "lr_wsd_decay_iters": 20}
# Style, settings, and (step, rate) of a run of 100 steps of 4 rows; the peak is 1, the least 0.2.
TABLE: list[tuple[DecayStyle, dict[str, Any], dict[int, float]]] = [
    # The warm-up begins at another rate.
    (
        "linear",
        {"lr_warmup_iters": 10, "lr_warmup_init": 0.5},
        {1: 0.55, 5: 0.75, 10: 1.0, 55: 0.6, 100: 0.2},
    ),
    # A tenth of the 50 steps up to the end of the decay.
    (
        "cosine",
        {"lr_warmup_fraction": 0.1, "lr_decay_iters": 50},
        {1: 0.2, 5: 1.0, 20: 0.2 + 0.8 * (1 + cos(pi / 3)) / 2, 50: 0.2, 51: 0.2},
    ),
    # A tenth of 25 steps is 2.5 steps, as Megatron's fraction of rows.
    ("linear", {"lr_warmup_fraction": 0.1, "lr_decay_iters": 25}, {2: 0.8, 3: 0.2 + 0.8 * 44 / 45}),
    # lr x sqrt(warm-up) / sqrt(step), at least min_lr, and min_lr after the end.
    (
        "inverse-square-root",
        {"lr_warmup_iters": 4, "lr_decay_iters": 90},
        {2: 0.5, 4: 1.0, 9: 2 / 3, 16: 0.5, 64: 0.25, 90: 2 / sqrt(90), 91: 0.2},
    ),
    # The floor is reached: 0.2 = 1 / sqrt(25 rows). Without a warm-up Megatron counts rows: 4 here.
    ("inverse-square-root", {}, {1: 0.5, 4: 0.25, 6: 1 / sqrt(24), 7: 0.2, 100: 0.2}),
    ("WSD", WSD, {5: 0.5, 10: 1.0, 80: 1.0, 90: 0.2 + 0.8 * (2 * sqrt(0.5) - 1), 100: 0.2}),
    ("WSD", {**WSD, "lr_wsd_decay_style": "linear"}, {80: 1.0, 85: 0.8, 90: 0.6, 100: 0.2}),
    (
        "WSD",
        {**WSD, "lr_wsd_decay_style": "cosine"},
        {80: 1.0, 85: 0.2 + 0.8 * (1 + sqrt(0.5)) / 2, 90: 0.6, 100: 0.2},
    ),
    (
        "WSD",
        {**WSD, "lr_wsd_decay_style": "minus_sqrt", "lr_decay_iters": 60},
        {40: 1.0, 45: 0.2 + 0.8 * 0.5, 60: 0.2, 61: 0.2, 100: 0.2},
    ),
    # Rows in a run of steps: 4 of them are a step.
    (
        "linear",
        {"lr_warmup_samples": 6, "lr_decay_samples": 46},
        {1: 2 / 3, 2: 0.96, 11: 0.24, 12: 0.2},
    ),
]


@pytest.mark.parametrize(("style", "settings", "expected"), TABLE)
def test_the_rates_of_the_formulas(
    style: DecayStyle, settings: dict[str, Any], expected: dict[int, float]
) -> None:
    found = curve(style, **settings)
    assert {step: found.at(step) for step in expected} == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("style", "settings", "expected"), TABLE)
def test_a_run_of_rows_has_the_rates_of_its_steps(
    style: DecayStyle, settings: dict[str, Any], expected: dict[int, float]
) -> None:
    found = curve(style, 400, in_rows=True, **settings)
    assert {n: found.at(4 * n) for n in expected} == pytest.approx(expected, rel=1e-14)


def test_a_run_of_rows_is_counted_in_rows() -> None:
    """103 rows are 25 steps of 4, and three rows are left: the last step is not quite the end."""
    settings = {"lr_warmup_samples": 3, "lr_decay_samples": None}
    found = curve("linear", 103, in_rows=True, **settings)
    assert found.at(4) == pytest.approx(0.2 + 0.8 * (103 - 4) / 100)
    assert found.at(100) == pytest.approx(0.2 + 0.8 * 3 / 100)


@pytest.mark.parametrize("style", get_args(DecayStyle))
@pytest.mark.parametrize("wsd", get_args(WsdDecayStyle))
@pytest.mark.parametrize("warmup", [0, 1, 7, 150])
@pytest.mark.parametrize("anneal", [1, 30, 99, 120])
def test_the_rate_stays_between_its_ends_and_falls_after_the_warm_up(
    style: DecayStyle, wsd: WsdDecayStyle, warmup: int, anneal: int
) -> None:
    more = {"lr_warmup_iters": warmup, "lr_wsd_decay_style": wsd, "lr_wsd_decay_iters": anneal}
    found = curve(style, **more)
    seen = [found.at(step) for step in range(1, 131)]
    assert all(0 < rate <= LR for rate in seen)
    falling = seen[max(0, warmup - 1) :]
    assert falling == sorted(falling, reverse=True)
    assert all(rate >= MIN_LR for rate in falling)
    if style != "constant" and warmup < 100:
        assert seen[100:] == [MIN_LR] * 30
        if style != "inverse-square-root":
            assert seen[99] == pytest.approx(MIN_LR)


def test_the_rates_that_are_0_to_the_end() -> None:
    def zero(first: int, last: int, **more: Any) -> bool:
        config = OptimizerConfig(**{"lr": LR, "min_lr": 0.0, **more})
        found = LearningRate.of(config, length=last, rows_per_step=1, in_rows=False)
        answer = found.is_zero(first, last)
        assert answer == (not any(found.at(step) for step in range(first, last + 1)))
        return answer

    assert zero(1, 1)  # the decay ends where it begins
    assert not zero(1, 2)
    assert not zero(1, 1, min_lr=1e-9)
    assert not zero(1, 1, lr_decay_style="constant")
    assert not zero(1, 1, lr_warmup_iters=1)
    assert zero(50, 80, lr_decay_iters=20)
    assert zero(20, 80, lr_decay_iters=20)
    assert not zero(19, 80, lr_decay_iters=20)
