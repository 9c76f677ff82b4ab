"""Joining tiles that a kernel can compute in one call, because they lie next to one another.

The documents of a shard are squares along the diagonal of its own keys. Kernels for sequences of
several lengths take them together, given where each begins:

    x . . . . .
    . x . . . .        rows and columns 0:1, 1:4 and 4:6, causal in each
    . x x . . .
    . x x x . .
    . . . . x .
    . . . . x x

A run of tiles costs as many launches as one tile. Keys of other ranks meet a shard in few
rectangles, which rarely touch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cp_megatron.plan.tiling import Band, Span, Tile


@dataclass(frozen=True)
class TileRun:
    """Tiles along a diagonal: each begins at the row and the column where the one before ends.

    Several tiles are either all full, or all squares of one ``band``, some of whose bounds may
    exclude nothing in the smaller squares.
    """

    tiles: tuple[Tile, ...]
    band: Band

    @property
    def first(self) -> bool:
        """``Tile.first``, which all tiles of a run share."""
        return self.tiles[0].first

    @property
    def rows(self) -> Span:
        """All rows of the run."""
        return self.tiles[0].q0, self.tiles[-1].q1

    @property
    def columns(self) -> Span:
        """All columns of the run."""
        return self.tiles[0].k0, self.tiles[-1].k1


def single_runs(tiles: Iterable[Tile]) -> tuple[TileRun, ...]:
    """Makes each tile a run of its own."""
    return tuple(TileRun((tile,), tile.band) for tile in tiles)


def join(tiles: Iterable[Tile]) -> tuple[TileRun, ...]:
    """Joins tiles that follow one another, in their order, where they can form a run."""
    runs: list[list[Tile]] = []
    longest: list[Tile] = []
    for tile in tiles:
        if runs and _fits(runs[-1][-1], longest[-1], tile):
            runs[-1].append(tile)
            longest[-1] = max(longest[-1], tile, key=_num_rows)
        else:
            runs.append([tile])
            longest.append(tile)
    return tuple(TileRun(tuple(run), tile.band) for run, tile in zip(runs, longest))


def _num_rows(tile: Tile) -> int:
    return tile.q1 - tile.q0


def _fits(last: Tile, longest: Tile, tile: Tile) -> bool:
    """Whether ``tile`` continues a run that ends in ``last`` and whose longest is ``longest``."""
    if (last.q1, last.k1, last.first) != (tile.q0, tile.k0, tile.first):
        return False
    if longest.band.is_full and tile.band.is_full:
        return True
    shorter = min(_num_rows(longest), _num_rows(tile))
    bands = {x.band.within(0, shorter, 0, shorter) for x in (longest, tile)}
    return _is_square(last) and _is_square(longest) and _is_square(tile) and len(bands) == 1


def _is_square(tile: Tile) -> bool:
    return tile.q1 - tile.q0 == tile.k1 - tile.k0
