"""Tests that logits, loss and every gradient are the same on every grid and in one process."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from cp_megatron.plan import Grid
from tests.model.grids import (
    BLOCKS,
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
    """All styles; those of ``BLOCKS`` run by default on two axes at once."""
    slow = pytest.mark.slow
    return [pytest.param(x, marks=[slow] if x in BLOCKS else []) for x in STYLES]


# Heads of 12 and 6 are expanded from latents of 8 and rotary keys of 4, which is fewer bytes.
LATENT = replace(
    STYLES["llama"],
    num_query_groups=None,
    multi_latent_attention=True,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_head_dim=8,
    qk_pos_emb_head_dim=4,
    v_head_dim=6,
    qk_layernorm=True,
)
MODELS = {**STYLES, "latent": LATENT}


@functools.cache
def oracle(style: str) -> Step:
    return plain_step(run_config(MODELS[style]))


def check(style: str, grid: Grid, *, sequence_parallel: bool = False) -> None:
    config = run_config(MODELS[style], sequence_parallel=sequence_parallel)
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


@pytest.mark.slow  # all of it is in four ranks too
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tp2(style: str, sequence_parallel: bool) -> None:
    check(style, Grid(dp=1, cp=1, tp=2), sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("style", _slow_blocks())
@pytest.mark.parametrize("sequence_parallel", [False, True])
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


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_latents_that_travel(sequence_parallel: bool) -> None:
    check("latent", Grid(dp=1, cp=2, tp=2), sequence_parallel=sequence_parallel)
