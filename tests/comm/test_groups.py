"""The real process groups of 1, 4 and 8 ranks, literally."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.plan import Coordinates, Grid
from tests.ranks import run_ranks

AXES = ("tp", "cp", "dp", "dp_cp")
Found = tuple[Coordinates, dict[str, list[int]], dict[str, int]]


def groups_of(rank: int, world_size: int, grid: Grid) -> Found:
    """This rank's coordinates, the ranks of its groups, and its place in each."""
    groups = ParallelGroups.create(grid, "cpu")
    by_axis = {axis: groups[axis] for axis in AXES}
    assert groups.grid == grid
    assert all(getattr(groups, axis) is group for axis, group in by_axis.items())
    assert dist.get_process_group_ranks(groups.world) == list(range(world_size))
    assert {mesh.ndim for mesh in groups.meshes.values()} == {1}
    ranks = {axis: dist.get_process_group_ranks(group) for axis, group in by_axis.items()}
    return groups.coordinates, ranks, {axis: dist.get_rank(g) for axis, g in by_axis.items()}


def by_group(found: list[Found], axis: str) -> list[list[int]]:
    """The distinct groups along an axis; every rank is in the one it names."""
    groups = []
    for rank, (_, ranks, place) in enumerate(found):
        assert ranks[axis][place[axis]] == rank
        if ranks[axis] not in groups:
            groups.append(ranks[axis])
    return groups


def test_four_ranks() -> None:
    found = run_ranks(groups_of, 4, Grid(cp=2, tp=2))
    assert by_group(found, "tp") == [[0, 1], [2, 3]]
    assert by_group(found, "cp") == [[0, 2], [1, 3]]
    assert by_group(found, "dp") == [[0], [1], [2], [3]]
    assert by_group(found, "dp_cp") == [[0, 2], [1, 3]]
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [place for place, _, _ in found] == [
        Coordinates(pp=0, dp=0, cp=c, tp=t) for c, t in places
    ]


@pytest.mark.parametrize("grid", [Grid(dp=4), Grid(cp=4), Grid(tp=4), Grid(dp=2, tp=2)])
def test_the_groups_are_the_grids(grid: Grid) -> None:
    found = run_ranks(groups_of, 4, grid)
    for axis in AXES:
        assert by_group(found, axis) == grid.groups(axis)
    assert [place for place, _, _ in found] == [grid.coordinates(rank) for rank in range(4)]


def test_eight_ranks() -> None:
    found = run_ranks(groups_of, 8, Grid(dp=2, cp=2, tp=2))
    assert by_group(found, "tp") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert by_group(found, "cp") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert by_group(found, "dp") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert by_group(found, "dp_cp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found[6][0] == Coordinates(pp=0, dp=1, cp=1, tp=0)


def test_one_rank_has_groups_too() -> None:
    ((place, ranks, _),) = run_ranks(groups_of, 1, Grid())
    assert place == Coordinates(pp=0, dp=0, cp=0, tp=0)
    assert ranks == {axis: [0] for axis in AXES}


def groups_of_experts(rank: int, world_size: int, grid: Grid) -> tuple[list[list[int]], list[int]]:
    """The ranks of this rank's groups of experts, and the shape of the mesh they are sharded on."""
    groups = ParallelGroups.create(grid, "cpu", has_experts=True)
    assert groups.expert_sharding is not None
    names = ("ep", "edp", "cp_tp")
    found = [dist.get_process_group_ranks(groups[name]) for name in names]
    return found, list(groups.expert_sharding.shape)


@pytest.mark.parametrize("grid", [Grid(tp=2, cp=2, ep=2), Grid(dp=4, ep=2, replicas=2)])
def test_groups_of_experts_are_the_grids(grid: Grid) -> None:
    for rank, (found, shape) in enumerate(run_ranks(groups_of_experts, 4, grid)):
        for name, ranks in zip(("ep", "edp", "cp_tp"), found, strict=True):
            assert ranks in grid.groups(name)
            assert rank in ranks
        assert shape == ([2, 1] if grid.replicas > 1 else [2])


def unsent(rank: int, world_size: int) -> list[float]:
    """How many seconds this rank waits, in several of its groups, for what no rank sends."""
    groups = ParallelGroups.create(Grid(dp=2, tp=2, replicas=2), "cpu", timedelta(seconds=1))
    found = []
    for group in (groups.tp, groups["dp_cp"], groups.sharding.get_group("replicas")):
        work = dist.irecv(torch.empty(1), group=group, group_src=1 - group.rank())
        assert work is not None
        begin = time.monotonic()
        with pytest.raises(RuntimeError):
            work.wait()
        found.append(time.monotonic() - begin)
    return found


def test_messages_from_rank_to_rank_have_the_timeout() -> None:
    assert all(0.5 < seconds < 5 for found in run_ranks(unsent, 4) for seconds in found)
