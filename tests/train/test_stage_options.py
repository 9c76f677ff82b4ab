"""Whole runs on pipeline stages, with the options of a run, equal runs on one rank in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.train.checkpoints import metrics_of
from tests.train.test_loop import train

BASE = """
    --preset toy --num-layers 4 --hidden-size 32 --seq-length 64 --dtype float64 --device cpu
    --micro-batch-size 1 --train-iters 4 --log-interval 1 --eval-iters 3
    --eval-interval 2 --lr-warmup-iters 0"""
PP2 = "--pipeline-parallel-size 2"
CHUNKS = "--num-virtual-stages-per-pipeline-rank 2"
FULL = "--recompute-granularity full"
# By the words of the grid, those of the options.
QUICK = [
    (f"{PP2} {CHUNKS}", f"{FULL} --cpu-offloading --document-mask"),
]
LONG = [
    (f"{PP2} --context-parallel-size 2", "--check-interval 2 --deterministic --log-straggler"),
    (f"{PP2} --context-parallel-size 2", "--optimizer-cpu-offload"),
    (f"{PP2} --context-parallel-size 2 --fsdp-reshard always", "--optimizer-cpu-offload"),
    (f"{PP2} {CHUNKS} --context-parallel-size 2", f"{FULL} --cpu-offloading"),
    (PP2, f"{FULL} --recompute-num-layers 3 --recompute-keeps-attention"),
    (f"{PP2} {CHUNKS}", "--recompute-granularity selective --recompute-num-layers 1"),
    (f"{PP2} --tensor-parallel-size 2 --sequence-parallel", "--mlp-tile-size 16"),
    (f"{PP2} --fsdp-reshard never", f"{FULL} --mlp-tile-size 16 --loss-chunk-size 16"),
    (f"{PP2} --fsdp-reshard always", "--check-interval 2"),
    (f"{PP2} --context-parallel-size 2", "--optimizer muon"),
    (f"{PP2} --tensor-parallel-size 2", "--optimizer muon --deterministic"),
    (PP2, "--log-params-norm --log-num-zeros-in-grad --z-loss-coeff 1e-3"),
    (f"{PP2} --context-parallel-size 2", "--compile"),
    (f"{PP2} --context-parallel-size 2", "--linear-attention-freq 2"),
    (f"{PP2} --pipeline-model-parallel-layout E|tt|tt|L", ""),
    ("--pipeline-parallel-size 4 --pipeline-model-parallel-layout E|tt|tt|L", ""),
    # Two stages have no matrix for Muon.
    ("--pipeline-parallel-size 4 --pipeline-model-parallel-layout E|tt|tt|L", "--optimizer muon"),
    ("--pipeline-parallel-size 4", "--global-batch-size 2 --document-mask"),
    (f"{PP2} {CHUNKS} --data-parallel-replicate-size 2", "--global-batch-size 6"),
    (f"{PP2}", "--kernel-benchmark"),
    (f"{PP2} --context-parallel-size 2", "--attention-dropout 0.1 --hidden-dropout 0.1"),
]


def with_batch(options: str) -> str:
    return options if "--global-batch" in options else f"{options} --global-batch-size 8"


@cache
def on_one_rank(folder: Path, options: str) -> list[dict[str, Any]]:
    words = f"{BASE} {with_batch(options)} --save {folder / 'alone'}".split()
    assert run_ranks(train, 1, words, timeout=240) == [4]
    return metrics_of(folder / "alone")


def compare(grid: str, options: str, folder: Path) -> None:
    there = on_one_rank(folder, options)
    words = f"{BASE} {with_batch(options)} {grid} --save {folder / 'stages'}".split()
    assert run_ranks(train, 4, words, timeout=240) == [4] * 4
    here = metrics_of(folder / "stages")
    assert [row["step"] for row in here] == [row["step"] for row in there] == [1, 2, 3, 4]
    assert there[0]["loss"] - there[-1]["loss"] > 0.1
    for one, other in zip(here, there, strict=True):
        assert one["tokens"] == other["tokens"]
        named = {"num_zeros_in_grad": "--log-num-zeros", "params_norm": "--log-params-norm"}
        asked = {name for name, flag in named.items() if flag in options}
        assert asked <= other.keys()
        for name in ({"loss", "grad_norm", "valid_loss"} & other.keys()) | asked:
            assert one[name] == pytest.approx(other[name], rel=1e-9), name


@pytest.mark.parametrize(("grid", "options"), QUICK)
def test_a_run_on_stages_equals_one_rank(grid: str, options: str, tmp_path: Path) -> None:
    compare(grid, options, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "options"), LONG)
def test_every_option_on_stages_equals_one_rank(grid: str, options: str, tmp_path: Path) -> None:
    compare(grid, options, tmp_path)
