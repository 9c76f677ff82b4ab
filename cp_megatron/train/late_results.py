"""The results of steps that the device still computes, read late and judged in order.

    host      | launches 5   | launches 6       | launches 7       |
    device    | computes 4         | computes 5         | computes 6
    read      | 3            | 4                | 5                |     LAG = 2

A step that must not be applied changes nothing on the device (``DeviceGuard``), so it does no harm
that the host learns of it later. A run that must end has to end after the same step as before:
results are not left unread where all of them together could exceed the budget of skipped steps.
When a result is read depends on numbers that all ranks share, because what follows from it may send
messages.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cp_megatron.faults.guard import Guard, Verdict
from cp_megatron.train.step import LaunchedStep, StepResult

LAG = 2
"""How many steps the host may be ahead of the results that it has read, on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A step's result and what the guard says of it."""

    step: int
    result: StepResult
    verdict: Verdict


class Results:
    """A queue of launched steps.

    Args:
        guard: judges the results, in the order of steps.
        lag: how many steps may be unread after ``read``.
    """

    def __init__(self, guard: Guard, *, lag: int) -> None:
        self._guard, self._lag = guard, lag
        self._unread: deque[tuple[int, LaunchedStep]] = deque()

    @staticmethod
    def lag_on(device: torch.device) -> int:
        """The lag that pays: on the CPU, a step is complete when it has been launched."""
        return LAG if device.type == "cuda" else 0

    def add(self, step: int, launched: LaunchedStep) -> None:
        """Adds the step after the last one."""
        self._unread.append((step, launched))

    def read(self, *, everything: bool) -> Iterator[Judged]:
        """Yields the results to be read now, oldest first; may wait for the device.

        Args:
            everything: leave none unread.
        """
        while self._unread:
            spare = 0 if everything else min(self._lag, self._guard.spare(self._unread[-1][0]))
            if len(self._unread) <= spare:
                return
            step, launched = self._unread.popleft()
            result = launched.result()
            verdict = self._guard.judge(step, result.loss, result.grad_norm)
            assert verdict.accepted == result.accepted, "device and host decide alike"
            yield Judged(step=step, result=result, verdict=verdict)
