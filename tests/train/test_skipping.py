"""Bad numbers on one rank: all ranks skip the step and continue as if it had not happened."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cp_megatron.data.batch.batch import IGNORED
from cp_megatron.faults.guard import LEAST_WINDOW
from cp_megatron.faults.inject import Fault, Faults
from cp_megatron.train.loop import DivergedError, Trainer
from cp_megatron.train.optimizer import local_values
from cp_megatron.train.step import StepResult, TrainStep
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import GRIDS, STEPS, Place, StoppingView, assembled, finish
from tests.train.test_loop import place as place  # the fixture
from tests.train.test_step import Case, batches_of, shards_of, train_step_of

GRID = Case(tp=2, cp=2, sequence_parallel=True)
Held = list[Tensor]


def faults_of(rank: int, *asked: tuple[str, int, int]) -> Faults:
    """The faults of ``rank`` among these, each (kind, rank, step)."""
    faults = (Fault(kind=kind, rank=where, step=step) for kind, where, step in asked)
    return Faults(mine=tuple(fault for fault in faults if fault.rank == rank))


def held(train_step: TrainStep) -> Held:
    """Copies of this rank's parameters and optimizer state."""
    found = [local_values(parameter).clone() for parameter in train_step.model.parameters()]
    for state in train_step.optimizer.state.values():
        found += [local_values(x).clone() for x in state.values() if isinstance(x, Tensor)]
    return found


def skip_one(
    rank: int, world_size: int, bad: int | None, steps: list[int]
) -> tuple[list[StepResult], list[Held]]:
    """Trains on the batches of ``steps``; the loss of rank ``bad`` is NaN in step 2."""
    train_step = train_step_of("llama", GRID)
    faults = faults_of(rank, *([("nan", bad, 2)] if bad is not None else []))
    results, states = [], []
    for step in steps:
        results.append(
            train_step.run(
                shards_of(step - 1, GRID, train_step),
                step=step,
                lr=3e-3,
                accept=lambda loss, norm: loss.isfinite() & norm.isfinite(),
                faults=faults,
            )
        )
        states.append(held(train_step))
    return results, states


def test_nan_on_one_rank_changes_nothing_on_any_rank() -> None:
    bad = 3  # whose loss is not the one that is added up: its TP peer holds the same tokens
    without = run_ranks(skip_one, 4, None, [1, 3])
    for (results, states), (expected, there) in zip(
        run_ranks(skip_one, 4, bad, [1, 2, 3]), without, strict=True
    ):
        assert [result.accepted for result in results] == [True, False, True]
        assert math.isnan(results[1].loss)
        assert math.isnan(results[1].grad_norm)
        assert all(map(torch.equal, states[0], states[1]))
        assert not all(map(torch.equal, states[1], states[2]))
        assert [results[0], results[2]] == expected
        assert len(states[2]) == len(there[1])
        assert all(map(torch.equal, states[2], there[1]))


def loss_where_a_rank_has_no_labels(rank: int, world_size: int, case: Case) -> StepResult:
    """All labels in the second half of the row are masked, which is all that CP rank 1 holds."""
    train_step = train_step_of("llama", case)
    batches = batches_of(0, case, train_step.groups)
    for batch in batches:
        batch.labels[:, batch.labels.shape[1] // 2 :] = IGNORED
    return train_step.run([train_step.prepare(batch) for batch in batches], step=1, lr=1e-3)


def test_a_rank_without_labels_is_finite_and_changes_no_number() -> None:
    (expected,) = run_ranks(loss_where_a_rank_has_no_labels, 1, Case())
    case = Case(cp=2, layout="contiguous")
    for result in run_ranks(loss_where_a_rank_has_no_labels, 2, case):
        assert result.loss == pytest.approx(expected.loss, rel=1e-12)
        assert result.grad_norm == pytest.approx(expected.grad_norm, rel=1e-12)
        assert expected.loss > 0


def disturbed(
    rank: int,
    world_size: int,
    argv: list[str],
    faults: list[tuple[str, int, int]],
    stop_at: int | None = None,
) -> tuple[list[str], dict[str, Any], str]:
    """Trains with faults; returns the printed lines, the guard's state, and the error if any."""
    run = replace(assembled(rank, world_size, argv), faults=faults_of(rank, *faults))
    view, ended = StoppingView(stop_at), ""
    try:
        finish(run, view)
    except DivergedError as error:
        ended = str(error)
    return view.said, run.guard.state(), ended


def test_a_skipped_step_is_reported_and_not_logged(place: Place) -> None:
    argv = place.argv("run", *GRIDS["tp2 cp2"])
    for said, state, ended in run_ranks(disturbed, 4, argv, [("nan", 3, 2)]):
        found = "step 2: loss nan, gradient norm nan: skipped (1 of at most 5 in 1,000 steps)"
        assert said == [found]
        assert state["skipped"] == [2]
        assert len(state["losses"]) == STEPS - 1
        assert ended == ""
    rows = metrics_of(place.folder / "run")
    assert [row["step"] for row in rows] == [1, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in rows)


def test_one_skipped_step_too_many_ends_all_ranks_and_keeps_the_batch(place: Place) -> None:
    argv = place.argv("run", *GRIDS["tp2 cp2"], "--skip-budget", "1", "--save-interval", "1")
    answers = run_ranks(disturbed, 4, argv, [("nan", 0, 2), ("nan", 2, 3)])
    file = place.folder / "run" / "bad-step-3.safetensors"
    for _, _, ended in answers:
        assert ended.startswith(
            "step 3: loss nan, gradient norm nan, 2 steps of 1,000 skipped; "
            f"its batch is in {file}; the last checkpoint is of step 2 "
        )
    (rows,) = run_ranks(rows_of_batch, 1, place.argv("other"), 2)
    with safe_open(file, "pt") as found:
        about = {"step": "3", "loss": "nan", "grad_norm": "nan", "checkpoint": "2"}
        assert found.metadata() == about
        for name, expected in rows.items():
            assert torch.equal(found.get_tensor(name), expected), name


def rows_of_batch(rank: int, world_size: int, argv: list[str], number: int) -> dict[str, Tensor]:
    """A global batch as one rank trains on it."""
    run: Trainer = assembled(rank, world_size, argv)
    if run.writer is not None:
        run.writer.close()
    batches = list(run.batches(run.rows.train, run.plan.rows_of(number + 1).start))
    return {
        "tokens": torch.cat([batch.tokens for batch in batches]),
        "labels": torch.cat([batch.labels for batch in batches]),
        "rows": torch.arange(4 * number, 4 * number + 4),
    }


def test_a_broken_parameter_ends_the_run_at_once(place: Place) -> None:
    for ended in run_ranks(break_and_train, 2, place.argv("run", "--context-parallel-size", "2")):
        assert "step 1: loss nan, gradient norm nan and a parameter is not finite; " in ended


def break_and_train(rank: int, world_size: int, argv: list[str]) -> str:
    run = assembled(rank, world_size, argv)
    if rank == 1:
        with torch.no_grad():
            local_values(next(run.train_step.model.parameters())).fill_(math.nan)
    with pytest.raises(DivergedError) as caught:
        finish(run)
    return str(caught.value)


SPIKE_STEPS = LEAST_WINDOW + 6


def longer(argv: list[str]) -> list[str]:
    place = argv.index("--train-iters") + 1
    return [*argv[:place], str(SPIKE_STEPS), *argv[place + 1 :]]


@pytest.mark.slow
def test_a_resumed_run_skips_the_same_spike(place: Place) -> None:
    """The run stops before the spike, so that only the kept window can detect it."""
    words = ["--spike-threshold", "6", "--lr", "1e-4", "--min-lr", "1e-5"]
    words += ["--context-parallel-size", "2"]
    spike, stop = SPIKE_STEPS - 1, SPIKE_STEPS - 4
    faults = [("spike", rank, spike) for rank in range(2)]
    whole = run_ranks(disturbed, 2, longer(place.argv("whole", *words)), faults)
    assert run_ranks(disturbed, 2, longer(place.argv("cut", *words)), faults, stop)[0][0] == []
    again = run_ranks(disturbed, 2, place.load("cut"), faults)
    for said, state, ended in (*whole, *again):
        assert (said, state, ended) == whole[0]
        assert len(said) == 1
        assert said[0].startswith(f"step {spike}: loss ")
        assert "(a spike: above " in said[0]
        assert state["skipped"] == [spike]
        assert len(state["losses"]) == SPIKE_STEPS - 1
    one, other = place.folder / "whole", place.folder / "cut"
    assert differing(one / f"step-{SPIKE_STEPS}", other / f"step-{SPIKE_STEPS}") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))
    manifests = [
        json.loads((Path(run) / f"step-{SPIKE_STEPS}" / "manifest.json").read_text())
        for run in (one, other)
    ]
    assert [manifest["manifest"]["extra"]["guard"] for manifest in manifests] == [whole[0][1]] * 2
