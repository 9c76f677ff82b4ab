"""Tests that logits, loss and every gradient are the same on every grid and in one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from cp_megatron.plan import Grid, Mask, Schedule, SequenceLayout
from cp_megatron.spec import local_heads
from tests.model.grids import (
    BLOCKS,
    SEQ,
    STYLES,
    VOCAB,
    Step,
    error,
    grid_step,
    plain_step,
    run_config,
    worst,
)
from tests.ranks import run_ranks

TOLERANCE = 1e-12


def _slow_blocks() -> list[Any]:
    """All styles. Those of ``BLOCKS`` are slow here: the default run has them on TP2 x CP2."""
    slow = pytest.mark.slow
    return [pytest.param(x, marks=[slow] if x in BLOCKS else []) for x in STYLES]


@functools.cache
def oracle(style: str) -> Step:
    return plain_step(run_config(STYLES[style]))


def check(style: str, grid: Grid, *, sequence_parallel: bool = False) -> None:
    config = run_config(STYLES[style], sequence_parallel=sequence_parallel)
    step = run_ranks(grid_step, grid.world_size, config, grid)[0]
    expected = oracle(style)
    assert all(torch.equal(step.parameters[name], p) for name, p in expected.parameters.items())
    assert step.logits[..., VOCAB:].eq(float("-inf")).all()
    assert error(step.logits[..., :VOCAB], expected.logits[..., :VOCAB]) < TOLERANCE
    assert step.loss == pytest.approx(expected.loss, rel=TOLERANCE)
    gap, name = worst(step.gradients, expected.gradients)
    assert gap < TOLERANCE, name


@pytest.mark.parametrize("style", STYLES)
def test_one_rank(style: str) -> None:
    check(style, Grid(dp=1, cp=1, tp=1))


@pytest.mark.slow  # the tests on four ranks cover all of it
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tp2(style: str, sequence_parallel: bool) -> None:
    check(style, Grid(dp=1, cp=1, tp=2), sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("style", _slow_blocks())
@pytest.mark.parametrize("sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tp4(style: str, sequence_parallel: bool) -> None:
    check(style, Grid(dp=1, cp=1, tp=4), sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("style", BLOCKS)
def test_tensor_and_context_parallel_blocks(style: str) -> None:
    check(style, Grid(dp=1, cp=2, tp=2), sequence_parallel=True)


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize(
    "grid",
    [
        *((1, 2, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)),
        *(pytest.param(grid, marks=pytest.mark.slow) for grid in ((2, 1, 1), (1, 4, 1))),
    ],
)
def test_fsdp(style: str, grid: tuple[int, int, int]) -> None:
    dp, cp, tp = grid
    check(style, Grid(dp=dp, cp=cp, tp=tp), sequence_parallel=tp > 1)


def test_latents_that_travel_without_sequence_parallelism() -> None:
    """The ranks of this grid send latents; ``BLOCKS`` tests them with sequence parallelism."""
    mask, model = Mask.causal(SEQ), STYLES["latent"]
    heads, kv_heads, width, v_width = local_heads(model, 2)
    schedule = Schedule.build(
        *(mask, SequenceLayout.make(mask, 2), "auto", "auto", heads, kv_heads),
        head_dim=width,
        v_head_dim=v_width,
        latent=model.latent_widths,
    )
    assert schedule.latent == (12, 4)
    check("latent", Grid(dp=1, cp=2, tp=2))
