"""A plan is made once, used again where it holds, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from cp_megatron.checkpoint import planning
from cp_megatron.checkpoint.manifest import read_manifest
from cp_megatron.checkpoint.planning import plan_part
from cp_megatron.checkpoint.save import Kept, start_save
from cp_megatron.config import Config
from cp_megatron.plan import Grid
from tests.checkpoint import toy
from tests.ranks import run_ranks


def save(folder: Path, model: nn.Module, optimizer: Any, kept: Kept | None, grid: Grid) -> int:
    """Saves; how many plans this rank helped to make for it."""
    plans = mock.Mock(side_effect=planning._new_part)
    with mock.patch.object(planning, "_new_part", plans):
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
            kept=kept,
        ).wait()
    return int(plans.call_count)


def contents(folder: Path) -> tuple[object, ...]:
    """All that a checkpoint says of its tensors, and their bits."""
    manifest = read_manifest(folder / "step-1")
    return manifest.files, manifest.tensors, manifest.optimizer_steps


def save_often(rank: int, world_size: int, folder: Path) -> list[tuple[int, bool]]:
    """(plans, whether the checkpoint is the one of a save that keeps nothing) for each save."""
    kept, found = Kept(), list[tuple[int, bool]]()
    grids = [Grid(cp=2, tp=2), Grid(cp=2, tp=2), Grid(cp=4)]
    models = [
        toy.make(grids[0], updates=1),
        toy.make(grids[0], updates=0),  # no state of the optimizer yet
        toy.make(grids[1], updates=1, dtype=torch.float64),
        toy.make(grids[2], updates=1, dtype=torch.float64),
    ]
    for number in (0, 0, 1, 1, 2, 3, 3, 0):
        model, optimizer = models[number]
        if number != 1:
            toy.update(model, optimizer, 1)
        grid = grids[max(0, number - 1)]
        one, other = folder / f"kept-{len(found)}", folder / f"fresh-{len(found)}"
        plans = save(one, model, optimizer, kept, grid)
        save(other, model, optimizer, None, grid)
        found.append((plans, contents(one) == contents(other)))
    return found


def test_a_plan_is_used_again_for_the_same_tensors_only(tmp_path: Path) -> None:
    expected = [(plans, True) for plans in (1, 0, 1, 0, 1, 1, 0, 1)]
    assert run_ranks(save_often, 4, tmp_path) == [expected] * 4


def forget(rank: int, world_size: int, folder: Path) -> list[int]:
    """One rank has no plan any more: all make one."""
    grid = Grid(cp=2, tp=2)
    model, optimizer = toy.make(grid, updates=1)
    kept = Kept()
    found = [save(folder / "0", model, optimizer, kept, grid)]
    if rank == 3:
        kept.part = None
    found.append(save(folder / "1", model, optimizer, kept, grid))
    found.append(save(folder / "2", model, optimizer, kept, grid))
    return found if contents(folder / "0") == contents(folder / "1") else []


def test_one_rank_without_a_plan_has_all_make_one(tmp_path: Path) -> None:
    assert run_ranks(forget, 4, tmp_path) == [[1, 1, 0]] * 4


def fail(rank: int, world_size: int) -> list[str]:
    state = {"x": torch.ones(3)}

    def refuse() -> None:
        raise OSError(f"rank {rank} has no room")

    said = []
    for last in (None, plan_part(state, group=None, last=None, begin=lambda: None)):
        with pytest.raises(OSError, match="no room") as caught:
            plan_part(state, group=None, last=last, begin=refuse)
        said.append(str(caught.value))
    return said


def test_the_first_rank_is_refused_for_all() -> None:
    assert run_ranks(fail, 2) == [["rank 0 has no room"] * 2] * 2
