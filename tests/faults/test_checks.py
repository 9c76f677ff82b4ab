"""Corrupted parameters and messages end the run, and the rank is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from cp_megatron.faults.checks import _copies, _deviating
from cp_megatron.plan import Grid
from cp_megatron.train.announcement import Announcement
from cp_megatron.train.loop import DivergedError
from cp_megatron.train.optimizer import local_values
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import LaunchedStep, TrainStep
from tests.context_parallel.test_link_sums import flipping
from tests.ranks import run_ranks
from tests.train.checkpoints import differing
from tests.train.test_loop import GRIDS, STEPS, Place, assembled, finish
from tests.train.test_loop import place as place  # the fixture
from tests.train.test_skipping import faults_of

CHECKED = ["--check-interval", "2", "--save-interval", "1"]


@dataclass(frozen=True, kw_only=True)
class CorruptingStep(TrainStep):
    """A training step in which a bit of the first message that arrives flips, in one step."""

    corrupted_step: int

    def launch(
        self, shards: Sequence[Shard], announcement: Announcement, *, step: int, **options: Any
    ) -> LaunchedStep:
        with flipping(0 if step == self.corrupted_step else -1):
            return super().launch(shards, announcement, step=step, **options)


def train(
    rank: int,
    world_size: int,
    argv: list[str],
    flip: tuple[int, int] | None = None,
    message: tuple[int, int] | None = None,
) -> str:
    """Why the training ended, or nothing.

    Args:
        flip: (rank, step) where a bit of a parameter flips.
        message: (rank, step) where a bit flips in the first message that arrives.
    """
    run = assembled(rank, world_size, argv)
    faults = faults_of(rank, *([("flip", *flip)] if flip else []))
    run = replace(run, faults=faults)
    if message is not None and message[0] == rank:
        step = CorruptingStep(**vars(run.train_step), corrupted_step=message[1])
        run = replace(run, train_step=step)
    try:
        finish(run)
    except DivergedError as error:
        return str(error)
    return ""


def test_a_corrupted_parameter_is_found_before_it_is_saved(place: Place) -> None:
    errors = run_ranks(train, 4, place.argv("run", *GRIDS["tp2 cp2"], *CHECKED), (2, 2))
    assert len(set(errors)) == 1
    # After step 2, whose save is checked too.
    assert errors[0].startswith("step 2: rank 2: "), errors[0]
    assert "changed between two updates; the last checkpoint is of step 1" in errors[0]
    assert not (place.folder / "run" / "step-2").exists()


def test_a_corrupted_message_is_found_in_a_checked_step(place: Place) -> None:
    argv = place.argv("run", *GRIDS["tp2 cp2"], *CHECKED)
    assert run_ranks(train, 4, argv, None, (3, 3)) == [""] * 4, "step 3 is not checked"
    other = place.argv("other", *GRIDS["tp2 cp2"], *CHECKED)
    errors = run_ranks(train, 4, other, None, (3, 2))
    assert set(errors) == {errors[0]}
    assert errors[0].startswith("step 2: rank 3: messages from rank 1 arrived corrupted"), errors[0]
    assert not (place.folder / "other" / "step-2").exists()


def test_checks_change_nothing(place: Place) -> None:
    argv = ["--context-parallel-size", "2"]
    assert run_ranks(train, 2, place.argv("plain", *argv)) == [""] * 2
    assert run_ranks(train, 2, place.argv("checked", *argv, "--check-interval", "1")) == [""] * 2
    one, other = place.folder / "plain", place.folder / "checked"
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []


def drift(rank: int, world_size: int, argv: list[str], odd: int) -> str | None:
    """The finding if an update went wrong on rank ``odd``."""
    run = assembled(rank, world_size, argv)
    assert run.checks is not None
    norms = [p for n, p in run.train_step.model.named_parameters() if "norm" in n]
    held = next(x for x in map(local_values, norms) if x.numel())
    if rank == odd:
        held.data.add_(1)
    run.checks.parameters.take()
    if run.writer is not None:
        run.writer.close()
    return run.checks.find(1)


def test_tensor_parallel_ranks_that_drift_apart_are_named(place: Place) -> None:
    four = run_ranks(drift, 4, place.argv("a", *GRIDS["tp4"], *CHECKED), 2)
    assert four == ["rank 2: parameters that tensor parallel ranks share differ"] * 4
    two = run_ranks(drift, 4, place.argv("b", *GRIDS["tp2 cp2"], *CHECKED), 2)
    assert two == ["rank 2, 3: parameters that tensor parallel ranks share differ"] * 4


def test_copies_of_the_model_that_drift_apart_are_named(place: Place) -> None:
    flags = ["--data-parallel-replicate-size", "2", "--global-batch-size", "4"]
    found = run_ranks(drift, 4, place.argv("a", *flags, *CHECKED), 2)
    assert found == ["rank 0, 2: copies of the model differ"] * 4, "there is no majority"


def test_which_rank_is_blamed() -> None:
    groups = Grid(dp=2, cp=1, tp=3).groups("tp")

    def blamed(sums: list[int], broken: list[bool]) -> list[str]:
        return [found.split(":")[0] for found in _deviating(groups, sums, broken, "differ")]

    fine = [False] * 6
    assert blamed([1, 1, 1, 2, 2, 2], fine) == []
    assert blamed([1, 5, 1, 2, 2, 3], fine) == ["rank 1", "rank 5"]
    assert blamed([1, 2, 3, 4, 4, 4], fine) == ["rank 0, 1, 2"]
    # A rank that found its own fault is blamed once.
    assert blamed([1, 5, 1, 2, 2, 2], [False, True, *fine[:4]]) == []


def test_the_ranks_that_hold_the_same_part_of_the_model() -> None:
    assert _copies(Grid(dp=2, cp=2, tp=2, replicas=2)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert _copies(Grid(dp=2, cp=2)) == [[0], [1], [2], [3]]
