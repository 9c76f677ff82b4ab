"""A run with --compile is the run without it but for rounding, and repeats bit for bit."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from cp_megatron.model.compiled_parts import compile_parts
from cp_megatron.train import run
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import BASE, STEPS, STOP, assembled, train

FLOAT64 = [*BASE, "--dtype", "float64", "--document-mask"]


def train_traced(rank: int, world_size: int, argv: list[str], stop_at: int | None = None) -> int:
    """``train`` in a new program whose compiler generates no code, which takes the longest."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        traced = partial(compile_parts, backend="aot_eager_decomp_partition")
        patch.setattr(run, "compile_parts", traced)
        patch.setattr(run, "check_compiler", lambda device: None)
        return train(rank, world_size, argv, stop_at)


def compiled_models(rank: int, world_size: int, argv: list[str]) -> list[str]:
    """What is done to compile the model of a run."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "check_compiler", lambda device: done.append(f"check on {device}"))
        patch.setattr(run, "compile_parts", lambda model: done.append("compile"))
        assembled(rank, world_size, argv)
    return done


def test_only_the_flag_compiles(tmp_path: Path) -> None:
    argv = [*BASE, "--save", str(tmp_path / "compiled"), "--compile"]
    assert run_ranks(compiled_models, 1, argv) == [["check on cpu", "compile"]]
    assert run_ranks(compiled_models, 1, [*BASE, "--save", str(tmp_path / "eager")]) == [[]]


@pytest.mark.slow
def test_a_compiled_run_is_the_run_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    eager, whole, halves = (tmp_path / name for name in ("eager", "whole", "halves"))
    run_ranks(train, 1, [*FLOAT64, "--save", str(eager)])
    run_ranks(train_traced, 1, [*FLOAT64, "--save", str(whole), "--compile"], timeout=300)
    run_ranks(train_traced, 1, [*FLOAT64, "--save", str(halves), "--compile"], STOP, timeout=300)
    # The run's configuration has the flag.
    run_ranks(train_traced, 1, ["--load", str(halves)], timeout=300)
    rows = [list(map(numbers, metrics_of(folder))) for folder in (eager, whole, halves)]
    assert rows[1] == rows[2]
    assert rows[1] != rows[0]
    for here, there in zip(rows[1], rows[0], strict=True):
        assert here == pytest.approx(there, rel=1e-12)
    last = f"step-{STEPS}"
    assert not differing(whole / last, halves / last)
