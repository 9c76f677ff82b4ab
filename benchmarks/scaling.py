"""How well does a training step scale, if every rank keeps its number of tokens?

The row grows with the ranks that share it: n ranks train a row of n times ``--tokens``, by context
parallelism (``cp``) or by tensor and sequence parallelism (``tp``), one thread a rank. One process
with one thread trains the same rows, in turns with them. Attention grows with the square of the
row, so what is compared is a step of the same row, not the tokens per second of different rows.

Prints one JSON line per axis and number of ranks, with the hardware:

- ``tokens_per_second`` and the FLOP/s of each rank, from the median time of a step;
- ``speedup``: the step's time on one process divided by that on n ranks, paired;
- ``cpu_seconds_per_token``: of all ranks together;
- ``efficiency``: the CPU seconds of one process divided by those of all ranks, paired. It does not
  depend on the number of cores; the speed-up divided by n does.

``shares_cores`` says that there are more ranks than cores: they take turns, and times then say
nothing about scaling.

    python benchmarks/scaling.py            # minutes
    python benchmarks/scaling.py --quick    # seconds
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch.distributed as dist
from harness.launched import as_launched
from harness.steps import Job, OurStep, llama_shape
from harness.teams import PAUSE, Place, Team, hardware, paired

from cp_megatron.config.words import read_options
from cp_megatron.plan import Grid
from cp_megatron.spec import ModelSpec

MODEL = llama_shape(num_layers=4, hidden=512, ffn=1408, heads=8, kv_heads=4)
SMALL = llama_shape(num_layers=1, hidden=64, ffn=128, heads=4, kv_heads=4)
VOCAB = 8192


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Training steps with a fixed number of tokens on each rank."""

    tokens: int = 512
    """Tokens of a rank."""
    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of ranks."""
    rounds: int = 7
    """Measured rounds."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


@dataclass(kw_only=True)
class Bench:
    """Answers the parent's questions in each process."""

    place: Place
    steps: dict[str, OurStep] = field(default_factory=dict)
    cpu_seconds: float = 0.0

    def prepare(self, jobs: dict[str, Job]) -> None:
        """Builds the models and their rows."""
        self.steps = {name: OurStep(job) for name, job in jobs.items()}

    def time(self, name: str) -> tuple[float, float]:
        """Times at which a step began and ended."""
        if self.place.size > 1:
            dist.barrier()
        begin, cpu = time.monotonic(), time.process_time()
        self.steps[name].run()
        self.cpu_seconds = time.process_time() - cpu
        return begin, time.monotonic()

    def cpu(self, _: object) -> float:
        """CPU seconds of this process in the step before, over all its threads."""
        return self.cpu_seconds


def bench(place: Place) -> Bench:
    """Runs in each process."""
    return Bench(place=place)


def jobs_of(arguments: Arguments) -> dict[str, Job]:
    """A job for each way: the axis, or ``one`` process, and the number of ranks."""
    model = SMALL if arguments.quick else MODEL
    jobs = {}
    for size in arguments.ranks:
        job = Job(model=model, vocab_size=VOCAB, tokens=arguments.tokens * size)
        grids = {"one": Grid(dp=1, cp=1, tp=1)}
        if size > 1:
            grids |= {"cp": Grid(dp=1, cp=size, tp=1), "tp": Grid(dp=1, cp=1, tp=size)}
        for axis, grid in grids.items():
            jobs[f"{axis} {size}"] = replace(job, grid=grid)
    return jobs


def measured(
    teams: Mapping[str, Team], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds on the clock, and CPU seconds of all ranks, per way and round."""
    order, shuffle = [*teams], random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in teams}
    cpu: dict[str, list[float]] = {name: [] for name in teams}
    for round_ in range(rounds + 1):
        shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            elapsed, used = teams[name].seconds(name), sum(teams[name].ask("cpu", None))
            if round_:  # the first one allocates and plans
                seconds[name].append(elapsed)
                cpu[name].append(used)
    return seconds, cpu


def results(jobs: Mapping[str, Job], rounds: int, cores: int) -> Iterator[dict[str, object]]:
    """One result per way."""
    sizes = {job.grid.world_size for job in jobs.values()}
    by_size = {size: Team(size, 1, bench, as_launched) for size in sorted(sizes)}
    teams = {name: by_size[job.grid.world_size] for name, job in jobs.items()}
    for team in by_size.values():
        team.ask("prepare", {name: jobs[name] for name in jobs if teams[name] is team})
    seconds, cpu = measured(teams, rounds)
    for team in by_size.values():
        team.close()
    for name, job in jobs.items():
        axis, size = name.split()
        alone, ranks = f"one {size}", job.grid.world_size
        median = statistics.median(seconds[name])
        spec = ModelSpec.of(job.model, vocab_size=job.vocab_size, seq_length=job.tokens)
        flops = spec.training_flops(num_tokens=job.tokens, num_pairs=job.mask.pairs())
        line: dict[str, object] = {"axis": axis, "ranks": ranks, "tokens": job.tokens}
        line |= {"shares_cores": ranks > cores, "milliseconds": round(median * 1e3, 1)}
        line |= {"tokens_per_second": round(job.tokens / median, 1)}
        line |= {"gflops_per_rank": round(flops / median / ranks / 1e9, 2)}
        per_token = statistics.median(cpu[name]) / job.tokens
        line |= {"cpu_seconds_per_token": round(per_token, 8)}
        if name != alone:
            line |= {"speedup": paired(seconds[alone], seconds[name])}
            line |= {"efficiency": paired(cpu[alone], cpu[name])}
        yield line


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    if arguments.quick:
        arguments = Arguments(tokens=32, ranks=(1, 2), rounds=2, quick=True)
    machine = hardware()
    cores = machine["cores"]
    assert isinstance(cores, int)
    for line in results(jobs_of(arguments), arguments.rounds, cores):
        line = {"benchmark": "scaling", "tokens_per_rank": arguments.tokens, **line}
        print(json.dumps({**line, "hardware": machine}), flush=True)


if __name__ == "__main__":
    main()
