"""Ranks on the grid, literally."""

from __future__ import annotations

import pickle

import pytest

from cp_megatron.plan import Coordinates, Grid
from cp_megatron.plan.grid import AXES, STAGE

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


def test_copies_are_sharded_over_their_own_ranks() -> None:
    grid = Grid(dp=4, cp=2, replicas=2)
    assert grid.shards == 4
    assert [grid.shard(rank) for rank in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [Grid(dp=2, tp=2).shard(rank) for rank in range(4)] == [0, 0, 1, 1]


def test_groups_of_experts_lie_across_the_axes() -> None:
    grid = Grid(dp=2, cp=2, tp=2, ep=4)
    assert grid.groups("ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert grid.groups("edp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert grid.expert_sizes == {"replicas": 1, "edp": 2, "ep": 4}
    copies = Grid(dp=4, cp=2, replicas=2, ep=2)
    assert copies.groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    for name in ("ep", "edp"):
        for group in copies.groups(name):
            assert [copies.index(name, rank) for rank in group] == list(range(copies.size(name)))
    assert Grid(tp=4, ep=4).groups("edp") == [[0], [1], [2], [3]]
    assert Grid(dp=4, ep=2) != Grid(dp=4)
    with pytest.raises(AssertionError, match="ep 4 on"):
        Grid(dp=4, replicas=2, ep=4)


def test_groups_without_one_axis() -> None:
    assert Grid(dp=2, cp=1, tp=4).groups("tp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Grid(dp=2, cp=1, tp=4).groups("dp_cp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert Grid(dp=2, cp=4, tp=1).groups("cp") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert Grid(dp=2, cp=4, tp=1).groups("dp_cp") == [list(range(8))]
    assert Grid().groups("tp") == [[0]]


def test_coordinates_on_the_grid() -> None:
    grid = Grid(dp=3, cp=4, tp=5)
    assert grid.world_size == 60
    assert grid.coordinates(1 + 5 * (2 + 4 * 2)).without("pp") == Coordinates(dp=2, cp=2, tp=1)
    assert grid.coordinates(4) == Coordinates(pp=0, dp=0, cp=0, tp=4)
    assert grid.coordinates(15) == Coordinates(pp=0, dp=0, cp=3, tp=0)
    assert grid.coordinates(40) == Coordinates(pp=0, dp=2, cp=0, tp=0)
    assert len({grid.coordinates(rank) for rank in range(60)}) == 60


def test_every_rank_is_in_one_group_of_every_axis() -> None:
    grid = Grid(dp=3, cp=4, tp=5)
    for axis, size in (("tp", 5), ("cp", 4), ("dp", 3), ("dp_cp", 12)):
        groups = grid.groups(axis)
        assert {len(group) for group in groups} == {size} == {grid.size(axis)}
        assert sorted(rank for group in groups for rank in group) == list(range(60))
        assert all(group[grid.index(axis, rank)] == rank for group in groups for rank in group)


def test_stages_are_runs_of_ranks() -> None:
    grid = Grid(pp=2, cp=2, tp=2)
    assert grid.sizes == {"pp": 2, "dp": 1, "cp": 2, "tp": 2}
    assert grid.groups("pp") == EIGHT["dp"]
    assert grid.groups("dp_cp") == EIGHT["cp"]
    assert grid.groups(STAGE) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert str(grid.coordinates(6)) == "pp 1  dp 0  cp 1  tp 0"
    assert (str(grid), str(Grid(cp=2))) == ("pp 2 x dp 1 x cp 2 x tp 2", "dp 1 x cp 2 x tp 1")


def test_experts_and_copies_stay_in_their_stage() -> None:
    grid = Grid(pp=2, dp=2, cp=2, ep=2)
    assert grid.groups("ep") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.groups("edp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    copies = Grid(pp=2, dp=4, replicas=2, ep=2)
    assert copies.groups("edp") == [[0], [1], [2], [3], [4], [5], [6], [7]]
    assert [copies.shard(rank) for rank in range(8)] == [0, 1, 0, 1, 0, 1, 0, 1]
    for name in ("ep", "edp"):
        for group in grid.groups(name):
            assert [grid.index(name, rank) for rank in group] == list(range(grid.size(name)))


def test_one_more_axis() -> None:
    grid = Grid(axes=(*AXES, "xp"), xp=2, cp=2, tp=2)
    assert grid.sizes == {"xp": 2, "pp": 1, "dp": 1, "cp": 2, "tp": 2}
    assert grid.groups("xp") == EIGHT["dp"]
    assert Grid(axes=(*AXES, "xp")) != Grid()


def test_a_grid_is_a_value() -> None:
    grid = Grid(dp=2, cp=2)
    assert pickle.loads(pickle.dumps(grid)) == grid == Grid(cp=2, dp=2, tp=1) != Grid(dp=2)
    assert (str(grid), repr(grid)) == ("dp 2 x cp 2 x tp 1", "Grid(pp=1, dp=2, cp=2, tp=1)")
    assert len({grid, Grid(dp=2, cp=2)}) == 1


def test_an_axis_that_is_not_there() -> None:
    with pytest.raises(TypeError, match="there is no axis xp, only pp, dp, cp, tp"):
        Grid(xp=2)
    with pytest.raises(AttributeError, match="there is no axis xp, only pp, dp, cp, tp"):
        _ = Grid().xp
