"""Counting the pairs and keys of document slices in closed form.

A slice is a run of positions ``[low, high)``, counted from the start of its document. Row p of a
document of n positions attends ``min(p, left)`` earlier keys, itself and ``min(n - 1 - p, right)``
later ones. So the pairs of rows ``[0, p)`` are two sums of the form 0 + 1 + .. that stop growing:

    left = 2, right = 0, n = 6      rows 0 .. 5 attend 1 2 3 3 3 3 keys, rows [0, 4) together 9
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.tiling import Span, merge_spans

PairsUpTo = Callable[[int, int], int]
Chunks = tuple[tuple[tuple[int, int], ...], ...]
"""The runs of positions of each rank, ascending."""


def contiguous_chunks(seq_len: int, cp_size: int) -> Chunks:
    """One chunk for each rank, in order."""
    width = seq_len // cp_size
    return tuple(((rank * width, (rank + 1) * width),) for rank in range(cp_size))


def zigzag_chunks(seq_len: int, cp_size: int) -> Chunks:
    """Two chunks for each rank: the r-th half of a shard from either end, the late one longer."""
    late = -(-seq_len // cp_size // 2)
    early = seq_len // cp_size - late
    return tuple(
        ((r * early, (r + 1) * early), (seq_len - (r + 1) * late, seq_len - r * late))
        for r in range(cp_size)
    )


class DocumentSlice(NamedTuple):
    """Positions ``[low, high)`` of ``document``, held by ``rank``."""

    rank: int
    document: int
    low: int
    high: int


class Load(NamedTuple):
    """The cost of a layout: pairs of the busiest rank, keys that all ranks receive from owners."""

    busiest: int
    keys: int


def pairs_up_to(mask: Mask) -> PairsUpTo:
    """Returns ``f(length, p)``, the attended pairs of the first ``p`` rows of a document."""
    left, right = mask.window
    if left < 0 and right == 0:
        return lambda length, p: p * (p + 1) // 2
    if right == 0:
        return lambda length, p: p + _ramp(p, left)
    return lambda length, p: p + _ramp(p, left) + _ramp(length, right) - _ramp(length - p, right)


def _ramp(n: int, limit: int) -> int:
    """The sum of ``min(i, limit)`` over i < n; a limit of -1 is unlimited."""
    grows = n if limit < 0 else min(n, limit + 1)
    return grows * (grows - 1) // 2 + (n - grows) * limit


def _ramps(n: IntArray, limit: int) -> IntArray:
    grows = n if limit < 0 else np.minimum(n, limit + 1)
    return grows * (grows - 1) // 2 + (n - grows) * limit


def measure(mask: Mask, cp_size: int, slices: IntArray) -> Load:
    """Measures a layout given as slices that hold every position once.

    Args:
        mask: which keys each query attends.
        cp_size: the number of ranks.
        slices: int64 [slices, 4], the fields of ``DocumentSlice`` as columns, in any order.
    """
    rank, document, low, high = slices[np.lexsort(slices.T[[2, 1, 0]])].T
    length = np.asarray(mask.lengths, dtype=np.int64)[document]
    left, right = mask.window
    pairs = high - low + _ramps(high, left) - _ramps(low, left)
    pairs += _ramps(length - low, right) - _ramps(length - high, right)
    total = np.zeros(cp_size, dtype=np.int64)
    np.add.at(total, rank, pairs)
    first = np.zeros_like(low) if left < 0 else np.maximum(low - left, 0)
    end = length if right < 0 else np.minimum(high + right, length)
    # The slices that a rank holds of one document ascend, and so do both ends of their keys.
    known = np.zeros_like(end)
    same = (rank[1:] == rank[:-1]) & (document[1:] == document[:-1])
    known[1:][same] = end[:-1][same]
    read = np.maximum(end - np.maximum(first, known), 0)
    return Load(int(total.max()), int(read.sum() - (high - low).sum()))


def to_slices(mask: Mask, chunks: Sequence[Sequence[tuple[int, int]]]) -> IntArray:
    """int64 [slices, 4]: the chunks of every rank, cut at document borders."""
    held = [(start, rank) for rank, mine in enumerate(chunks) for start, _ in mine]
    start, rank = np.asarray(sorted(held), dtype=np.int64).T
    border = mask.starts
    begin = np.sort(np.concatenate([start, border[:-1]]))
    begin = begin[np.append(True, begin[1:] > begin[:-1])]
    end = np.append(begin[1:], mask.seq_len)
    chunk = np.searchsorted(start, begin, side="right") - 1
    document = np.searchsorted(border, begin, side="right") - 1
    first = border[document]
    return np.stack([rank[chunk], document, begin - first, end - first], axis=1)


def to_chunks(mask: Mask, cp_size: int, slices: IntArray) -> Chunks:
    """The runs of positions of every rank, with adjacent runs joined."""
    rank, document, low, high = slices.T
    first = mask.starts[document]
    spans: list[list[Span]] = [[] for _ in range(cp_size)]
    for r, start, stop in zip(rank.tolist(), (first + low).tolist(), (first + high).tolist()):
        spans[r].append((start, stop))
    return tuple(tuple(merge_spans(sorted(mine))) for mine in spans)
