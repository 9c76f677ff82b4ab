"""A plan is made once and used again while it is valid, and only then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.save import SaveCache, start_save
from cp_megatron.checkpoint.save_planner import plan_save
from cp_megatron.config import Config
from cp_megatron.plan import Grid
from tests.checkpoint import toy
from tests.ranks import run_ranks


def save(folder: Path, model: nn.Module, optimizer: Any, cache: SaveCache, grid: Grid) -> bool:
    """Saves; whether this rank made a plan for it."""
    before = cache.plan
    start_save(
        folder,
        step=1,
        consumed=0,
        model=model,
        optimizer=optimizer,
        config=Config(),
        grid=grid,
        data_fingerprint="",
        vocab_size=1,
        cache=cache,
    ).wait()
    return cache.plan is not before


def contents(folder: Path) -> tuple[object, ...]:
    """Everything that a checkpoint says about its tensors, and the hashes of their bits."""
    manifest = read_manifest(folder / "step-1")
    return manifest.files, manifest.tensors, manifest.optimizer_steps


def save_often(rank: int, world_size: int, folder: Path) -> list[tuple[bool, bool]]:
    """For each save: whether a plan was made, and whether a save without a cache is equal."""
    cache, results = SaveCache(), list[tuple[bool, bool]]()
    grids = [Grid(cp=2, tp=2), Grid(cp=2, tp=2), Grid(cp=4)]
    models = [
        toy.make(grids[0], updates=1),
        toy.make(grids[0], updates=0),  # the optimizer has no state yet
        toy.make(grids[1], updates=1, dtype=torch.float64),
        toy.make(grids[2], updates=1, dtype=torch.float64),
    ]
    for number in (0, 0, 1, 2, 3, 0):
        model, optimizer = models[number]
        if number != 1:
            toy.update(model, optimizer, 1)
        grid = grids[max(0, number - 1)]
        one, other = folder / f"cached-{len(results)}", folder / f"fresh-{len(results)}"
        planned = save(one, model, optimizer, cache, grid)
        save(other, model, optimizer, SaveCache(), grid)
        results.append((planned, contents(one) == contents(other)))
    return results


def test_a_plan_is_used_again_only_for_the_same_tensors(tmp_path: Path) -> None:
    planned = (True, False, True, True, True, True)
    assert run_ranks(save_often, 4, tmp_path) == [[(new, True) for new in planned]] * 4


def lose_a_plan(rank: int, world_size: int, folder: Path) -> list[bool]:
    """One rank loses its plan, so every rank makes a new one."""
    grid = Grid(cp=2, tp=2)
    model, optimizer = toy.make(grid, updates=1)
    cache = SaveCache()
    planned = [save(folder / "0", model, optimizer, cache, grid)]
    if rank == 3:
        cache.plan = None
    planned.append(save(folder / "1", model, optimizer, cache, grid))
    planned.append(save(folder / "2", model, optimizer, cache, grid))
    return planned if contents(folder / "0") == contents(folder / "1") else []


def test_if_one_rank_has_no_plan_all_ranks_make_one(tmp_path: Path) -> None:
    assert run_ranks(lose_a_plan, 4, tmp_path) == [[True, True, False]] * 4


def fail(rank: int, world_size: int) -> list[str]:
    state = {"x": torch.ones(3)}

    def refuse() -> None:
        raise OSError(f"rank {rank} has no space")

    messages = []
    for cached in (None, plan_save(state, group=None, cached=None, begin=lambda: None)):
        with pytest.raises(OSError, match="no space") as caught:
            plan_save(state, group=None, cached=cached, begin=refuse)
        messages.append(str(caught.value))
    return messages


def test_a_failure_of_the_first_rank_fails_all_ranks() -> None:
    assert run_ranks(fail, 2) == [["rank 0 has no space"] * 2] * 2
