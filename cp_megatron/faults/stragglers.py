"""Finds the rank that the others wait for, and reports it with the metrics.

Each rank measures three times, none of which needs synchronised clocks:

    wait      how long the rank waits at the first message of a step. The last rank to arrive waits
              least: its data, its host or its disk is slow.
    probe     how long its device takes for a matrix product without any message. A processor that
              is shared or throttled takes longer. The time of a step cannot show this, because
              within a step the ranks wait for one another at every exchange.
    message how long a message to another host takes (``host_links.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

from cp_megatron.comm.host_numbers import gather_numbers
from cp_megatron.faults.host_links import message_seconds
from cp_megatron.plan import Grid

LATE_SHARE, LATE_SECONDS = 0.1, 0.01
"""A rank is reported if it is late by more than this share of a step and these seconds."""
SLOW_FACTOR = 2.0
"""A rank is reported if its probe takes longer than the median of the others by this factor."""
SLOW_LINK_FACTOR = 3.0
"""A rank is reported if its messages to other hosts take longer than those of the others by this
factor."""


class Stragglers:
    """Collects the waits of this rank and compares them with those of the others.

    Args:
        control: a group of all ranks for CPU tensors.
        device: the device to probe.
        ranks_per_host: the ranks on each host; by default all are on one.
        grid: of the ranks; by default they are one pipeline stage.
    """

    def __init__(
        self,
        control: dist.ProcessGroup,
        device: torch.device,
        ranks_per_host: int | None = None,
        grid: Grid | None = None,
    ) -> None:
        self._grid = grid or Grid(dp=control.size())
        self._control, self._device = control, device
        self._ranks_per_host = ranks_per_host or control.size()
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
        message = message_seconds(self._control, self._ranks_per_host)
        mine = [wait, probe(self._device), step_seconds, message]
        waits, probes, steps, messages = zip(*gather_numbers(mine, self._control))
        return judge(waits, probes, max(steps), messages, grid=self._grid)


def judge(
    waits: Sequence[float],
    probes: Sequence[float],
    step_seconds: float,
    messages: Sequence[float] = (),
    *,
    grid: Grid | None = None,
) -> list[str]:
    """A line for each rank that is late or slow.

    Ranks are late beside others of their pipeline stage: stages end a step at different times.

    Args:
        waits: for each rank, the seconds that it waits for the others in a step.
        probes: for each rank, the seconds that its device takes for the same work.
        step_seconds: time of a step.
        messages: for each rank, the seconds of a message to another host; 0 if there is none.
        grid: of the ranks; by default they are one pipeline stage.
    """
    findings, grid = [], grid or Grid(dp=len(waits))
    for number, (wait, seconds) in enumerate(zip(waits, probes)):
        others = [*range(number), *range(number + 1, len(waits))]
        beside = [x for x in others if grid.index("pp", x) == grid.index("pp", number)] or others
        late = median(waits[other] for other in beside) - wait
        place = grid.place_of(number)
        rank = f"rank {number} ({place})" if place else f"rank {number}"
        if late > max(LATE_SECONDS, LATE_SHARE * step_seconds):
            step = f"a step of {step_seconds:.2f} s"
            findings.append(f"{rank} is {late:.2f} s late in {step}")
        factor = seconds / median(probes[other] for other in others)
        if factor > SLOW_FACTOR:
            findings.append(f"{rank} computes {factor:.1f} times as long as the others")
        usual = median(messages[other] for other in others) if messages else 0.0
        if usual and messages[number] > SLOW_LINK_FACTOR * usual:
            longer = f"{messages[number] / usual:.1f} times as long as those of the others"
            findings.append(f"messages of {rank} to other hosts take {longer}")
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
