"""A long run whose ranks are killed thirty times ends, bit for bit, like an undisturbed run.

A random rank is killed at a random time: while it imports torch, while ranks connect, in a step, in
a save.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.launch.test_end_to_end import Program
from tests.launch.test_faults import all_gone, processes, start
from tests.train.checkpoints import differing, metrics_of, numbers

KILLS = 30
LONGEST_LIFE = 14.0
"""Seconds, most of which a start takes on two cores."""
STEPS, SAVED = 2000, 10
MOST_STEPS = STEPS // (KILLS + 10)
"""Steps between two kills, so that the run outlasts all kills on a machine of any speed."""
MINUTES = 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("to be or not to be, that is the question\n" * 300)
    return tmp_path


def ranks_of(save: str) -> list[int]:
    """The process ids of a run's ranks, without torchrun."""
    lines = [line for line in processes(save) if "torchrun" not in line]
    return [int(line.split()[0]) for line in lines]


def lives(program: Program, save: str) -> Iterator[list[int]]:
    """The process ids of the ranks after each start, as soon as both run."""
    before: set[int] = set()
    while program.process.poll() is None:
        pids = ranks_of(save)
        if len(pids) == 2 and not before & set(pids):
            before = set(pids)
            yield pids
        time.sleep(0.05)


def last_step(run: Path) -> int:
    rows = metrics_of(run) if (run / "metrics.jsonl").exists() else []
    return rows[-1]["step"] if rows else 0


def kill_again_and_again(program: Program, run: Path) -> list[int]:
    """The last step that was logged before each kill."""
    random, killed = Random(5), list[int]()
    for pids in lives(program, "run"):
        if len(killed) == KILLS:
            break
        until = time.monotonic() + random.uniform(0, LONGEST_LIFE)
        most = last_step(run) + random.randint(1, MOST_STEPS)
        while time.monotonic() < until and last_step(run) < most:
            time.sleep(0.05)
        time.sleep(random.uniform(0, 0.1))
        if program.process.poll() is not None:
            break
        os.kill(random.choice(pids), signal.SIGKILL)
        killed.append(last_step(run))
    return killed


@pytest.mark.slow
@pytest.mark.timeout(3 * 60 * MINUTES)
def test_thirty_kills_at_any_time(folder: Path) -> None:
    flags = ["--keep-latest-k", "2"]
    launcher = ["--max-restarts", str(KILLS + 5)]
    program = start(folder, "run", *flags, steps=STEPS, torchrun=launcher, save_interval=SAVED)
    try:
        killed = kill_again_and_again(program, folder / "run")
        assert program.process.wait(60 * MINUTES) == 0, (folder / "err.txt").read_text()[-4000:]
    finally:
        program.process.kill()
    print(f"killed after steps {killed}")
    assert len(killed) == KILLS, "it was over before all its kills"
    assert all_gone("run", 5)
    whole = start(folder, "whole", *flags, steps=STEPS, save_interval=SAVED)
    assert whole.process.wait(60 * MINUTES) == 0
    last = f"step-{STEPS}"
    assert differing(folder / "whole" / last, folder / "run" / last) == []
    one, other = metrics_of(folder / "whole"), metrics_of(folder / "run")
    assert [numbers(row) for row in one] == [numbers(row) for row in other]
    assert len(one) == STEPS
    damaged = [path.name for path in (folder / "run").iterdir() if "damaged" in path.name]
    assert damaged == []
