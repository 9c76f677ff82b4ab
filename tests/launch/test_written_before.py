"""Runs that commit 7a4af13 wrote go on with today's code as they went on with that commit's.

``tests/fixtures/run-7a4af13`` holds two run folders as the program left them after step 2 (only the
TensorBoard events are removed): ``llama`` has rotary positions, SwiGLU, RMSNorm, normalized query
and key heads, grouped queries and an output layer of its own on two context parallel ranks; ``gpt``
has learned positions, GELU, LayerNorm, biases and a tied output layer on two tensor parallel ranks
with sequence parallelism. ``step-4.json`` records losses and gradient norms of that commit when it
went on. The order of sums has changed since then, and the last bits of float32 depend on the CPU
too, so the numbers are compared to a relative 1e-6.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.train.checkpoints import metrics_of, numbers
from tests.train.test_loop import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-7a4af13"


def train_in(rank: int, world_size: int, folder: Path, argv: list[str]) -> int:
    """Trains in a folder, because the run's ``config.yaml`` names its data by a relative path."""
    with contextlib.chdir(folder):
        return train(rank, world_size, argv)


@pytest.mark.parametrize("name", ["llama", "gpt"])
def test_a_run_of_commit_7a4af13_goes_on(tmp_path: Path, name: str) -> None:
    shutil.copy(FIXTURE / "text.txt", tmp_path)
    shutil.copytree(FIXTURE / name, tmp_path / name)
    expected = json.loads((FIXTURE / name / "step-4.json").read_text())

    again = ["--config", f"{name}/config.yaml", "--save", "again"]
    assert run_ranks(train_in, 2, tmp_path, again) == [2, 2]
    assert run_ranks(train_in, 2, tmp_path, ["--load", name, "--train-iters", "4"]) == [4, 4]

    begun = [numbers(row) for row in metrics_of(tmp_path / "again")]
    rows = [numbers(row) for row in metrics_of(tmp_path / name)]
    for row, promised in zip(begun + rows[2:], rows[:2] + expected["metrics"], strict=True):
        assert row == pytest.approx(promised, rel=1e-6)
