"""Boxes of a tensor: whether they lie inside it, and whether two of them meet. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class Box(Protocol):
    """A part of a tensor, by its corner and its sizes."""

    @property
    def offsets(self) -> tuple[int, ...]:
        """Of the corner, one per dim."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """One per dim."""


def inside(chunk: Box, shape: tuple[int, ...]) -> bool:
    return len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
        offset + size <= length for offset, size, length in zip(chunk.offsets, chunk.sizes, shape)
    )


def overlap(chunks: Sequence[Box]) -> bool:
    """Whether two boxes share an element: a sweep along the dim with the most cuts."""
    boxes = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    dims = range(len(boxes[0].sizes) if boxes else 0)
    dim = max(dims, key=lambda d: len({box.offsets[d] for box in boxes}), default=None)
    if dim is None:
        return len(boxes) > 1
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        begin = box.offsets[dim]
        open_boxes = [
            other for other in open_boxes if other.offsets[dim] + other.sizes[dim] > begin
        ]
        if any(_meet(box, other) for other in open_boxes):
            return True
        open_boxes.append(box)
    return False


def _meet(one: Box, other: Box) -> bool:
    return all(
        max(a, b) < min(a + length, b + width)
        for a, length, b, width in zip(one.offsets, one.sizes, other.offsets, other.sizes)
    )
