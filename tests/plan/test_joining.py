"""Runs of tiles: they keep the tiles and their order, and one band describes all of them."""

from __future__ import annotations

from hypothesis import given

from cp_megatron.plan import Mask, Schedule
from cp_megatron.plan.joining import join, single_runs
from cp_megatron.plan.tiling import CAUSAL, FULL, Band, Tile, own_tiles, pack
from tests.plan.cases import any_schedules, property_settings


def allowed(band: Band, rows: int, columns: int) -> list[list[bool]]:
    """The pairs of a tile under a band, one at a time."""
    left = rows if band.left is None else band.left
    right = columns if band.right is None else band.right
    return [[i - left <= j <= i + right for j in range(columns)] for i in range(rows)]


@given(any_schedules(max_cp=6))
@property_settings(150)
def test_a_run_is_its_tiles(schedule: Schedule) -> None:
    for rank in range(schedule.layout.cp_size):
        for round_ in schedule.rounds(rank):
            runs = join(round_.tiles)
            assert [tile for run in runs for tile in run.tiles] == list(round_.tiles)
            for run in runs:
                row, column = run.rows[0], run.columns[0]
                for tile in run.tiles:
                    assert (tile.q0, tile.k0, tile.first) == (row, column, run.first)
                    row, column = tile.q1, tile.k1
                    size = tile.q1 - tile.q0, tile.k1 - tile.k0
                    assert allowed(run.band, *size) == allowed(tile.band, *size)
                assert (row, column) == (run.rows[1], run.columns[1])
                squares = all(t.q1 - t.q0 == t.k1 - t.k0 for t in run.tiles)
                assert squares or run.band.is_full or len(run.tiles) == 1
            assert [run.tiles for run in single_runs(round_.tiles)] == [(t,) for t in round_.tiles]


def test_documents_of_a_shard_are_one_run() -> None:
    lengths = [1, 7, 30, 2, 1]
    for mask in (
        Mask.documents(lengths),
        Mask.documents(lengths, causal=False),
        Mask.documents(lengths, window=(4, 0)),
        Mask.documents(lengths, causal=False, window=(9, 3)),
    ):
        (run,) = join(own_tiles(mask, pack([(0, 41)])))
        assert len(run.tiles) == 5
        assert (run.rows, run.columns, run.first) == ((0, 41), (0, 41), True)


def test_what_does_not_fit_is_not_joined() -> None:
    square, after = Tile(0, 3, 0, 3, CAUSAL), Tile(3, 5, 3, 5, CAUSAL)
    assert len(join([square, after])) == 1
    for other in (
        Tile(4, 6, 3, 5, CAUSAL),  # a row in between
        Tile(3, 5, 4, 6, CAUSAL),  # a column in between
        Tile(3, 5, 3, 5, CAUSAL, first=True),
        Tile(3, 5, 3, 5, FULL),
        Tile(3, 5, 3, 6, CAUSAL),  # not square
        Tile(3, 7, 3, 7, Band(left=2, right=0)),
    ):
        runs = join([square, other])
        assert len(runs) == (1 if other.band.left == 2 else 2), other
    wide = join([Tile(0, 1, 0, 7), Tile(1, 4, 7, 9), Tile(4, 6, 9, 11, CAUSAL)])
    assert [len(run.tiles) for run in wide] == [2, 1]
