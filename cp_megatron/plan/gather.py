"""all_gather: every rank gives the keys that other ranks read, and receives all of them at once.

A collective needs equal parts, so shorter parts are padded to the longest. The gathered keys lie in
the order of their ranks. Each rank picks the keys that its own queries read, in order of position,
so that keys of many owners meet in few large tiles. For 4 ranks and 8 tokens, contiguous, one
causal row with a window (2, 0):

    positions   0 1   2 3   4 5   6 7
    given       0 1   2 3   4 5    -       no other rank reads 6 and 7
    rank 2 picks      2 3                  out of [0 1 | 2 3 | 4 5 | - -]

Gradients go the opposite way: each rank writes its part into a buffer of the gathered shape, and a
reduce-scatter sums them at the owners of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.readers import Readers
from cp_megatron.plan.rounds import Round
from cp_megatron.plan.tiling import Span, merge_spans, own_tiles, pack, reading, remote_tiles


@dataclass(frozen=True, kw_only=True)
class Gather:
    """One rank's part of the collective.

    Attributes:
        width: tokens that every rank gives, padding included; 0 if there is nothing to gather.
        given: where the given tokens lie in this rank's shard.
        picked: where the keys of round 1 lie in the gathered ``[ranks * width]``, in their order.
    """

    width: int
    given: tuple[Span, ...]
    picked: tuple[Span, ...]


def gathered_width(readers: Readers) -> int:
    """Tokens that every rank gives: the most that other ranks read from one rank."""
    given = np.where(readers.read.any(axis=1), readers.length, 0)
    return int(np.bincount(readers.owner, weights=given).max())


def plan_gather(readers: Readers, rank: int) -> Gather:
    """Plans the part of ``rank`` in the collective."""
    width = gathered_width(readers)
    wanted = np.asarray(readers.read.any(axis=1))
    given = np.where(wanted, readers.length, 0)
    packed = np.concatenate([[0], np.cumsum(given)])
    # Offset of a run: its owner's block, plus the runs of that owner that precede it.
    place = packed[:-1] - packed[readers.first[readers.owner]] + readers.owner * width
    mine = _picked(readers, rank)
    first, last = int(readers.first[rank]), int(readers.first[rank + 1])
    mine_given = first + np.flatnonzero(wanted[first:last])
    begin = readers.offset[mine_given]
    end = begin + readers.length[mine_given]
    return Gather(
        width=width,
        given=tuple(merge_spans(zip(begin.tolist(), end.tolist()))),
        picked=tuple(merge_spans(zip(place[mine].tolist(), (place + given)[mine].tolist()))),
    )


def plan_gather_rounds(
    mask: Mask, layout: SequenceLayout, readers: Readers, rank: int
) -> tuple[Round, ...]:
    """Round 0 computes this rank's keys, round 1 all other keys that it reads."""
    shard = pack(layout.chunks[rank])
    own = Round(owner=rank, keys=layout.chunks[rank], tiles=tuple(own_tiles(mask, shard)))
    mine = _picked(readers, rank)
    if not mine.size:
        return (own,)
    runs = merge_spans(zip(readers.start[mine].tolist(), readers.stop[mine].tolist()))
    tiles = remote_tiles(mask, reading(mask, shard), pack(runs))
    return own, Round(owner=-1, keys=tuple(runs), tiles=tuple(tiles))


def _picked(readers: Readers, rank: int) -> IntArray:
    """int64: the runs of other ranks that ``rank`` reads, by position."""
    mine = np.flatnonzero(readers.read[:, rank])
    return mine[np.argsort(readers.start[mine])]
