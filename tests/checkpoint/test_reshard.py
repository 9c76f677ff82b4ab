"""A checkpoint of any grid loads on any other grid with the same bits."""

from __future__ import annotations

import errno
import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint import save
from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import read_manifest, verify_files
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from tests.checkpoint import toy
from tests.ranks import run_ranks

SAVED = Grid(cp=2, tp=2)
GRIDS = [SAVED, Grid(cp=4), Grid(dp=2, tp=2), Grid(tp=4), Grid(cp=2), Grid()]


@functools.cache
def saved() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """One checkpoint of TP2 x CP2 for all tests; no test changes it."""
    holder = tempfile.TemporaryDirectory()
    folder = Path(holder.name, "run")
    run_ranks(toy.save_on_ranks, 4, SAVED, folder)
    return holder, folder / "step-3"


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_loads_on_any_grid(grid: Grid) -> None:
    expected = toy.snapshot(*toy.make(None, updates=3))
    further = toy.snapshot(*toy.make(None, updates=4))
    assert {"column.exp_avg", "column.exp_avg_sq", "column.step"} <= expected.keys()
    results = run_ranks(toy.load_on_ranks, grid.world_size, grid, saved()[1])
    for loaded, updated, manifest in results:
        same(loaded, expected)
        same(updated, further)
        assert (manifest.step, manifest.consumed, manifest.vocab_size) == (3, 24, 257)


def test_loads_in_a_process_without_ranks() -> None:
    loaded, updated, _ = toy.load_on_ranks(0, 1, None, saved()[1])
    same(loaded, toy.snapshot(*toy.make(None, updates=3)))
    same(updated, toy.snapshot(*toy.make(None, updates=4)))


@pytest.mark.parametrize("grid", [SAVED, Grid(cp=4)], ids=str)
def test_a_process_without_ranks_saves_for_any_grid(grid: Grid, tmp_path: Path) -> None:
    toy.save(tmp_path, *toy.make(None, updates=3))
    expected = toy.snapshot(*toy.make(None, updates=3))
    for loaded, _, _ in run_ranks(toy.load_on_ranks, 4, grid, tmp_path / "step-3"):
        same(loaded, expected)


def test_every_rank_writes_its_part_once() -> None:
    folder = saved()[1]
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json",
        *(f"rank-{rank:05d}.safetensors" for rank in range(4)),
    ]
    assert manifest.grid == {"pp": 1, "dp": 1, "cp": 2, "tp": 2}
    column = manifest.tensors["model.column"]
    assert [chunk.sizes for chunk in column.chunks] == [(3, 6)] * 4
    assert len({chunk.file for chunk in column.chunks}) == 4
    assert "model.tied" not in manifest.tensors
    assert "model.cache" not in manifest.tensors
    # It is stored once although two tp ranks hold it, and empty parts are not stored.
    assert len(manifest.tensors["model.one"].chunks) == 1
    assert len(manifest.tensors["model.count"].chunks) == 1


def save_twice(rank: int, world_size: int, folder: Path) -> list[str]:
    """Returns this rank's error and warnings."""
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy.save(folder, model, optimizer)
        toy.load_on_ranks(rank, world_size, Grid(cp=2), folder / "step-3")
    with pytest.raises(ConfigError) as refused:
        toy.save(folder, model, optimizer)
    return [str(refused.value), *(str(warning.message) for warning in caught)]


def test_an_existing_step_is_refused_on_every_rank_without_warnings(tmp_path: Path) -> None:
    answers = run_ranks(save_twice, 2, tmp_path)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 1, answers[0][1:]
    assert answers[0][0].startswith(f"--save {tmp_path}: step-3 exists already")
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def load_damaged(rank: int, world_size: int, folder: Path) -> str:
    model, optimizer = toy.make(Grid(cp=2))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(folder, model=model, optimizer=optimizer)
    return str(refused.value)


def test_a_file_that_one_rank_finds_damaged_is_refused_on_every_rank(tmp_path: Path) -> None:
    run_ranks(toy.save_on_ranks, 2, Grid(cp=2), tmp_path)
    shard = tmp_path / "step-3" / "rank-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    answers = run_ranks(load_damaged, 2, tmp_path / "step-3")
    assert answers[0] == answers[1]
    assert "rank-00001.safetensors is damaged" in answers[0]


def fail_on_rank_1(rank: int, world_size: int, folder: Path) -> str:
    """Rank 1's disk is full."""
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with ExitStack() as stack:
        if rank == 1:
            stack.enter_context(mock.patch.object(save, "write_image", side_effect=full))
        refused = stack.enter_context(pytest.raises(ConfigError))
        toy.save(folder, model, optimizer, step=4)
    return str(refused.value)


def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    run_ranks(toy.save_on_ranks, 2, Grid(cp=2), tmp_path)
    answers = run_ranks(fail_on_rank_1, 2, tmp_path)
    assert answers[0] == answers[1]
    assert answers[0].startswith(f"--save {tmp_path / 'step-4'}: rank 1: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def with_uneven(
    rank: int, world_size: int, job: Callable[..., Any], grid: Grid, folder: Path
) -> Any:
    """Rows that are not divisible by tp x cp: 2 1 | 2 1 and 1 0 | 1 0 on TP2 x CP2."""
    uneven = {"uneven": ((6,), toy.ROWS), "thin": ((2, 3), toy.ROWS)}
    with mock.patch.dict(toy.PARAMETERS, uneven):
        return job(rank, world_size, grid, folder)


def test_uneven_and_empty_shards(tmp_path: Path) -> None:
    expected = run_ranks(with_uneven, 4, toy.save_on_ranks, SAVED, tmp_path)[0]
    assert {"uneven", "thin"} <= expected.keys()
    for grid in (SAVED, Grid(cp=4), Grid(tp=2)):
        for loaded, _, _ in run_ranks(
            with_uneven, grid.world_size, toy.load_on_ranks, grid, tmp_path / "step-3"
        ):
            same(loaded, expected)
