"""Whole runs on the pool of ranks: stop, save, load on any grid, continue."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch.distributed.tensor import DTensor

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import StopRequest
from cp_megatron.data.rows.sampler import RowSource, TokenRow
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid, Mask
from cp_megatron.plan.grid import AXES
from cp_megatron.preflight.check import check
from cp_megatron.train.loop import DivergedError, Trainer
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.run import assemble
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers

STEPS, STOP = 4, 2
WORDS = ["three", "blind", "mice", "see", "how", "they", "run", "after", "a", "wife"]
GRIDS = {
    "tp2 cp2": ["--tensor-parallel-size", "2", "--context-parallel-size", "2"],
    "cp4": ["--tensor-parallel-size", "1", "--context-parallel-size", "4"],
    "tp4": ["--tensor-parallel-size", "4", "--context-parallel-size", "1"],
    "dp4": ["--tensor-parallel-size", "1", "--context-parallel-size", "1"],
    "copies": ["--data-parallel-replicate-size", "2", "--context-parallel-size", "1"],
}
BASE = [
    *("--preset", "toy"),
    *("--num-layers", "1", "--hidden-size", "32", "--lr-warmup-iters", "0"),
    *("--log-interval", "1", "--train-iters", str(STEPS), "--eval-iters", "1", "--device", "cpu"),
    *("--global-batch-size", "4"),
]


class StoppingView(ProgressView):
    """A view that prints nothing, keeps its lines, and can stop the run.

    Lines about slow ranks are kept apart, because any rank may be slow on a busy machine.

    Args:
        last: the last step to train, after a signal in the step before; None trains all.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__(Console(quiet=True), quiet=True, start_step=0, train_iters=STEPS)
        self.stop, self._last = StopRequest(), last
        self.said, self.stragglers = list[str](), list[str]()

    def step_done(self, step: int) -> None:
        if self._last is not None and step == self._last - 1:
            self.stop(15, None)

    def say(self, text: str) -> None:
        is_straggler = re.match(r"step \d+: rank \d+ (is .* late in|computes)", text)
        (self.stragglers if is_straggler else self.said).append(text)


def changed(argv: list[str], *flags: str) -> list[str]:
    """Arguments with other values for flags that they contain: ``--flag value`` pairs."""
    argv = [*argv]
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        argv[argv.index(flag) + 1] = value
    return argv


def finish(run: Trainer, view: StoppingView | None = None) -> int:
    """Trains an assembled run and closes its metrics; returns the last step."""
    view = view or StoppingView()
    try:
        return replace(run, view=view).train(view.stop)
    finally:
        if run.writer is not None:
            run.writer.close()


def assembled(
    rank: int,
    world_size: int,
    argv: list[str],
    again: bool = False,
    axes: tuple[str, ...] = tuple(AXES),
) -> Trainer:
    """A trainer as torchrun's ranks assemble it.

    Args:
        again: the ranks were started again after a failure.
        axes: the names of the grid's axes.
    """
    launch = Launch(
        rank=rank,
        local_rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        under_torchrun=True,
    )
    found = parse_arguments(argv, again=again)
    plan = check(found.config, launch, given=found.given, auto=found.auto).on_device("cpu")
    kept = {"replicas": plan.grid.replicas, "ep": plan.grid.ep}
    plan = replace(plan, grid=Grid(axes=axes, **kept, **plan.grid.sizes))
    world = dist.group.WORLD
    assert world is not None
    return assemble(plan, launch, world)


def train(rank: int, world_size: int, argv: list[str], stop_at: int | None = None) -> int:
    """Trains as the program does, without its output; returns the last step."""
    return finish(assembled(rank, world_size, argv), StoppingView(stop_at))


class LostRows:
    """Rows that cannot be read after the first step."""

    seq_length = 32
    eod = 256

    def __init__(self, rows: RowSource) -> None:
        self._rows = rows

    def __getitem__(self, number: int) -> TokenRow:
        if number >= 4:
            raise OSError(f"row {number} is gone")
        return self._rows[number]


def lose_rows(rank: int, world_size: int, argv: list[str]) -> tuple[str, list[str]]:
    run = assembled(rank, world_size, argv)
    rows = replace(run.rows, train=cast(RowSource, LostRows(run.rows.train)))
    with pytest.raises(OSError, match="gone") as caught:
        finish(replace(run, rows=rows))
    return str(caught.value), [thread.name for thread in threading.enumerate()]


def test_an_error_while_a_step_is_prepared_ends_the_training(place: Place) -> None:
    ((error, threads),) = run_ranks(lose_rows, 1, place.argv("lost"))
    assert error == "row 4 is gone"
    assert not [name for name in threads if name.startswith("ahead")]
    assert [row["step"] for row in metrics_of(place.folder / "lost")] == [1]


def masks_of(rank: int, world_size: int, argv: list[str]) -> list[Mask]:
    """The masks of the plan, of the first batch and of the training step."""
    run = assembled(rank, world_size, argv)
    if run.writer is not None:
        run.writer.close()
    batch = next(run.batches(run.rows.train, 0))
    return [run.plan.sequence.mask, run.train_step.prepare(batch).cp.mask, run.train_step.cp.mask]


def test_batches_have_the_mask_of_the_plan(place: Place) -> None:
    words = ["--seq-length", "30", "--pad-rows", "--window-size", "5", "0"]
    words += ["--context-parallel-size", "2"]
    for promised, batch, train_step in run_ranks(masks_of, 2, place.argv("run", *words)):
        assert promised == batch == train_step == Mask.documents([30, 2], window=(5, 0))


def save_again(rank: int, world_size: int, argv: list[str]) -> None:
    """Loads a checkpoint and saves it again at once."""
    run = assembled(rank, world_size, argv)
    run._save(run.plan.load_step, last=True)


@dataclass(frozen=True)
class Place:
    """The folder of a test, and the flags that its runs have in common."""

    folder: Path

    def argv(self, save: str, *flags: str) -> list[str]:
        words = ["--data-path", str(self.folder / "text.txt"), "--save", self.run(save)]
        for flag, value in (("--micro-batch-size", "1"), ("--seq-length", "32")):
            words += [] if flag in flags else [flag, value]
        base = BASE[2:] if "--preset" in flags else BASE
        return [*base, *words, *flags]

    def run(self, name: str) -> str:
        return str(self.folder / name)

    def load(self, name: str, *flags: str) -> list[str]:
        return ["--load", self.run(name), *flags]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    lines = (" ".join(WORDS[i % 7 :] + WORDS[: i % 3]) for i in range(100))
    (tmp_path / "text.txt").write_text("\n".join(lines))
    return Place(tmp_path)


def test_the_same_grid_continues_bit_for_bit_with_dropout(place: Place) -> None:
    flags = [*GRIDS["tp2 cp2"], "--sequence-parallel", "--hidden-dropout", "0.2"]
    flags += ["--attention-dropout", "0.1"]
    assert run_ranks(train, 4, place.argv("whole", *flags)) == [STEPS] * 4
    assert run_ranks(train, 4, place.argv("cut", *flags), STOP) == [STOP] * 4
    assert run_ranks(train, 4, place.load("cut")) == [STEPS] * 4
    one, other = place.folder / "whole", place.folder / "cut"
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))
    assert (other / f"step-{STOP}").is_dir()


@pytest.mark.parametrize(
    ("dtype", "bound", "grids"),
    [
        ("float64", 1e-10, [(4, "cp4"), (1, "dp4"), (4, "copies")]),
        pytest.param(
            "float32",
            1e-6,
            [(4, "cp4"), (4, "tp4"), (4, "dp4"), (1, "dp4")],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_any_grid_continues(
    place: Place, dtype: str, bound: float, grids: list[tuple[int, str]]
) -> None:
    flags = ["--dtype", dtype, *GRIDS["tp2 cp2"], "--hidden-dropout", "0.1"]
    run_ranks(train, 4, place.argv("whole", *flags))
    run_ranks(train, 4, place.argv("cut", *flags), STOP)
    expected = metrics_of(place.folder / "whole")[STOP:]
    step = place.folder / "cut" / f"step-{STOP}"
    for world_size, name in grids:
        load = ["--load", str(step), *GRIDS[name], "--save"]
        again, on = f"again {name} {world_size}", f"on {name} {world_size}"
        run_ranks(save_again, world_size, [*load, place.run(again)])
        assert differing(step, place.folder / again / step.name) == [], name
        assert run_ranks(train, world_size, [*load, place.run(on)]) == [STEPS] * world_size
        rows = metrics_of(place.folder / on)
        assert [row["step"] for row in rows] == [STOP + 1, STEPS]
        for row, other in zip(rows, expected, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=bound), name
            assert row["lr"] == other["lr"]


def diverge(rank: int, world_size: int, argv: list[str]) -> str:
    with pytest.raises(DivergedError) as caught:
        train(rank, world_size, argv)
    return str(caught.value)


def test_all_ranks_end_alike_after_a_loss_that_is_not_finite(place: Place) -> None:
    flags = ["--context-parallel-size", "2", "--lr", "1e30", "--skip-budget", "1"]
    one, other = run_ranks(diverge, 2, place.argv("hot", *flags))
    assert one == other
    assert re.match(
        r"step 3: loss \S+, gradient norm (nan|inf), 2 steps of 1,000 skipped; its batch is in "
        r"\S+/hot/bad-step-3.safetensors; there is no checkpoint ",
        one,
    )
    assert not list((place.folder / "hot").glob("step-*"))


def break_a_parameter(rank: int, world_size: int, argv: list[str]) -> str:
    run = assembled(rank, world_size, argv)
    if rank == 1:
        with torch.no_grad():
            parameter = next(run.train_step.model.parameters())
            assert isinstance(parameter, DTensor)
            parameter.to_local().view(-1)[0] = math.inf
    with pytest.raises(DivergedError) as caught:
        run._save(1, last=True)
    return str(caught.value)


def test_a_broken_model_is_never_saved(place: Place) -> None:
    argv = place.argv("broken", "--context-parallel-size", "2")
    for error in run_ranks(break_a_parameter, 2, argv):
        assert "a parameter is not finite" in error
    assert not list((place.folder / "broken").glob("step-*"))


def refused(rank: int, world_size: int, argv: list[str]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        assembled(rank, world_size, argv)
    return caught.value


def test_other_data_is_refused_unless_a_flag_allows_it_once(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), STOP)
    (place.folder / "text.txt").write_text("another text, " * 200)
    (error,) = run_ranks(refused, 1, place.load("run"))
    assert error.flag == "--data-path"
    assert "is not the data that" in error.rule
    assert "--allow-data-change" in error.works
    allowed = ["--allow-data-change", "--train-iters", str(STOP + 1)]
    assert run_ranks(train, 1, place.load("run", *allowed)) == [STOP + 1]
    assert "allow_data_change: true" not in (place.folder / "run" / "config.yaml").read_text()
    assert run_ranks(train, 1, place.load("run", "--train-iters", str(STEPS))) == [STEPS]


@pytest.mark.parametrize(
    ("text", "rule"),
    [(b"other " * 400, "ranks [1] read different data"), (b"ok" * 40000 + b"\0", "")],
)
def test_a_rank_that_reads_other_data_ends_all(place: Place, text: bytes, rule: str) -> None:
    (place.folder / "other.txt").write_bytes(text)
    argv = [*BASE, "--save", place.run("run"), "--context-parallel-size", "2"]
    here, there = (str(place.folder / name) for name in ("text.txt", "other.txt"))
    errors = run_ranks(load_both, 2, argv, [here, there])
    assert errors[0].rule == errors[1].rule
    assert errors[0].flag == "--data-path"
    assert rule in errors[0].rule


def load_both(rank: int, world_size: int, argv: list[str], paths: list[str]) -> ConfigError:
    return refused(rank, world_size, [*argv, "--data-path", paths[rank]])


def test_old_settings_are_kept_beside_the_new_ones(place: Place) -> None:
    run_ranks(train, 1, place.argv("run"), STOP)
    folder = place.folder / "run"
    before = (folder / "config.yaml").read_text()
    run_ranks(train, 1, place.load("run", "--lr", "0.01"))
    assert (folder / f"config-step-{STOP}.yaml").read_text() == before
    assert "lr: 0.01" in (folder / "config.yaml").read_text()


def test_checkpoints_and_validations_at_their_intervals(place: Place) -> None:
    run_ranks(train, 1, place.argv("run", "--save-interval", "2", "--eval-interval", "2"))
    folder = place.folder / "run"
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4"]
    rows = metrics_of(folder)
    assert [row["step"] for row in rows if "valid_loss" in row] == [2, 4]
    assert rows[-1]["valid_loss"] < rows[1]["valid_loss"]


KINDS = {
    "documents": ["--document-mask", "--micro-batch-size", "2"],
    "bfloat16, full": ["--recompute-granularity", "full", "--bf16"],
    "selective": ["--recompute-granularity", "selective", "--document-mask"],
    "a2a, padded, window": [
        *("--cp-comm-type", "a2a", "--seq-length", "31", "--window-size", "9,0"),
        *("--pad-rows", "--deterministic", "--no-cp-check-ranks"),
    ],
    "gpt": ["--preset", "toy-gpt", "--tensor-parallel-size", "2"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_learns_and_continues(place: Place, kind: str) -> None:
    grid = [] if kind == "gpt" else ["--context-parallel-size", "2"]
    run_ranks(train, 2, place.argv("run", *grid, *KINDS[kind]), STOP)
    assert run_ranks(train, 2, place.load("run")) == [STEPS] * 2
    rows = metrics_of(place.folder / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    losses = [row["loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.15
