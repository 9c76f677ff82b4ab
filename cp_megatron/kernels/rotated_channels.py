"""Which channels a rotation turns."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RotatedChannels:
    """Which channels of a head are rotated, and in which pairs.

    Attributes:
        start: the first rotated channel.
        interleaved: channels 2i and 2i + 1 of the rotated ones are a pair; otherwise i and i + d/2.
        inverse: rotate by the negative angles, as the gradient of a rotation is.
    """

    start: int = 0
    interleaved: bool = False
    inverse: bool = False
