"""The guard's decision on the device, so that the host need not wait for a step's numbers.

``Guard`` judges the same numbers later on the host and counts; here the same float64 operations
give the same answer while the step still runs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cp_megatron.faults.guard import LEAST_SPREAD, LEAST_WINDOW, NORMAL, WINDOW, Guard


class DeviceGuard:
    """Decides whether a step may update the model; for the rule see ``Guard``.

    Args:
        guard: its threshold and the losses accepted so far are taken.
        device: where the numbers of a step are.
    """

    def __init__(self, guard: Guard, device: torch.device) -> None:
        self._threshold = guard.spike_threshold
        losses = guard.state()["losses"]
        # A ring; places that are still empty are infinite, which sorts them behind the others.
        ring = [*losses, *[math.inf] * (WINDOW - len(losses))]
        self._losses = torch.tensor(ring, dtype=torch.float64, device=device)
        self._count = torch.tensor([len(losses)], device=device)

    def accept(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether the step is applied, bool []; an accepted loss is remembered.

        Args:
            loss, grad_norm: float64 [], the same on every rank.
        """
        accepted = loss.isfinite() & grad_norm.isfinite()
        if self._threshold is None:
            return accepted
        accepted &= loss <= self._limit(self._threshold)
        place = self._count % WINDOW
        self._losses.scatter_(0, place, torch.where(accepted, loss, self._losses.gather(0, place)))
        self._count += accepted
        return accepted

    def _limit(self, threshold: float) -> Tensor:
        """The largest loss that is no spike, []."""
        middle = self._median(self._losses)
        deviation = self._median((self._losses - middle).abs())
        spread = torch.maximum(NORMAL * deviation, LEAST_SPREAD * middle.abs())
        limit = middle + threshold * spread
        return limit.masked_fill(self._count < LEAST_WINDOW, math.inf).squeeze(0)

    def _median(self, x: Tensor) -> Tensor:
        """The median of the places that are in use, [1]."""
        ordered, count = x.sort().values, self._count.clamp(1, WINDOW)
        return (ordered.gather(0, (count - 1) // 2) + ordered.gather(0, count // 2)) / 2
