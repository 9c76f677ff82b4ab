"""Runs that commit 7a4af13 wrote go on with today's code as they went on with that commit's.

``tests/fixtures/run-7a4af13`` holds two run folders as the program left them after step 2 (only the
TensorBoard events are removed): ``llama`` has rotary positions, SwiGLU, RMSNorm, normalized query
and key heads, grouped queries and an output layer of its own on two context parallel ranks; ``gpt``
has learned positions, GELU, LayerNorm, biases and a tied output layer on two tensor parallel ranks
with sequence parallelism. ``step-4.json`` records what that commit computed when it went on:
losses, gradient norms, and the SHA-256 of every parameter and AdamW moment after step 4.

The last bits of float32 depend on the CPU and on the version of PyTorch. On a machine like the one
that wrote the fixture, going on must give the same bits. On another machine the test first trains
steps 1 and 2 again from ``config.yaml``: if they reproduce step 2 of the fixture, step 4 must be
the same bits too; otherwise losses and gradient norms are compared to a relative 1e-6.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers, tensors_of
from tests.train.test_loop import train

FIXTURE = Path(__file__).parents[1] / "fixtures" / "run-7a4af13"


def train_in(rank: int, world_size: int, folder: Path, argv: list[str]) -> int:
    """Trains in a folder, because the run's ``config.yaml`` names its data by a relative path."""
    with contextlib.chdir(folder):
        return train(rank, world_size, argv)


def machine() -> str:
    """A digest of what the bits depend on: PyTorch, the CPU's kind and features, and the cores."""
    kinds = ("vendor_id", "cpu family", "model", "stepping", "flags")
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    cpu = sorted({line for line in lines if line.partition(":")[0].strip() in kinds})
    text = "\n".join([torch.__version__, str(os.cpu_count()), *cpu])
    return hashlib.sha256(text.encode()).hexdigest()


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
    alike = differing(tmp_path / name / "step-2", tmp_path / "again/step-2") == []
    if machine() == expected["machine"] or (begun == rows[:2] and alike):
        assert rows[2:] == expected["metrics"]
        digests = {
            tensor: hashlib.sha256(value.numpy().tobytes()).hexdigest()
            for tensor, value in tensors_of(tmp_path / name / "step-4").items()
        }
        assert digests == expected["sha256"]
        return
    warnings.warn(f"{name}: steps 1 and 2 differ in their last bits on this machine", stacklevel=1)
    for row, promised in zip(begun + rows[2:], rows[:2] + expected["metrics"], strict=True):
        assert row == pytest.approx(promised, rel=1e-6)
