"""Training on indexed data: a blend in packed rows, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.ranges import write_pair
from tests.launch.test_end_to_end import MODEL, SCRIPT, run
from tests.train.checkpoints import metrics_of


@pytest.mark.slow
def test_a_packed_blend_is_the_same_on_one_rank_and_on_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        random = np.random.default_rng(ord(name))
        lengths = random.lognormal(3.2, 0.8, 60).astype(int) + 1
        documents = ([*random.integers(97, 123, length).tolist(), 256] for length in lengths)
        write_pair(tmp_path / name, documents)
    data = ["--data-path", "0.7", "a", "0.3", "b.idx", "--packing", "best-fit"]
    steps = ["--global-batch-size", "4", "--train-iters", "2", "--log-interval", "1"]
    flags = [*MODEL, *data, *steps, "--dtype", "float64", "--device", "cpu", "--no-plot", "--save"]
    one = run(["python", SCRIPT, *flags, "one"], tmp_path)
    assert (one.code, one.noise) == (0, [])
    assert "padding" in one.out
    cp2 = ["torchrun", "--nproc-per-node", "2", SCRIPT, "--context-parallel-size", "2"]
    two = run([*cp2, *flags, "two"], tmp_path)
    assert (two.code, two.noise) == (0, [])
    here, there = ([row["loss"] for row in metrics_of(tmp_path / n)] for n in ("one", "two"))
    assert len(here) == 2
    assert there == pytest.approx(here, rel=1e-10)
