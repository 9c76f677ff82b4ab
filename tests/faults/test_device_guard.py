"""The device decides as the guard on the host does, bit for bit."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch

from cp_megatron.faults.device_guard import DeviceGuard
from cp_megatron.faults.guard import WINDOW, Guard

CPU = torch.device("cpu")


def decisions(guard: DeviceGuard, numbers: list[tuple[float, float]]) -> list[bool]:
    pairs = (torch.tensor(pair, dtype=torch.float64) for pair in numbers)
    return [bool(guard.accept(loss, norm)) for loss, norm in pairs]


def numbers_of(random: Random, count: int) -> list[tuple[float, float]]:
    """Losses with noise, spikes of all sizes around the limit, and what is not finite."""
    losses = [3 + random.gauss(0, 0.1) + (random.random() < 0.2) * random.random() * 2]
    for _ in range(count - 1):
        spike = (random.random() < 0.2) * random.random() * 2
        losses.append(3 + random.gauss(0, 0.1) + spike)
    bad = (math.nan, math.inf, -math.inf)
    return [
        (random.choice(bad), 1.0)
        if random.random() < 0.05
        else (loss, random.choice(bad) if random.random() < 0.05 else 1.0)
        for loss in losses
    ]


@pytest.mark.parametrize("threshold", [None, 2.0, 6.0])
@pytest.mark.parametrize("begins", [0, 1, 40, WINDOW, WINDOW + 7])
def test_both_decide_alike_also_after_a_resume(threshold: float | None, begins: int) -> None:
    random = Random(begins)
    guard = Guard(spike_threshold=threshold)
    for step, (loss, norm) in enumerate(numbers_of(random, begins), 1):
        guard.judge(step, loss, norm)
    later = numbers_of(random, 3 * WINDOW)
    found = decisions(DeviceGuard(guard, CPU), later)
    expected = [
        guard.judge(begins + step, loss, norm).accepted
        for step, (loss, norm) in enumerate(later, 1)
    ]
    assert found == expected
    assert not all(found)
    assert any(found)
