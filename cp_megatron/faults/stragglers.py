"""Which rank the others wait for, told with the metrics.

Two measures of each rank, of which neither needs clocks that agree:

    waits     how long it waits where all ranks first meet in a step: the last to come waits least.
              Its data, its host or its disk is slow.
    probe     how long its device takes for a product of matrices that no other rank takes part in.
              A processor that is shared or throttled. Inside a step the ranks wait for one another
              at every exchange, so that the time of a step says nothing of one of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.distributed as dist

LATE_SHARE, LATE_SECONDS = 0.1, 0.01
"""Of a step, and at least, that a rank must come late to be named."""
SLOW_FACTOR = 2.0
"""Times as long as the others' median that a rank's device must take to be named."""
_PROBES = 5


class Stragglers:
    """Gathers one rank's waits and asks the others.

    Args:
        control: a group of all ranks for CPU tensors.
        device: of this rank.
    """

    def __init__(self, control: dist.ProcessGroup, device: torch.device) -> None:
        self._control, self._device = control, device
        self._seconds, self._steps = 0.0, 0

    def waited(self, seconds: float) -> None:
        """Notes how long this rank waited for the others in a step."""
        self._seconds += seconds
        self._steps += 1

    def find(self, step_seconds: float) -> list[str]:
        """What to tell of the steps since the last time; called on every rank, alike on all.

        Args:
            step_seconds: of a step, on average.
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
    """The ranks to name.

    Args:
        waits: per rank, seconds that it waits for the others in a step.
        probes: per rank, seconds that its device takes for the same work.
        step_seconds: of a step.
    """
    found = []
    for rank, (wait, seconds) in enumerate(zip(waits, probes)):
        late = _median_of_others(waits, rank) - wait
        if late > max(LATE_SECONDS, LATE_SHARE * step_seconds):
            found.append(f"rank {rank} comes {late:.2f} s late to a step of {step_seconds:.2f} s")
        factor = seconds / _median_of_others(probes, rank)
        if factor > SLOW_FACTOR:
            found.append(f"rank {rank} computes {factor:.1f} times as long as the others")
    return found


def probe(device: torch.device) -> float:
    """Seconds this rank's device takes for a few milliseconds' work, undisturbed at best."""
    cuda = device.type == "cuda"
    size, products, dtype = (2048, 32, torch.bfloat16) if cuda else (256, 1, torch.float32)
    x = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(_PROBES):
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(products):
            x @ x
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def _median_of_others(values: Sequence[float], rank: int) -> float:
    return median([*values[:rank], *values[rank + 1 :]])
