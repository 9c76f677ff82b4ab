"""One more axis of size 1 changes no bit of a run, from its plan to its checkpoints."""

from __future__ import annotations

import pytest
from rich.console import Console

from cp_megatron.plan.grid import AXES
from cp_megatron.preflight.start_table import print_start
from tests.model.grids import no_warnings
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.test_loop import GRIDS, STEPS, Place, assembled, finish
from tests.train.test_loop import place as place  # the fixture

MORE = (*AXES, "pp")


def train(rank: int, world_size: int, argv: list[str], axes: tuple[str, ...]) -> str:
    """Trains to the end and returns the start table."""
    run = assembled(rank, world_size, argv, axes=axes)
    console = Console(width=120)
    with console.capture() as table:
        print_start(run.plan, run.folder, console)
    assert run.train_step.groups.meshes.keys() == {*axes, "dp_cp", "world"}
    with no_warnings():  # e.g. that DTensor finds no mesh to reduce the gradient's norm over
        finish(run)
    return table.get()


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["tp2 cp2", "dp4"])
def test_a_run_on_a_grid_with_one_more_axis(place: Place, grid: str) -> None:
    flags = [*GRIDS[grid], "--hidden-dropout", "0.1", "--memory-report", "--check-interval", "2"]
    flags += ["--sequence-parallel"] if grid == "tp2 cp2" else []
    run_ranks(train, 4, place.argv("three", *flags), tuple(AXES))
    table = run_ranks(train, 4, place.argv("four", *flags, "--save-interval", "2"), MORE)[0]
    assert "4 ranks = pp 1 x dp " in table
    assert "rank 1 pp 0 dp " in " ".join(table.split())
    one, other = place.folder / "three", place.folder / "four"
    assert differing(one / f"step-{STEPS}", other / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(one))) == list(map(numbers, metrics_of(other)))
    # The checkpoint loads on a grid without the axis, and training continues with the same bits.
    load = ["--load", str(other / "step-2"), "--save", place.run("on")]
    run_ranks(train, 4, load, tuple(AXES))
    assert differing(one / f"step-{STEPS}", place.folder / "on" / f"step-{STEPS}") == []
