"""Readers: which ranks read which keys, as runs of positions with the same readers.

Two ranks, zigzag, one causal row of 8: rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5.

    run        0 1   2 3   4 5   6 7
    owner       0     1     1     0
    read by     1     0     0     -      ranks other than the owner

Every exchange follows from this table: which keys are sent at all, to which ranks, and how far down
a ring.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.tiling import key_intervals


@dataclass(frozen=True, eq=False)
class Readers:
    """Runs of positions, grouped by owner and in the owner's local order.

    Attributes:
        start, stop: int64 [runs], the positions.
        owner: int64 [runs], the rank that holds them.
        offset: int64 [runs], where the run starts in the owner's shard.
        first: int64 [ranks + 1], the runs of rank r are ``first[r]:first[r + 1]``.
        read: bool [runs, ranks], whether a rank other than the owner has a query that attends it.
    """

    start: IntArray
    stop: IntArray
    owner: IntArray
    offset: IntArray
    first: IntArray
    read: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, mask: Mask, layout: SequenceLayout) -> Readers:
        """Cuts the row where a chunk, or the keys that a chunk reads, begin or end."""
        size = layout.cp_size
        held = [(a, b, r) for r, chunks in enumerate(layout.chunks) for a, b in chunks]
        starts, stops, owners = np.asarray(held, dtype=np.int64).T
        offsets = np.concatenate([[0], np.cumsum(stops - starts)[:-1]])
        offsets -= owners * layout.shard_len
        order = np.argsort(starts)
        starts, stops, owners, offsets = (x[order] for x in (starts, stops, owners, offsets))
        low, high = key_intervals(mask, starts, stops)
        far = (low < starts) | (high > stops)  # the chunk reads beyond itself
        edges = np.unique(np.concatenate([starts, stops, low[far], high[far]]))
        begin, end = edges[:-1], edges[1:]
        chunk = np.searchsorted(starts, begin, side="right") - 1
        owner = owners[chunk]
        read = np.zeros((len(begin), size), dtype=np.bool_)
        lows, highs = np.searchsorted(edges, low[far]), np.searchsorted(edges, high[far])
        for a, b, reader in zip(lows.tolist(), highs.tolist(), owners[far].tolist()):
            read[a:b, reader] = True
        read[np.arange(len(begin)), owner] = False
        by_owner = np.argsort(owner, kind="stable")
        return cls(
            start=begin[by_owner],
            stop=end[by_owner],
            owner=owner[by_owner],
            offset=(offsets[chunk] + begin - starts[chunk])[by_owner],
            first=np.searchsorted(owner[by_owner], np.arange(size + 1)).astype(np.int64),
            read=read[by_owner],
        )

    @property
    def length(self) -> IntArray:
        """int64 [runs]: the number of positions of each run."""
        return self.stop - self.start

    @cached_property
    def hops(self) -> tuple[IntArray, IntArray]:
        """int64 [runs] twice: how far below the owner the nearest and the farthest reader are.

        Ranks are counted downwards and around the ring; both are 0 if no other rank reads the run.
        """
        size = self.read.shape[1]
        run, reader = np.nonzero(self.read)
        hop = (self.owner[run] - reader) % size
        near, far = np.full(len(self.owner), size, np.int64), np.zeros(len(self.owner), np.int64)
        np.minimum.at(near, run, hop)
        np.maximum.at(far, run, hop)
        return np.where(far == 0, 0, near), far

    @cached_property
    def received(self) -> Mapping[str, IntArray]:
        """The key positions that each rank receives by each route, forwarded included, [ranks]."""
        size = self.read.shape[1]
        hop = (self.owner[:, None] - np.arange(size)) % size
        passed = (hop > 0) & (hop <= self.hops[1][:, None])
        return {"ring": self.length @ passed, "direct": self.length @ self.read}

    def tokens_received(self, route: str) -> int:
        """Key positions that all ranks together receive over ``ring`` or ``direct``."""
        times = self.hops[1] if route == "ring" else self.read.sum(axis=1)
        return int((times * self.length).sum())
