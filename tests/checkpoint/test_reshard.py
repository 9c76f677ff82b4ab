"""A checkpoint of any grid, loaded on any other, is the same bits."""

from __future__ import annotations

import functools
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.manifest import read_manifest, verify_files
from cp_megatron.checkpoint.store import load_checkpoint
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from tests.checkpoint import toy
from tests.ranks import run_ranks

SAVED = Grid(cp=2, tp=2)
GRIDS = [SAVED, Grid(cp=4), Grid(dp=2, tp=2), Grid(tp=4), Grid(cp=2), Grid()]


@functools.cache
def saved() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """One checkpoint of TP2 x CP2 for all tests; nobody writes to it."""
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
    assert manifest.grid == {"dp": 1, "cp": 2, "tp": 2}
    column = manifest.tensors["model.column"]
    assert [chunk.sizes for chunk in column.chunks] == [(3, 6)] * 4
    assert len({chunk.file for chunk in column.chunks}) == 4
    assert "model.tied" not in manifest.tensors
    assert "model.cache" not in manifest.tensors
    # Stored once although two tp ranks hold it, and no rank's empty part is stored.
    assert len(manifest.tensors["model.one"].chunks) == 1
    assert len(manifest.tensors["model.count"].chunks) == 1


def save_twice(rank: int, world_size: int, folder: Path) -> list[str]:
    """The error of each rank, and what warnings there were."""
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        toy.save(folder, model, optimizer)
        toy.load_on_ranks(rank, world_size, Grid(cp=2), folder / "step-3")
    with pytest.raises(ConfigError) as refused:
        toy.save(folder, model, optimizer)
    return [str(refused.value), *(str(warning.message) for warning in caught)]


def test_an_existing_step_is_refused_on_every_rank_alike_and_nothing_warns(tmp_path: Path) -> None:
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
    model, optimizer = toy.make(Grid(cp=2), updates=1)
    if rank == 1:
        # Its shard can not be made, as on a full disk.
        shard = folder / "step-3.tmp" / "rank-00001.safetensors"
        toy.save.__globals__["save_checkpoint"].__globals__["ShardWriter"]._write = (
            lambda *_: shard.joinpath("none").write_bytes(b"")
        )
    with pytest.raises(ConfigError) as refused:
        toy.save(folder, model, optimizer)
    return str(refused.value)
