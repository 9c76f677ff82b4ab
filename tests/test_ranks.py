"""Tests the pool of ranks: order, failures, hangs, dead processes, world sizes, leftover state."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.ranks import RanksFailed, _session_pool, run_ranks


def sum_of_ranks(rank: int, world_size: int) -> tuple[int, int, float]:
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    assert dist.get_world_size() == world_size
    return rank, world_size, total.item()


def echo(
    rank: int, world_size: int, array: np.ndarray, tensor: torch.Tensor
) -> tuple[np.ndarray, torch.Tensor]:
    return array + rank, tensor * rank


def fail_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        raise ZeroDivisionError(f"the root cause on {bad}")
    dist.barrier()


def hang_on(rank: int, world_size: int, bad: int) -> None:
    if rank == bad:
        time.sleep(600)


def die_on(rank: int, world_size: int, bad: int) -> None:
    print("last words")
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def mesh_sum(rank: int, world_size: int) -> float:
    """Uses subgroups and DTensor, which both leave state behind."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    tensor = distribute_tensor(torch.arange(8.0), mesh["b"], [Shard(0)])
    total = (tensor * 2).sum()
    assert isinstance(total, DTensor)
    return float(total.full_tensor())


def dirty(rank: int, world_size: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    dist.new_group(list(range(world_size)))
    torch.rand(rank + 1)


def state(rank: int, world_size: int) -> tuple[str, int, int, float]:
    groups = len(dist.distributed_c10d._world.pg_map)
    return str(torch.get_default_dtype()), torch.get_num_threads(), groups, float(torch.rand(()))


def unpicklable(rank: int, world_size: int) -> object:
    return lambda: rank


def pid(rank: int, world_size: int) -> int:
    return os.getpid()


def test_results_come_in_rank_order() -> None:
    assert run_ranks(sum_of_ranks, 2) == [(0, 2, 1.0), (1, 2, 1.0)]


def test_arrays_and_tensors_travel_both_ways() -> None:
    results = run_ranks(echo, 2, np.arange(3), torch.ones(2))
    np.testing.assert_array_equal(results[1][0], [1, 2, 3])
    assert torch.equal(results[1][1], torch.ones(2))


@pytest.mark.parametrize(
    "sizes", [(1, 2, 4, 2), pytest.param((1, 8, 2), marks=pytest.mark.slow)], ids=str
)
def test_worlds_of_changing_size(sizes: tuple[int, ...]) -> None:
    for world_size in sizes:
        expected = sum(range(world_size))
        results = run_ranks(sum_of_ranks, world_size)
        assert results == [(rank, world_size, expected) for rank in range(world_size)]


def test_a_pool_is_kept_between_jobs() -> None:
    assert run_ranks(pid, 2) == run_ranks(pid, 2)


def test_meshes_and_dtensors_are_fresh_in_every_job() -> None:
    for _ in range(3):
        assert run_ranks(mesh_sum, 4) == [56.0] * 4


def test_a_job_leaves_no_state_behind() -> None:
    run_ranks(dirty, 2)
    first, second = run_ranks(state, 2)
    assert first == second
    assert first[:3] == ("torch.float32", 1, 1)


def test_an_exception_names_its_rank_and_line_and_the_next_job_works() -> None:
    with pytest.raises(RanksFailed, match="ZeroDivisionError: the root cause on 1") as caught:
        run_ranks(fail_on, 2, 1)
    assert caught.value.failures[0].rank == 1
    assert "in fail_on" in str(caught.value)
    assert run_ranks(sum_of_ranks, 2)[1] == (1, 2, 1.0)


def test_a_hung_rank_is_found_and_the_next_job_works() -> None:
    run_ranks(pid, 2)
    start = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1 hung") as caught:
        run_ranks(hang_on, 2, 1, timeout=1)
    assert time.monotonic() - start < 5
    assert [failure.rank for failure in caught.value.failures] == [1]
    assert "in hang_on" in str(caught.value)
    assert run_ranks(sum_of_ranks, 2)[1] == (1, 2, 1.0)


def test_a_dead_process_is_the_root_cause_not_its_peers() -> None:
    with pytest.raises(RanksFailed, match="SIGKILL") as caught:
        run_ranks(die_on, 3, 2)
    root, *others = caught.value.failures
    assert (root.rank, root.kind) == (2, "died")
    assert others
    assert "last words" in root.log
    assert all(other.secondary for other in others)


def test_a_result_that_cannot_be_pickled_is_a_failure_of_its_rank() -> None:
    with pytest.raises(RanksFailed, match="pickle"):
        run_ranks(unpicklable, 1)


def test_a_function_that_cannot_be_pickled_is_refused_before_any_rank_gets_it() -> None:
    before = run_ranks(pid, 1)
    with pytest.raises((AttributeError, TypeError, ValueError)):
        run_ranks(lambda rank, world_size: None, 1)
    with pytest.raises(ValueError, match="world_size 9"):
        run_ranks(pid, 9)
    assert run_ranks(pid, 1) == before


def test_stop_leaves_no_process_and_no_file() -> None:
    pids = run_ranks(pid, 2)
    pool = _session_pool()
    folder = pool.folder
    assert folder is not None
    pool.stop()
    assert not folder.exists()
    for process in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
