"""Decides whether a step may update the model: not if its loss or gradient norm is bad.

Every rank calls the guard with the same numbers and therefore gets the same verdict. The verdict
depends on recent losses and skipped steps. These are plain data in the checkpoint, so that a
resumed run decides as if it had never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 128
"""Number of accepted losses that a spike is compared with."""
LEAST_WINDOW = 32
"""Nothing counts as a spike until this many losses have been accepted."""
SPAN = 1000
"""Length of the span of steps in which skipped steps are counted."""
NORMAL = 1.4826
"""The factor that turns the median absolute deviation of a normal distribution into its standard
deviation."""
LEAST_SPREAD = 0.01
"""The spread is at least this share of the median, so that after nearly equal losses the next one
does not count as a spike."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a step is applied, and why."""

    numbers: str  # the loss and the gradient norm, for messages
    accepted: bool  # the step may update the model
    num_skipped: int  # how many of the last ``SPAN`` steps were skipped, this one included
    finite: bool  # the loss and the gradient norm are finite; a finite step is skipped as a spike
    over: bool  # more steps were skipped than the budget allows, and the run must end


class Guard:
    """Judges one step after the other.

    Args:
        budget: number of steps that may be skipped in any ``SPAN`` consecutive steps; 0 ends the
            run at the first bad step.
        spike_threshold: a finite loss is skipped too if it exceeds the median of the last accepted
            losses by more than this number of standard deviations, which are estimated from the
            median absolute deviation; None disables this.
        kept: what ``state`` returned earlier. Entries of a wrong type are ignored.
    """

    def __init__(
        self, *, budget: int = 5, spike_threshold: float | None = None, kept: object = None
    ) -> None:
        self.budget, self.spike_threshold = budget, spike_threshold
        state = kept if isinstance(kept, Mapping) else {}
        losses = _numbers(state.get("losses"), float)
        self._losses = deque([x for x in losses if math.isfinite(x)], maxlen=WINDOW)
        self._skipped = [int(x) for x in _numbers(state.get("skipped"), int) if x > 0]

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """Judges a step, and takes it into account from now on.

        Args:
            step: its number, from 1.
            loss: in nats per token.
            grad_norm: before clipping.
        """
        numbers = f"loss {loss:.5g}, gradient norm {grad_norm:.5g}"
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        limit = self._limit()
        accepted = finite and loss <= limit
        if finite and not accepted:
            numbers += f" (a spike: above {limit:.5g})"
        self._skipped = [other for other in self._skipped if step - SPAN < other < step]
        if accepted:
            self._losses.append(loss)
        else:
            self._skipped.append(step)
        count = len(self._skipped)
        over = not accepted and count > self.budget
        return Verdict(
            numbers=numbers, accepted=accepted, num_skipped=count, finite=finite, over=over
        )

    def spare(self, step: int) -> int:
        """How many of the steps up to ``step`` that were not judged yet may be bad in any case."""
        return self.budget - sum(step - SPAN < other for other in self._skipped)

    def state(self) -> dict[str, Any]:
        """The value for ``kept``: plain data, whose floats survive JSON bit for bit."""
        return {"losses": list(self._losses), "skipped": list(self._skipped)}

    def _limit(self) -> float:
        if self.spike_threshold is None or len(self._losses) < LEAST_WINDOW:
            return math.inf
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        spread = max(NORMAL * deviation, LEAST_SPREAD * abs(middle))
        return middle + self.spike_threshold * spread


def _numbers(value: object, kind: type[int] | type[float]) -> Sequence[float]:
    """``value`` if it is a list of numbers of this kind (an int is also a float), else ()."""
    kinds = (int,) if kind is int else (int, float)
    numbers = value if isinstance(value, list | tuple) else ()
    if any(isinstance(x, bool) or not isinstance(x, kinds) for x in numbers):
        return ()
    return [kind(x) for x in numbers]
