"""Steps, rows and tokens of runs that go on with other rows or batches, or are counted in rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from cp_megatron.errors import ConfigError
from tests.ranks import run_ranks
from tests.train.checkpoints import metrics_of
from tests.train.test_loop import STEPS, STOP, Place, assembled, place, train

__all__ = ["place"]  # the fixture
BATCH, LENGTH = 4, 32


def rows_of(rank: int, world_size: int, argv: list[str]) -> list[range]:
    """The numbers of the rows of every step of a run, which is not trained."""
    run = assembled(rank, world_size, argv)
    if run.writer is not None:
        run.writer.close()
    steps = range(run.plan.load_step + 1, run.plan.last_step + 1)
    return [run.plan.rows_of(step) for step in steps]


def tokens_of(folder: Path) -> list[int]:
    return [row["tokens"] for row in metrics_of(folder)]


def test_tokens_count_what_was_trained_when_the_row_length_changes(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), STOP)
    run_ranks(train, 1, place.load("run", "--seq-length", "64"))
    per_step = BATCH * LENGTH
    expected = [per_step, 2 * per_step, 2 * per_step + 1 * 2 * per_step, 6 * per_step]
    assert tokens_of(place.folder / "run") == expected
    # The count itself is kept: it cannot be derived from the last row length.
    run_ranks(train, 1, place.load("run", "--seq-length", "32", "--train-iters", "5"))
    assert tokens_of(place.folder / "run") == [*expected, 7 * per_step]


def test_another_batch_size_goes_on_at_the_next_row(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), STOP)
    larger = place.load("run", "--global-batch-size", "6", "--save", place.run("larger"))
    (rows,) = run_ranks(rows_of, 1, larger)
    assert rows == [range(8, 14), range(14, 20)]
    # On two ranks, whose share of four rows was two, three rows each.
    assert run_ranks(train, 2, place.load("run", "--global-batch-size", "6")) == [STEPS] * 2
    tokens = [n * LENGTH for n in (4, 8, 14, 20)]
    assert tokens_of(place.folder / "run") == tokens
    # What follows from a number of steps times a batch size does not hold any more.
    again = place.load("run", "--global-batch-size", "2", "--train-iters", "6")
    assert run_ranks(train, 1, again) == [6]
    assert tokens_of(place.folder / "run") == [*tokens, 22 * LENGTH, 24 * LENGTH]


def advice(rank: int, world_size: int, argv: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        assembled(rank, world_size, argv)
    return caught.value


def test_the_advice_about_a_batch_that_the_ranks_cannot_share_holds(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), STOP)
    error, *_ = run_ranks(advice, 3, place.load("run"))
    assert (error.flag, error.value) == ("--global-batch-size", 4)
    sizes = error.works.split(", ")
    assert sizes == ["3", "6"]
    for size in sizes:
        words = place.load("run", error.flag, size, "--save", place.run(f"with {size}"))
        assert run_ranks(train, 3, words) == [STEPS] * 3
        assert tokens_of(place.folder / f"with {size}")[-1] == (8 + 2 * int(size)) * LENGTH


def test_epochs_end_alike_on_every_rank_and_go_on(place: Place) -> None:
    flags = ["--train-epochs", "0.25", "--context-parallel-size", "2"]
    argv = place.argv("run", *flags)
    at = argv.index("--train-iters")
    argv[at : at + 2] = []
    steps = run_ranks(train, 2, argv)
    load = place.load("run", "--train-epochs", "1", "--save", place.run("on"))
    rows = run_ranks(rows_of, 1, [*load, "--context-parallel-size", "1"])[0]
    whole = 4 * len(rows) + 4 * steps[0]  # the rows of an epoch, rounded up to a batch
    assert steps == [-(-whole // 16)] * 2
