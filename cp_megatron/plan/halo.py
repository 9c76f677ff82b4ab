"""Halos: the tokens that a short causal convolution reads from other ranks.

A convolution of width W computes a token from itself and the W - 1 tokens before it in its
document. A piece that starts in the middle of a document (``states.py``) therefore reads up to
W - 1 tokens before it, its *halo*, from the ranks that hold them. Width 4, positions 0 to 11:

    holds     rank 0 | rank 1 | rank 2
              0 .. 6 |   7    | 8 .. 11
    halo             | 4 .. 6 | 5 .. 7: 5 and 6 of rank 0, 7 of rank 1
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.states import StatePlan


@dataclass(frozen=True)
class Halo:
    """One rank's part: what it sends, and where what it receives belongs.

    Attributes:
        send: for each rank, the places of the tokens in this rank's shard that it reads, int64
            [n]; empty for this rank itself.
        num_received: for each rank, how many of its tokens this rank reads.
        received: the positions of the tokens in the order of arrival, by rank and then as the
            rank sends them.
    """

    send: tuple[IntArray, ...]
    num_received: tuple[int, ...]
    received: IntArray


def plan_halos(mask: Mask, layout: SequenceLayout, plan: StatePlan, width: int) -> tuple[Halo, ...]:
    """Plans the halos of a convolution over ``width`` tokens for all ranks.

    A token that two pieces of a rank read travels once. A token that the rank holds itself, in
    another piece, does not travel.
    """
    held = [layout.positions(rank) for rank in range(layout.cp_size)]
    owner = np.empty(mask.seq_len, dtype=np.int64)
    place = np.empty(mask.seq_len, dtype=np.int64)
    for rank, positions in enumerate(held):
        owner[positions], place[positions] = rank, np.arange(len(positions))
    wanted = []
    for rank in range(layout.cp_size):
        pieces = [plan.pieces[number] for number in plan.entering[rank]]
        runs = [halo_of(mask, piece.start, width) for piece in pieces]
        read = np.unique(np.concatenate([np.arange(*run) for run in runs] or [np.empty(0, int)]))
        read = read[owner[read] != rank]
        wanted.append(read[np.argsort(owner[read], kind="stable")])
    sizes = np.stack([np.bincount(owner[read], minlength=layout.cp_size) for read in wanted])
    return tuple(
        Halo(
            send=tuple(place[read[owner[read] == rank]] for read in wanted),
            num_received=tuple(sizes[rank].tolist()),
            received=wanted[rank],
        )
        for rank in range(layout.cp_size)
    )


def halo_of(mask: Mask, start: int, width: int) -> tuple[int, int]:
    """The positions before ``start`` that it reads, as a run; empty at a document's start."""
    document = np.searchsorted(mask.starts, start, side="right") - 1
    return max(int(mask.starts[document]), start - (width - 1)), start
