"""The polygons of tiles in the picture of the attention matrix.

A tile counts rows and columns in local buffers, which hold several runs of positions. On the matrix
it becomes one patch for each run of queries and run of keys. Rank 0 of zigzag on 2 ranks (positions
0 1 6 7) computes its own keys as one causal tile of 4 x 4, which is three patches on the matrix:

    q\\k  0 1 2 3 4 5 6 7
     0   a . . . . . . .
     1   a a . . . . . .      a, c   triangles
      ...                     b      a rectangle
     6   b b . . . . c .
     7   b b . . . . c c
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cp_megatron.plan.tiling import Band, LocalRun, Span, Tile, runs_within

Point = tuple[float, float]


@dataclass(frozen=True)
class Patch:
    """Rows ``rows`` against columns ``keys``, both positions, under a band.

    Row ``rows[0] + i`` attends column ``keys[0] + j`` iff the band allows i and j. Every row has a
    column.
    """

    rows: Span
    keys: Span
    band: Band

    @property
    def pairs(self) -> int:
        """The number of attended pairs."""
        (q0, q1), (k0, k1) = self.rows, self.keys
        return Tile(0, q1 - q0, 0, k1 - k0, self.band).pairs

    def row_range(self, row: int) -> Span:
        """The columns that row number ``row`` attends, counted from ``keys[0]``."""
        return self.band.columns(row, row + 1, self.keys[1] - self.keys[0])

    def outline(self, exact: bool) -> list[Point]:
        """Corners ``(key, row)`` in positions, where row r reaches from r to r + 1.

        Args:
            exact: follow the band cell by cell. Otherwise draw a straight line through its middle,
                which encloses the same area except at the ends of the line.
        """
        sides = self._stairs() if exact else self._lines()
        x, y = self.keys[0], self.rows[0]
        return _without_flat_corners([(x + a, y + b) for a, b in sides])

    def _stairs(self) -> list[Point]:
        ranges = [self.row_range(row) for row in range(self.rows[1] - self.rows[0])]
        down = [(float(high), row + d) for row, (_, high) in enumerate(ranges) for d in (0.0, 1.0)]
        up = [(float(low), row + d) for row, (low, _) in enumerate(ranges) for d in (0.0, 1.0)]
        return down + up[::-1]

    def _lines(self) -> list[Point]:
        width, height = (float(stop - start) for start, stop in (self.keys, self.rows))
        down, up = [(width, 0.0), (width, height)], [(0.0, 0.0), (0.0, height)]
        if self.band.right is not None:
            down = _diagonal(self.band.right + 0.5, width, height)
        if self.band.left is not None:
            up = _diagonal(-self.band.left - 0.5, width, height)
        return down + up[::-1]


def patches(tile: Tile, queries: Sequence[LocalRun], keys: Sequence[LocalRun]) -> Iterator[Patch]:
    """Splits a tile into the parts that are rectangles on the matrix, cut by its band.

    Rows of the tile count in the buffer of ``queries``, columns in that of ``keys``.
    """
    columns = list(runs_within(keys, tile.k0, tile.k1))
    for row, rows in runs_within(queries, tile.q0, tile.q1):
        for column, run in columns:
            patch = _patch(rows, run, tile.band, row - column)
            if patch is not None:
                yield patch


def _patch(rows: Span, keys: Span, band: Band, shift: int) -> Patch | None:
    """The patch of two runs; ``shift`` is the row minus the column of their first positions."""
    (q0, q1), width = rows, keys[1] - keys[0]
    # The first and the last rows may have no column here.
    first = 0 if band.right is None else max(0, -band.right - shift)
    stop = q1 - q0 if band.left is None else min(q1 - q0, width + band.left - shift)
    if first >= stop:
        return None
    part = band.within(shift + first, shift + stop, 0, width)
    return Patch((q0 + first, q0 + stop), keys, part)


def _diagonal(shift: float, width: float, height: float) -> list[Point]:
    """The line x = y + shift from y = 0 to ``height``, kept inside ``0 <= x <= width``."""
    kinks = {y for y in (-shift, width - shift) if 0.0 < y < height}
    return [(min(max(y + shift, 0.0), width), y) for y in sorted({0.0, height} | kinks)]


def _without_flat_corners(points: list[Point]) -> list[Point]:
    """The polygon without repeated corners and corners on a line between their neighbours."""
    kept: list[Point] = []
    for index, (x, y) in enumerate(points):
        (x0, y0), (x1, y1) = kept[-1] if kept else points[-1], points[(index + 1) % len(points)]
        if (x - x0) * (y1 - y0) != (x1 - x0) * (y - y0) and (x, y) != (x0, y0):
            kept.append((x, y))
    return kept
