"""Pipeline stages under torchrun, by Megatron-LM's flags: they train, validate and end like one
rank; and a wrong number of them ends before a rank starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch.test_end_to_end import METRICS, SCRIPT, TORCHRUN, folder, run
from tests.train.checkpoints import metrics_of

__all__ = ["folder"]

LINE = [
    *("--preset", "toy", "--num-layers", "4", "--hidden-size", "32", "--seq-length", "64"),
    *("--data-path", "text", "--micro-batch-size", "1", "--global-batch-size", "6"),
    *("--train-iters", "3", "--lr-warmup-iters", "0", "--log-interval", "1", "--device", "cpu"),
    *("--eval-iters", "2", "--dtype", "float64"),
]
STAGES = ["--pipeline-model-parallel-size", "2"]
GRIDS = {
    "layout": [*STAGES, "--pipeline-model-parallel-layout", "Et*3|tL"],
    "cp": [*STAGES, "--context-parallel-size", "2", "--document-mask"],
    "interleaved": [*STAGES, "--num-layers-per-virtual-pipeline-stage", "1"],
}


@pytest.mark.slow  # tests/train/test_stage_options.py trains in the pool of ranks, by default
@pytest.mark.parametrize("name", GRIDS)
def test_stages_train_as_one_rank_does(name: str, folder: Path) -> None:
    packed = ["--document-mask"] if "--document-mask" in GRIDS[name] else []
    alone = run(["python", SCRIPT, *LINE, *packed, "--save", f"{name}-alone"], folder)
    assert alone.code == 0
    ended = run([*TORCHRUN, SCRIPT, *LINE, *GRIDS[name], "--save", name], folder)
    assert (ended.code, ended.noise) == (0, [])
    assert "4 ranks = pp 2 x " in ended.out
    assert "1F1B" in ended.out
    assert ended.out.count("step 3/3  loss ") == 1, "only rank 0 prints"
    here, there = metrics_of(folder / name), metrics_of(folder / f"{name}-alone")
    assert [row["step"] for row in here] == [row["step"] for row in there] == [1, 2, 3]
    assert set(here[-1]) == METRICS | {"valid_loss"}
    for one, other in zip(here, there, strict=True):
        for key in {"loss", "grad_norm", "valid_loss", "tokens"} & other.keys():
            assert one[key] == pytest.approx(other[key], rel=1e-9), key
        assert one["tokens_per_second"] == pytest.approx(6 * 64 / one["step_seconds"])
        assert one["memory_bytes"] > 2**20


def test_stages_that_the_layers_do_not_suffice_for_end_with_the_reasons(folder: Path) -> None:
    words = ["--pipeline-model-parallel-size", "5", "--fsdp-reshard", "never", "--dry-run"]
    ended = run(["python", SCRIPT, *LINE, *words], folder)
    assert ended.code == 2
    assert "--pipeline-parallel-size 5: must leave a layer for each of the 5 chunks" in ended.err
    assert "--fsdp-reshard never: has no effect on one data" in ended.err
    assert "2 mistakes on this command line" in ended.err
