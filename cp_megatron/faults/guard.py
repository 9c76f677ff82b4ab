"""Whether a step may change the model: not where its numbers went bad. No torch.

Every rank asks with the same numbers and so gets the same answer. What the answer depends on, the
losses of late and the steps skipped, is plain data that a checkpoint keeps: a run that goes on
answers as if it had never stopped.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 128
"""Accepted losses that a spike is measured against."""
LEAST_WINDOW = 32
"""Fewer of them say nothing yet."""
SPAN = 1000
"""Steps in a row over which skipped ones are counted."""
_NORMAL = 1.4826  # median absolute deviation of a normal distribution -> its standard deviation
_LEAST_SPREAD = 0.01  # of the median: losses that hardly differ do not make every next one a spike


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer on a step.

    Attributes:
        found: its numbers, as a person reads them.
        accepted: it may change the model.
        num_skipped: steps skipped of the last ``SPAN``, this one included.
        finite: loss and gradient norm are finite; what is skipped nevertheless is a spike.
        over: more are skipped than may be, so that the run must end.
    """

    found: str
    accepted: bool
    num_skipped: int
    finite: bool
    over: bool


class Guard:
    """Judges one step after the other.

    Args:
        budget: steps that may be skipped of any ``SPAN`` in a row; 0 ends the run at the first.
        spike_threshold: a loss that lies more than so many standard deviations, estimated by
            the median absolute deviation, above the median of the last accepted ones is skipped
            too; None lets it pass.
        kept: what ``state`` gave before. Whatever in it is not of the right kind is left out.
    """

    def __init__(
        self, *, budget: int = 5, spike_threshold: float | None = None, kept: object = None
    ) -> None:
        self.budget, self._threshold = budget, spike_threshold
        state = kept if isinstance(kept, Mapping) else {}
        losses = _numbers(state.get("losses"), float)
        self._losses = deque([x for x in losses if math.isfinite(x)], maxlen=WINDOW)
        self._skipped = [int(x) for x in _numbers(state.get("skipped"), int) if x > 0]

    def judge(self, step: int, loss: float, grad_norm: float) -> Verdict:
        """The verdict on a step, which counts from now on.

        Args:
            step: its number, from 1.
            loss: in nats per token.
            grad_norm: before clipping.
        """
        found = f"loss {loss:.5g}, gradient norm {grad_norm:.5g}"
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        limit = self._limit()
        accepted = finite and loss <= limit
        if finite and not accepted:
            found += f" (a spike: above {limit:.5g})"
        self._skipped = [other for other in self._skipped if step - SPAN < other < step]
        if accepted:
            self._losses.append(loss)
        else:
            self._skipped.append(step)
        count = len(self._skipped)
        over = not accepted and count > self.budget
        return Verdict(found=found, accepted=accepted, num_skipped=count, finite=finite, over=over)

    def state(self) -> dict[str, Any]:
        """What ``kept`` takes: plain data, whose floats JSON gives back bit for bit."""
        return {"losses": list(self._losses), "skipped": list(self._skipped)}

    def _limit(self) -> float:
        """The largest loss that is no spike."""
        if self._threshold is None or len(self._losses) < LEAST_WINDOW:
            return math.inf
        middle = median(self._losses)
        deviation = median(abs(loss - middle) for loss in self._losses)
        spread = max(_NORMAL * deviation, _LEAST_SPREAD * abs(middle))
        return middle + self._threshold * spread


def _numbers(value: object, kind: type[int] | type[float]) -> Sequence[float]:
    """A list of numbers of this kind (a float may be written as a whole number); else nothing."""
    if not isinstance(value, list | tuple):
        return ()
    kinds = (int,) if kind is int else (int, float)
    if any(isinstance(x, bool) or not isinstance(x, kinds) for x in value):
        return ()
    return [kind(x) for x in value]
