"""Ranks that stop early leave together, lose nothing, and go on bit for bit."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest

from cp_megatron.comm.signals import CAUGHT, stop_on_signal
from cp_megatron.data.rows.sampler import RowSource, TokenRow
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import STEPS, Place, StoppingView, assembled, finish
from tests.train.test_loop import place as place  # the fixture

GRID = ["--context-parallel-size", "2"]
LONG = "10000"
"""Batches of a validation that would take minutes."""


class TellingRows:
    """Rows that call ``told`` with the number of rows that were read so far."""

    def __init__(self, rows: RowSource, told: Callable[[int], None]) -> None:
        self._rows, self._told, self.seq_length, self.eod = rows, told, rows.seq_length, rows.eod
        self.read = 0

    def __getitem__(self, number: int) -> TokenRow:
        self.read += 1
        self._told(self.read)
        return self._rows[number]


def signalled(
    rank: int, world_size: int, argv: list[str], number: int, to: int, row: int
) -> tuple[int, int, list[str]]:
    """Trains until rank ``to`` gets a signal while it reads validation row ``row``, and another.

    Returns:
        The last step, the number of validation rows that were read, and what the run said.
    """
    run = assembled(rank, world_size, argv)
    view = StoppingView()

    def told(read: int) -> None:
        if rank == to and read in (row, row + 1):
            os.kill(os.getpid(), number if read == row else signal.SIGTERM)

    assert run.rows.valid is not None
    rows = TellingRows(run.rows.valid, told)
    run = replace(run, rows=replace(run.rows, valid=cast(RowSource, rows)), view=view)
    before = {number: signal.getsignal(number) for number in CAUGHT}
    try:
        with stop_on_signal() as stop:
            last = run.train(stop)
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler or signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR1, all_threads=False)
        if run.writer is not None:
            run.writer.close()
    return last, rows.read, view.said


@pytest.mark.parametrize(
    ("number", "to", "flags"),
    [
        (signal.SIGINT, 1, []),
        pytest.param(signal.SIGTERM, 0, ["--save-interval", "1"], marks=pytest.mark.slow),
        (signal.SIGUSR1, 1, ["--save-interval", "1", "--no-async-save"]),
    ],
)
def test_a_signal_during_validation_saves_and_loses_nothing(
    place: Place, number: signal.Signals, to: int, flags: list[str]
) -> None:
    whole = place.argv("whole", *GRID, "--hidden-dropout", "0.1")
    assert run_ranks(finished, 2, whole) == [STEPS] * 2
    argv = place.argv("cut", *GRID, "--hidden-dropout", "0.1", "--eval-interval", "2", *flags)
    argv[argv.index("--eval-iters") + 1] = LONG
    for last, read, said in run_ranks(signalled, 2, argv, number, to, 9):
        assert last == 2
        assert read < 40, "the ranks leave within a few batches"
        assert said == [
            "step 2: its validation was interrupted and has no result",
            f"step 2: {number.name} ends the run",
        ]
    one, other = place.folder / "whole", place.folder / "cut"
    assert (other / "step-2" / "manifest.json").is_file()
    rows = metrics_of(other)
    assert [row["step"] for row in rows] == [1, 2]
    assert not any("valid_loss" in row for row in rows), "a part of a validation is no result"
    assert run_ranks(finished, 2, place.load("cut", "--eval-iters", "1")) == [STEPS] * 2
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))


def asked(rank: int, world_size: int, argv: list[str], stopped: int | None) -> int:
    """The last step of a run in which one rank is asked to stop at the beginning."""
    view = StoppingView()
    if rank == stopped:
        view.stop(signal.SIGTERM, None)
    return finish(assembled(rank, world_size, argv), view)


@pytest.mark.parametrize(("stopped", "last"), [(None, STEPS), (0, 1), (1, 1)])
def test_all_ranks_stop_when_one_is_asked(place: Place, stopped: int | None, last: int) -> None:
    assert run_ranks(asked, 2, place.argv("run", *GRID), stopped) == [last] * 2


def on_time(rank: int, world_size: int, argv: list[str], early: int) -> tuple[int, list[str]]:
    """Trains with the start of rank ``early`` an hour ago; the last step, and what the run said."""
    run, view = assembled(rank, world_size, argv), StoppingView()
    if rank == early:
        run = replace(run, began=run.began - 3600)
    return finish(run, view), view.said


def test_the_time_is_over_for_all_ranks_at_once(place: Place) -> None:
    """The same command goes on, with as much time again."""
    argv = place.argv("run", *GRID, "--load", "auto", "--exit-duration-in-mins", "59.5")
    said = ["step {}: --exit-duration-in-mins 59.5 ends the run"]
    for step in (1, 2):
        ends = run_ranks(on_time, 2, argv, 1)
        assert ends == [(step, [line.format(step) for line in said])] * 2
        assert (place.folder / "run" / f"step-{step}").is_dir()
    assert run_ranks(on_time, 2, argv, 2) == [(STEPS, [])] * 2


def test_a_run_exits_at_its_interval_with_its_validation(place: Place) -> None:
    argv = place.argv("run", *GRID, "--load", "auto", "--exit-interval", "2")
    argv += ["--eval-interval", "1"]
    for step in (2, 4):
        said = [f"step {step}: --exit-interval 2 ends the run"] if step < STEPS else []
        assert run_ranks(on_time, 2, argv, 2) == [(step, said)] * 2
        assert (place.folder / "run" / f"step-{step}").is_dir()
    rows = metrics_of(place.folder / "run")
    assert [row["step"] for row in rows if "valid_loss" in row] == [1, 2, 3, 4]


def finished(rank: int, world_size: int, argv: list[str]) -> int:
    return finish(assembled(rank, world_size, argv))


def test_a_signal_during_the_last_validation_leaves_a_finished_run(place: Place) -> None:
    argv = place.argv("run", *GRID)
    argv[argv.index("--eval-iters") + 1] = LONG
    for last, _, said in run_ranks(signalled, 2, argv, signal.SIGUSR2, 0, 3):
        assert last == STEPS
        assert said[0] == f"step {STEPS}: its validation was interrupted and has no result"
    assert (place.folder / "run" / f"step-{STEPS}").is_dir()
    assert [row["step"] for row in metrics_of(place.folder / "run")] == [1, 2, 3, 4]


def before_validation(rank: int, world_size: int, argv: list[str]) -> list[tuple[list[str], int]]:
    """The checkpoints and the number of lines of metrics that exist as each validation begins."""
    run, seen = assembled(rank, world_size, argv), list[tuple[list[str], int]]()

    def told(read: int) -> None:
        if read == 1 or (read - 1) % 4 == 0:
            names = sorted(path.name for path in run.folder.glob("step-*"))
            seen.append((names, len(metrics_of(run.folder))))

    assert run.rows.valid is not None
    rows = cast(RowSource, TellingRows(run.rows.valid, told))
    finish(replace(run, rows=replace(run.rows, valid=rows)))
    return seen


def test_what_is_due_is_written_before_the_validation(place: Place) -> None:
    flags = ["--eval-interval", "2", "--save-interval", "2", "--no-async-save"]
    (seen,) = run_ranks(before_validation, 1, place.argv("run", *flags))
    assert seen == [(["step-2"], 2), (["step-2", "step-4"], 4)]
    rows = metrics_of(place.folder / "run")
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 4]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
