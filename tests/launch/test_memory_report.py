"""``--memory-report`` prints a table, writes a file and does not change the losses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.checkpoints import metrics_of

SCRIPT = str(Path(__file__).parents[2] / "launch" / "pretrain.py")
WORDS = ["--preset", "toy", "--num-layers", "1", "--hidden-size", "32"]
WORDS += ["--seq-length", "64", "--device", "cpu"]
WORDS += [
    "--train-iters",
    "2",
    "--eval-iters",
    "0",
    "--lr-warmup-iters",
    "0",
    "--data-path",
    "text",
]
WORDS += ["--log-interval", "1", "--no-plot"]


def launched(folder: Path, *argv: str) -> str:
    """Runs the program and returns its standard output."""
    command = [sys.executable, SCRIPT, *WORDS, *argv]
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=90, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics_of(run)]


@pytest.mark.slow
def test_a_run_reports_its_memory(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mice.txt").write_text("three blind mice, see how they run, " * 100)
    launched(tmp_path, "--save", "plain")
    out = launched(tmp_path, "--save", "told", "--memory-report")
    before, _, after = out.partition("step 1/2")
    assert after
    for name in ("parameters", "optimizer", "  MLP norm", "logits", "peak of the step"):
        assert f"\n {name} " in before, name
    assert before.count("measured") == 1
    assert losses(tmp_path / "told") == losses(tmp_path / "plain")
    (rank,) = json.loads((tmp_path / "told" / "memory.json").read_text())["ranks"]
    assert {row["kind"] for row in rank["held"]} >= {"parameters", "activations", "logits"}
    assert all(row["predicted"] == row["measured"] for row in rank["held"][:-1])
    dry = launched(tmp_path, "--dry-run", "--memory-report")
    assert "peak of the step" not in dry
    line = next(line for line in before.splitlines() if line.startswith("   MLP norm"))
    assert line.split()[2] == next(x for x in dry.splitlines() if "MLP norm" in x).split()[-1]
