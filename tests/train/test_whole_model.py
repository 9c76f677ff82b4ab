"""The norm of all parameters and the zeros of the gradient are the same on every grid."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.train.step import TrainStep
from tests.ranks import run_ranks
from tests.train.checkpoints import metrics_of, tensors_of
from tests.train.test_loop import Place, assembled, place, train

__all__ = ["place"]  # the fixture

# One key/value head on two tp ranks, so that both hold it; a vocabulary with padding.
MODEL = ["--num-query-groups", "1", "--num-attention-heads", "4", "--dtype", "float64"]
LOGS = ["--log-params-norm", "--log-num-zeros-in-grad"]
GRIDS: Mapping[str, tuple[int, list[str]]] = {
    "one": (1, []),
    "tp2": (2, ["--tensor-parallel-size", "2"]),
    "cp2": (2, ["--context-parallel-size", "2"]),
    "dp2 tp2": (4, ["--tensor-parallel-size", "2"]),
    "two copies tp2": (4, ["--tensor-parallel-size", "2", "--data-parallel-replicate-size", "2"]),
}


def params_norm_of(step: Path) -> float:
    """Computed from the checkpoint, which holds every parameter once."""
    found = tensors_of(step)
    whole = [x.double().square().sum() for name, x in found.items() if name.startswith("model.")]
    return float(torch.stack(whole).sum().sqrt())


def test_they_are_logged_alike_on_every_grid(place: Place) -> None:
    for name, (world, flags) in GRIDS.items():
        run_ranks(train, world, place.argv(name, *MODEL, *LOGS, *flags, "--save-interval", "1"))
    one = metrics_of(place.folder / "one")
    for name in GRIDS:
        for row, first in zip(metrics_of(place.folder / name), one, strict=True):
            expected = params_norm_of(place.folder / name / f"step-{row['step']}")
            assert row["params_norm"] == pytest.approx(expected, rel=1e-12), name
            assert row["params_norm"] == pytest.approx(first["params_norm"], rel=1e-12), name
            assert row["num_zeros_in_grad"] == first["num_zeros_in_grad"] > 0, name


def test_they_are_logged_only_if_asked_for_and_when_steps_are_logged(place: Place) -> None:
    run_ranks(train, 1, place.argv("plain"))
    assert not {"params_norm", "num_zeros_in_grad"} & metrics_of(place.folder / "plain")[-1].keys()
    run_ranks(train, 1, place.argv("norm", "--log-params-norm"))
    row = metrics_of(place.folder / "norm")[-1]
    assert row["params_norm"] > 0
    assert "num_zeros_in_grad" not in row
    assert "log_params_norm: true" in (place.folder / "norm" / "config.yaml").read_text()


def zeros(rank: int, world_size: int, argv: list[str]) -> tuple[int, int]:
    """The zeros that a step reports, and those of its whole gradient, gathered by itself."""
    run = assembled(rank, world_size, argv)
    if run.writer is not None:
        run.writer.close()
    seen: list[int] = []
    update = TrainStep._update

    def watched(step: TrainStep, *args: Any) -> Tensor | None:
        for parameter in step.model.parameters():
            gradient = parameter.grad
            assert isinstance(gradient, DTensor)
            seen.append(int((gradient.full_tensor() == 0).sum()))
        return update(step, *args)

    TrainStep._update = watched  # type: ignore[method-assign]
    try:
        batch = [*map(run.train_step.prepare, run.batches(run.rows.train, 0))]
        result = run.train_step.run(batch, step=1, lr=1e-3)
    finally:
        TrainStep._update = update  # type: ignore[method-assign]
    return result.num_zeros or 0, sum(seen)


@pytest.mark.parametrize("grid", ["tp2", "cp2"])
def test_zeros_are_those_of_the_whole_gradient(place: Place, grid: str) -> None:
    world, flags = GRIDS[grid]
    for counted, expected in run_ranks(zeros, world, place.argv("run", *MODEL, *LOGS, *flags)):
        assert counted == expected > 0
