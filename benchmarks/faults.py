"""Measures how much checksums and asynchronous saves slow down a training step.

Trains a model with SmolLM2's proportions in float32, on gloo ranks that share each row. Every round
measures everything once, in random order; results are medians of the ratios of the rounds. Prints
one JSON line per result, with the hardware:

- ``checks``: the time of five steps with ``--check-interval 5`` (parameters summed before and after
  each update, messages of the last step summed and compared) over five steps without;
- ``save``: the time of the steps that begin while a save is under way, its copy included, over as
  many steps without a save. ``save_seconds`` is the time of these steps, and ``copy_seconds`` the
  part of it in which training stands still.

    python benchmarks/faults.py                   # five minutes on two cores
    python benchmarks/faults.py --threads 1 --ranks 1
    python benchmarks/faults.py --quick           # seconds; tiny sizes, no real times
"""

from __future__ import annotations

import atexit
import gc
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from harness.steps import Job, OurStep, model_of
from harness.teams import PAUSE, Place, Team, hardware, paired

from cp_megatron.checkpoint.save import Save, SaveCache, start_save
from cp_megatron.config import Config
from cp_megatron.config.words import read_options
from cp_megatron.faults.checks import Checks, ParameterSums
from cp_megatron.plan import Grid

INTERVAL = 5


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The cost of detecting faults and of saving."""

    ranks: int = 2
    """Ranks that share each row."""
    threads: int = 1
    """Threads of each rank."""
    rounds: int = 15
    """Measured rounds."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Steps that are timed together."""

    begin: float
    end: float
    num_steps: int
    save_seconds: float = 0.0
    copy_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """The time of one step."""
        return (self.end - self.begin) / self.num_steps


class Bench:
    """Answers the parent's questions on each rank."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def prepare(self, job: Job) -> None:
        """Builds the model that every measurement trains further."""
        self.ours, self.save_cache = OurStep(job), SaveCache()
        train_step = self.ours.train_step
        world = dist.group.WORLD
        assert world is not None
        self.checks = Checks(
            interval=INTERVAL,
            parameters=ParameterSums(train_step.model.named_parameters()),
            links=train_step.cp.link_sums,
            stages=train_step.links,
            tied=train_step.model.spec.head.tied,
            groups=train_step.groups,
            control=world,
            device=train_step.device,
        )
        self.plain = train_step
        gc.collect()
        gc.freeze()  # as the trainer does
        atexit.register(gc.unfreeze)
        self.checked = replace(train_step, sums=self.checks.parameters)

    def block(self, asked: tuple[str, int, str]) -> Block:
        """Runs (what to measure, number of steps, folder to save in)."""
        what, num_steps, folder = asked
        dist.barrier()
        if what in ("save", "alone"):
            return self._save(Path(folder), num_steps if what == "alone" else None)
        self.ours.train_step = self.checked if what == "checks" else self.plain
        self.checks.parameters.take()
        begin = time.perf_counter()
        for step in range(1, num_steps + 1):
            if what == "checks":
                self.checks.begin(step)
            self.ours.run()
            if what == "checks" and self.checks.due(step):
                assert self.checks.find(step) is None
        return Block(begin=begin, end=time.perf_counter(), num_steps=num_steps)

    def _save(self, folder: Path, alone: int | None) -> Block:
        """Makes steps until a save has ended; if ``alone`` is given, that many without a save."""
        self.ours.train_step = self.plain
        begin = time.perf_counter()
        save = None if alone else self._start_save(folder)
        copied = time.perf_counter()
        num_steps = 0
        while True:
            self.ours.run()
            num_steps += 1
            # All ranks stop after the same step: the run's loss is a message between them.
            over = [None] * self.place.size
            dist.all_gather_object(over, save.ended if save else num_steps == alone)
            if all(over):
                break
        end = time.perf_counter()
        if save:
            save.wait()
        return Block(
            begin=begin,
            end=end,
            num_steps=num_steps,
            save_seconds=end - begin,
            copy_seconds=copied - begin,
        )

    def _start_save(self, folder: Path) -> Save:
        return start_save(
            folder,
            step=1,
            consumed=1,
            model=self.plain.model,
            optimizer=self.plain.optimizer,
            config=Config(),
            grid=self.ours.job.grid,
            data_fingerprint="",
            vocab_size=self.ours.job.vocab_size,
            cache=self.save_cache,
            process_group=dist.group.WORLD if self.place.size == 1 else self._second_group(),
        )

    def _second_group(self) -> dist.ProcessGroup:
        if not hasattr(self, "_group"):
            self._group = dist.new_group(backend="gloo")
        assert self._group is not None
        return self._group


def job_of(arguments: Arguments) -> Job:
    return Job(
        model=model_of(2, 3) if arguments.quick else model_of(4, 8),
        vocab_size=512 if arguments.quick else 8192,
        tokens=64 if arguments.quick else 1024 * arguments.ranks,
        grid=Grid(dp=1, cp=arguments.ranks, tp=1),
    )


def measured(team: Team, rounds: int) -> dict[str, list[Block]]:
    """The slowest rank's block of every measurement in every round."""
    names = ["plain", "checks", "save", "alone"]
    found: dict[str, list[Block]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    beside = 1
    for round_ in range(rounds + 1):
        shuffle(names)
        for name in names:
            time.sleep(PAUSE)
            folder = tempfile.mkdtemp()
            blocks = team.ask("block", (name, beside if name == "alone" else INTERVAL, folder))
            shutil.rmtree(folder)
            beside = blocks[0].num_steps if name == "save" else beside
            if round_:  # the first one warms up
                found[name].append(max(blocks, key=lambda block: block.end - block.begin))
    return found


def main() -> None:
    """Prints a line per result."""
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    team = Team(arguments.ranks, arguments.threads, Bench)
    job = job_of(arguments)
    team.ask("prepare", job)
    found = measured(team, 2 if arguments.quick else arguments.rounds)
    team.close()
    seconds = {name: [block.step_seconds for block in blocks] for name, blocks in found.items()}
    about = {"ranks": arguments.ranks, "threads": arguments.threads, "hardware": hardware()}
    middle = statistics.median
    for name in ("checks", "save"):
        line: dict[str, object] = {"benchmark": "faults", "result": name}
        without = seconds["alone" if name == "save" else "plain"]
        line |= {"step_seconds": round(middle(without), 4)}
        line |= {"time": paired(seconds[name], without)}
        if name == "save":
            saves = found["save"]
            line |= {"num_steps": middle(block.num_steps for block in saves)}
            line |= {"save_seconds": round(middle(block.save_seconds for block in saves), 3)}
            line |= {"copy_seconds": round(middle(block.copy_seconds for block in saves), 3)}
        print(json.dumps({**line, **about}), flush=True)


if __name__ == "__main__":
    main()
