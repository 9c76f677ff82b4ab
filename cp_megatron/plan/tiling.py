"""Cutting one rank's attention to one arrival of keys into tiles: the rectangles of kernel calls.

Coordinates are local: rows count in the rank's shard, columns in the keys as they arrived. Local
order follows position, so the rows of one document are one run, and so are its keys in an arrival.

*Own keys.* For one document, causal order in position is causal order in the shard, so one square
tile suffices. Zigzag on 2 ranks, rank 0 (positions 0 1 6 7), one causal document:

    q\\k  0 1 6 7
     0   x . . .      the whole shard is one causal square; the kernel skips the upper triangle
     1   x x . .
     6   x x x .
     7   x x x x

*Keys of another rank.* Chunks never overlap. A causal chunk attends all of an earlier chunk and
nothing of a later one, so each pair of chunks needs at most one full rectangle, inside the one
document that they can share. Adjacent rectangles are fused: rank 1's keys (2 3 4 5) reach the late
rows of rank 0 as one tile, and rank 0's early keys (0 1) reach all rows of rank 1 as one tile:

    q\\k  2 3 4 5          q\\k  0 1
     0   . . . .           2   x x
     1   . . . .           3   x x
     6   x x x x           4   x x
     7   x x x x           5   x x

*Windows* cut a rectangle along a diagonal band. Such tiles are trimmed until every row has a key.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from cp_megatron.plan.mask import IntArray, Mask

Span = tuple[int, int]


class LocalRun(NamedTuple):
    """A contiguous run of positions and its place in a local buffer."""

    start: int
    stop: int
    offset: int


class Reading(NamedTuple):
    """A run of queries, the keys it reads, and the documents of its first and last position."""

    queries: LocalRun
    keys: Span
    first_document: Span
    last_document: Span


@dataclass(frozen=True)
class Band:
    """Row i of a tile attends column j iff ``i - left <= j <= i + right``; None is unlimited."""

    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether every row attends every column."""
        return self.left is None and self.right is None

    @property
    def is_causal(self) -> bool:
        """Whether row i attends columns 0 .. i."""
        return self.left is None and self.right == 0

    def columns(self, q0: int, q1: int, num_columns: int) -> Span:
        """The columns that rows ``q0:q1`` of a tile attend."""
        k0 = 0 if self.left is None else max(0, q0 - self.left)
        return k0, num_columns if self.right is None else min(num_columns, q1 + self.right)

    def within(self, q0: int, q1: int, k0: int, k1: int) -> Band:
        """The band of a part of a tile, without the bounds that exclude nothing there."""
        shift = q0 - k0
        left = None if self.left is None else self.left - shift
        right = None if self.right is None else self.right + shift
        return Band(
            None if left is None or left >= q1 - q0 - 1 else left,
            None if right is None or right >= k1 - k0 - 1 else right,
        )


FULL = Band()
CAUSAL = Band(right=0)


@dataclass(frozen=True)
class Tile:
    """Rows ``q0:q1`` of the shard against columns ``k0:k1`` of the arrival.

    ``first``: no earlier tile of this rank covers these rows, so the result is stored, not merged.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    band: Band = FULL
    first: bool = False

    @property
    def kind(self) -> Literal["full", "causal", "window"]:
        """``causal`` tiles are square; other bands are ``window``."""
        if self.band.is_full:
            return "full"
        square = self.q1 - self.q0 == self.k1 - self.k0
        return "causal" if self.band.is_causal and square else "window"

    @property
    def pairs(self) -> int:
        """The number of attended pairs."""
        rows, columns = self.q1 - self.q0, self.k1 - self.k0
        if self.kind == "full":
            return rows * columns
        if self.kind == "causal":
            return rows * (rows + 1) // 2
        row = np.arange(rows, dtype=np.int64)
        first, end = np.zeros_like(row), np.full_like(row, columns)
        if self.band.left is not None:
            first = np.maximum(first, row - self.band.left)
        if self.band.right is not None:
            end = np.minimum(end, row + self.band.right + 1)
        return int(np.maximum(end - first, 0).sum())


def own_tiles(mask: Mask, shard: list[LocalRun]) -> list[Tile]:
    """Cuts the attention of a shard to its own keys; the tiles give every row its first keys."""
    if mask.has_window:
        tiles = [
            tile
            for document in _documents_in(mask, shard)
            for q in document
            for k in sorted(document, key=lambda run: run != q)
            if (tile := _band_tile(q, k, mask)) is not None
        ]
        # Every row attends itself, so a run with itself covers all its rows. Those tiles are first.
        diagonal = [replace(tile, first=True) for tile in tiles if tile.q0 == tile.k0]
        return diagonal + [tile for tile in tiles if tile.q0 != tile.k0]
    band = CAUSAL if mask.is_causal else FULL
    tiles = []
    for document in _documents_in(mask, shard):
        start = document[0].offset
        stop = document[-1].offset + document[-1].stop - document[-1].start
        tiles.append(Tile(start, stop, start, stop, band, first=True))
    return tiles


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """Joins adjacent spans; ``spans`` ascend."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def num_positions(spans: Iterable[Span]) -> int:
    """The number of positions in all ``spans`` together."""
    return sum(stop - start for start, stop in spans)


def relative_spans(spans: Sequence[Span], held: Sequence[Span]) -> list[Span]:
    """Returns the place of ``spans`` in a buffer that holds ``held`` one after the other.

    Both ascend, and each span lies inside one of ``held``.
    """
    placed: list[Span] = []
    offset = index = 0
    for start, stop in held:
        while index < len(spans) and spans[index][1] <= stop:
            a, b = spans[index]
            placed.append((offset + a - start, offset + b - start))
            index += 1
        offset += stop - start
    assert index == len(spans), "a span that is not held"
    return merge_spans(placed)


def pack(spans: Iterable[Span]) -> list[LocalRun]:
    """Places runs of positions one after the other in a buffer."""
    runs = []
    offset = 0
    for start, stop in spans:
        runs.append(LocalRun(start, stop, offset))
        offset += stop - start
    return runs


def runs_within(runs: Iterable[LocalRun], start: int, stop: int) -> Iterator[tuple[int, Span]]:
    """The runs in ``start:stop`` of a buffer: offset from ``start``, and positions."""
    for run in runs:
        low = max(start, run.offset)
        high = min(stop, run.offset + run.stop - run.start)
        if low < high:
            first = run.start + low - run.offset
            yield low - start, (first, first + high - low)


def positions_at(runs: Iterable[Span], spans: Iterable[Span]) -> list[Span]:
    """The positions that lie at ``spans`` of a buffer that holds ``runs`` one after the other."""
    packed = pack(runs)
    return merge_spans([run for a, b in spans for _, run in runs_within(packed, a, b)])


def reading(mask: Mask, shard: list[LocalRun]) -> list[Reading]:
    """Returns what each run of a shard reads, for the runs that read beyond themselves."""
    starts = np.asarray([run.start for run in shard], dtype=np.int64)
    stops = np.asarray([run.stop for run in shard], dtype=np.int64)
    low, high = key_intervals(mask, starts, stops)
    edges = mask.starts
    first = np.searchsorted(edges, starts, side="right") - 1
    last = np.searchsorted(edges, stops - 1, side="right") - 1
    columns = (low, high, edges[first], edges[first + 1], edges[last], edges[last + 1])
    return [
        Reading(run, (a, b), (c, d), (e, f))
        for run, a, b, c, d, e, f in zip(shard, *(column.tolist() for column in columns))
        if a < run.start or b > run.stop
    ]


def remote_tiles(mask: Mask, queries: list[Reading], keys: list[LocalRun]) -> list[Tile]:
    """Cuts the attention of a shard to keys of other ranks, which ascend in position."""
    if not keys:
        return []
    starts, stops = [key.start for key in keys], [key.stop for key in keys]
    tiles = []
    for q, (reach, end), first_document, last_document in queries:
        for k in keys[bisect_right(stops, reach) : bisect_left(starts, end)]:
            # Disjoint runs share at most the document of the query that is nearest to the keys.
            document = first_document if k.stop <= q.start else last_document
            q_part, k_part = _clip(q, document), _clip(k, document)
            tile = _band_tile(q_part, k_part, mask) if q_part and k_part else None
            if tile is not None:
                tiles.append(tile)
    return _fuse(tiles)


def key_intervals(mask: Mask, starts: IntArray, stops: IntArray) -> tuple[IntArray, IntArray]:
    """Returns, for each chunk of queries, the first key that it reads and the end of the run.

    The keys are one run of positions, because each row attends itself and the rows of a chunk are
    adjacent.
    """
    return mask.key_range(starts)[0], mask.key_range(stops - 1)[1]


def _documents_in(mask: Mask, shard: list[LocalRun]) -> list[list[LocalRun]]:
    """The shard's runs, cut at document borders, one list per document."""
    starts = mask.starts
    begin = np.searchsorted(starts, [run.start for run in shard], side="right") - 1
    end = np.searchsorted(starts, [run.stop - 1 for run in shard], side="right")
    documents: dict[int, list[LocalRun]] = {}
    for run, first, last in zip(shard, begin.tolist(), end.tolist()):
        edges = starts[first : last + 1].tolist()
        for index, document in enumerate(pairwise(edges), start=first):
            part = _clip(run, document)
            assert part is not None
            documents.setdefault(index, []).append(part)
    return list(documents.values())


def _clip(run: LocalRun, span: Span) -> LocalRun | None:
    start, stop = max(run.start, span[0]), min(run.stop, span[1])
    if start >= stop:
        return None
    return LocalRun(start, stop, run.offset + start - run.start)


def _band_tile(q: LocalRun, k: LocalRun, mask: Mask) -> Tile | None:
    """The part of ``q`` x ``k`` (one document) under the window, trimmed; None if it is empty."""
    left, right = mask.window
    # An unlimited bound is further away than any key.
    far = mask.seq_len
    left, right = left if left >= 0 else far, right if right >= 0 else far
    q0, q1 = max(q.start, k.start - right), min(q.stop, k.stop + left)
    k0, k1 = max(k.start, q0 - left), min(k.stop, q1 + right)
    if q0 >= q1 or k0 >= k1:
        return None
    row, column = q.offset + q0 - q.start, k.offset + k0 - k.start
    band = Band(left, right).within(q0, q1, k0, k1)
    return Tile(row, row + q1 - q0, column, column + k1 - k0, band)


def _fuse(tiles: list[Tile]) -> list[Tile]:
    """Joins full tiles that are adjacent: first along the keys, then along the queries."""
    wide = _join(
        sorted(tiles, key=lambda t: (t.q0, t.q1, t.k0)),
        lambda a, b: (a.q0, a.q1, a.k1) == (b.q0, b.q1, b.k0),
    )
    return _join(
        sorted(wide, key=lambda t: (t.k0, t.k1, t.q0)),
        lambda a, b: (a.k0, a.k1, a.q1) == (b.k0, b.k1, b.q0),
    )


def _join(tiles: Iterable[Tile], are_adjacent: Callable[[Tile, Tile], bool]) -> list[Tile]:
    joined: list[Tile] = []
    for tile in tiles:
        last = joined[-1] if joined else None
        if last and last.band.is_full and tile.band.is_full and are_adjacent(last, tile):
            joined[-1] = replace(last, q1=tile.q1, k1=tile.k1)
        else:
            joined.append(tile)
    return joined
