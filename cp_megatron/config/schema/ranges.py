"""Ranges of numbers, written on the fields that they restrict: ``Annotated[int, Range(1, 8)]``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` to ``high``; an open end is excluded."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    @property
    def rule(self) -> str:
        """The range in words, e.g. ``must be at least 0 and below 1``."""
        low = f"{'above' if self.open_low else 'at least'} {_number(self.low)}"
        high = f"{'below' if self.open_high else 'at most'} {_number(self.high)}"
        return f"must be {low}" if self.high == math.inf else f"must be {low} and {high}"

    def nearest(self, value: float) -> str:
        """The end next to a value outside the range; empty if that end is excluded."""
        if value <= self.low:
            return "" if self.open_low else _number(self.low)
        return "" if self.open_high else _number(self.high)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


EVERY_NUMBER = Range()
LARGEST_SIZE = 2**31 - 1
Size = Annotated[int, Range(1, LARGEST_SIZE)]
Count = Annotated[int, Range(0, LARGEST_SIZE)]
AxisSize = Annotated[int, Range(1, 2**16)]
Samples = Annotated[int, Range(1, 2**63 - 1)]
SampleCount = Annotated[int, Range(0, 2**63 - 1)]
Epochs = Annotated[float, Range(0, 1_000_000, open_low=True)]
Positive = Annotated[float, Range(0, open_low=True)]
LossFactor = Annotated[float, Range(0, 1000)]
NonNegative = Annotated[float, Range(0)]
BelowOne = Annotated[float, Range(0, 1, open_high=True)]
