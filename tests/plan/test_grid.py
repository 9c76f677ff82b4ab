"""Ranks on the grid, literally."""

from __future__ import annotations

import re

import pytest

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid

FOUR = {"tp": [[0, 1], [2, 3]], "cp": [[0, 2], [1, 3]], "dp": [[0], [1], [2], [3]]}
EIGHT = {
    "tp": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "cp": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "dp": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "dp_cp": [[0, 2, 4, 6], [1, 3, 5, 7]],
}


def test_groups_of_four_ranks() -> None:
    grid = Grid(cp=2, tp=2)
    assert {axis: grid.groups(axis) for axis in ("tp", "cp", "dp")} == FOUR
    assert grid.groups("dp_cp") == FOUR["cp"]


def test_groups_of_eight_ranks() -> None:
    grid = Grid(dp=2, cp=2, tp=2)
    assert {axis: grid.groups(axis) for axis in ("tp", "cp", "dp", "dp_cp")} == EIGHT


def test_groups_without_one_axis() -> None:
    assert Grid(dp=2, cp=1, tp=4).groups("tp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Grid(dp=2, cp=1, tp=4).groups("dp_cp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert Grid(dp=2, cp=4, tp=1).groups("cp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Grid(dp=2, cp=4, tp=1).groups("dp_cp") == [list(range(8))]
    assert Grid().groups("tp") == [[0]]


def test_coordinates_are_the_inverse_of_rank() -> None:
    grid = Grid(dp=3, cp=4, tp=5)
    assert grid.world_size == 60
    for rank in range(60):
        assert grid.rank(**grid.coordinates(rank)._asdict()) == rank
    assert grid.coordinates(1 + 5 * (2 + 4 * 2)) == (2, 2, 1)
    assert grid.rank(dp=0, cp=0, tp=4) == 4
    assert grid.rank(dp=0, cp=3, tp=0) == 15
    assert grid.rank(dp=2, cp=0, tp=0) == 40


def test_every_rank_is_in_one_group_of_every_axis() -> None:
    grid = Grid(dp=3, cp=4, tp=5)
    for axis, size in (("tp", 5), ("cp", 4), ("dp", 3), ("dp_cp", 12)):
        groups = grid.groups(axis)  # type: ignore[arg-type]
        assert {len(group) for group in groups} == {size}
        assert sorted(rank for group in groups for rank in group) == list(range(60))


def test_fit_gives_data_parallelism_the_rest() -> None:
    assert Grid.fit(8, cp=2, tp=2) == Grid(dp=2, cp=2, tp=2)
    assert Grid.fit(1, cp=1, tp=1) == Grid()


@pytest.mark.parametrize(
    ("world_size", "works"), [(6, "(works: 4, 8 ranks)"), (3, "(works: 4 ranks)")]
)
def test_fit_names_the_world_sizes_that_work(world_size: int, works: str) -> None:
    message = f"world size {world_size}: must be divisible by context parallel 2 x tensor parallel"
    with pytest.raises(ConfigError, match=re.escape(f"{message} 2 = 4 {works}")):
        Grid.fit(world_size, cp=2, tp=2)


@pytest.mark.parametrize(("cp", "tp"), [(0, 1), (1, 0), (-2, 1)])
def test_a_size_that_is_not_positive_is_refused(cp: int, tp: int) -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        Grid.fit(4, cp=cp, tp=tp)
