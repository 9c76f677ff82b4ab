"""Finds the rank that the others wait for, and reports it with the metrics.

Each rank measures two times, neither of which needs synchronised clocks:

    wait      how long the rank waits at the first message of a step. The last rank to arrive waits
              least: its data, its host or its disk is slow.
    probe     how long its device takes for a matrix product without any message. A processor that
              is shared or throttled takes longer. The time of a step cannot show this, because
              within a step the ranks wait for one another at every exchange.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

LATE_SHARE, LATE_SECONDS = 0.1, 0.01
"""A rank is reported if it is late by more than this share of a step and these seconds."""
SLOW_FACTOR = 2.0
"""A rank is reported if its probe takes longer than the median of the others by this factor."""


class Stragglers:
    """Collects the waits of this rank and compares them with those of the others.

    Args:
        control: a group of all ranks for CPU tensors.
        device: the device to probe.
    """

    def __init__(self, control: dist.ProcessGroup, device: torch.device) -> None:
        self._control, self._device = control, device
        self._seconds, self._steps = 0.0, 0

    def waited(self, seconds: float) -> None:
        """Notes how long this rank waited for the others in a step."""
        self._seconds += seconds
        self._steps += 1

    def find(self, step_seconds: float) -> list[str]:
        """Findings about the steps since the last call, the same on every rank.

        Call it on every rank, with the mean time of these steps.
        """
        if self._control.size() == 1:
            return []
        wait = self._seconds / max(1, self._steps)
        self._seconds, self._steps = 0.0, 0
        mine = torch.tensor([wait, probe(self._device), step_seconds], dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self._control.size())]
        dist.all_gather(rows, mine, group=self._control)
        waits, probes, steps = zip(*(row.tolist() for row in rows))
        return judge(waits, probes, max(steps))


def judge(waits: Sequence[float], probes: Sequence[float], step_seconds: float) -> list[str]:
    """A line for each rank that is late or slow.

    Args:
        waits: for each rank, the seconds that it waits for the others in a step.
        probes: for each rank, the seconds that its device takes for the same work.
        step_seconds: time of a step.
    """
    findings = []
    for rank, (wait, seconds) in enumerate(zip(waits, probes)):
        others = [*range(rank), *range(rank + 1, len(waits))]
        late = median(waits[other] for other in others) - wait
        if late > max(LATE_SECONDS, LATE_SHARE * step_seconds):
            step = f"a step of {step_seconds:.2f} s"
            findings.append(f"rank {rank} is {late:.2f} s late in {step}")
        factor = seconds / median(probes[other] for other in others)
        if factor > SLOW_FACTOR:
            findings.append(f"rank {rank} computes {factor:.1f} times as long as the others")
    return findings


def probe(device: torch.device) -> float:
    """Seconds that the device takes for a few milliseconds of work; the best of several tries."""
    cuda = device.type == "cuda"
    size, products, dtype = (2048, 32, torch.bfloat16) if cuda else (256, 1, torch.float32)
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(products):
            x @ x
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best
