"""Patches cover the mask cell by cell, and an outline encloses as many cells as there are pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.plan import Schedule
from cp_megatron.plan.show.shapes import Patch, Point, patches
from cp_megatron.plan.tiling import CAUSAL, FULL, Band, Span, Tile, pack
from tests.plan.cases import any_schedules, property_settings
from tests.plan.simulation import band_matrix, expand


def area(points: list[Point]) -> float:
    """The area of a polygon, by the shoelace formula."""
    turns = zip(points, [*points[1:], points[0]])
    return abs(sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in turns)) / 2


def patches_of(schedule: Schedule) -> list[Patch]:
    return [
        patch
        for group, chunks in enumerate(schedule.group_layout.chunks)
        for round_ in schedule.rounds(group * schedule.all_to_all_size)
        for tile in round_.tiles
        for patch in patches(tile, pack(list(chunks)), pack(list(round_.keys)))
    ]


@given(any_schedules(max_cp=12))
@property_settings(100)
def test_patches_cover_the_mask_once(schedule: Schedule) -> None:
    count = np.zeros((schedule.mask.seq_len,) * 2, np.int64)
    for patch in patches_of(schedule):
        cells = 0
        for number, row in enumerate(range(*patch.rows)):
            low, high = patch.row_range(number)
            assert low < high, "a row without a column"
            count[row, patch.keys[0] + low : patch.keys[0] + high] += 1
            cells += high - low
        assert patch.pairs == cells
        assert area(patch.outline(exact=True)) == cells
        assert area(patch.outline(exact=False)) == pytest.approx(cells, abs=0.5)
    assert np.array_equal(count, schedule.mask.dense().astype(np.int64))


@st.composite
def buffers(draw: st.DrawFn) -> list[Span]:
    """Runs of positions that ascend; some are adjacent."""
    steps = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 6)), min_size=2, max_size=4))
    spans, at = [], 0
    for gap, length in steps:
        spans.append((at + gap, at + gap + length))
        at += gap + length
    return spans


@given(buffers(), buffers(), st.data())
@property_settings(300)
def test_any_band_over_any_runs(queries: list[Span], keys: list[Span], data: st.DataObject) -> None:
    rows, columns = expand(queries), expand(keys)
    q0, k0 = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    q1, k1 = len(rows) - data.draw(st.integers(0, 1)), len(columns) - data.draw(st.integers(0, 1))
    q1, k1 = max(q1, q0 + 1), max(k1, k0 + 1)
    bound = st.integers(-4, 8) | st.none()
    tile = Tile(q0, q1, k0, k1, Band(data.draw(bound), data.draw(bound)))
    expected = np.zeros((32, 32), np.int64)
    expected[np.ix_(rows[q0:q1], columns[k0:k1])] = band_matrix(tile.band, q1 - q0, k1 - k0)
    count = np.zeros_like(expected)
    for patch in patches(tile, pack(queries), pack(keys)):
        for number, row in enumerate(range(*patch.rows)):
            low, high = patch.row_range(number)
            count[row, patch.keys[0] + low : patch.keys[0] + high] += 1
    assert np.array_equal(count, expected)


def test_the_example_of_three_patches() -> None:
    """Positions 0 1 6 7 as one causal tile."""
    held = pack([(0, 2), (6, 8)])
    found = list(patches(Tile(0, 4, 0, 4, CAUSAL), held, held))
    assert found == [
        Patch((0, 2), (0, 2), CAUSAL),
        Patch((6, 8), (0, 2), FULL),
        Patch((6, 8), (6, 8), CAUSAL),
    ]


def test_outlines_literally() -> None:
    triangle = Patch((4, 6), (4, 6), CAUSAL)
    assert set(triangle.outline(exact=True)) == {(4, 4), (5, 4), (5, 5), (6, 5), (6, 6), (4, 6)}
    band = Patch((10, 14), (10, 14), Band(left=1, right=0))
    assert set(band.outline(exact=False)) == {
        (10, 10), (10.5, 10), (14, 13.5), (14, 14), (12.5, 14), (10, 11.5),
    }  # fmt: skip
    assert Patch((0, 2), (5, 9), FULL).outline(exact=True) == [(9, 0), (9, 2), (5, 2), (5, 0)]
