"""Compares context parallelism with its alternatives: what does a long sequence cost?

Four ranks train the same model on the same two rows per step, in float32 over gloo, with sequence
parallelism wherever weights are split. Each alternative distributes the rows in its own way:

- ``tp2 cp2``: context parallelism within tensor parallelism;
- ``pp2 cp2``: two pipeline stages, each of which shares rows by context parallelism. Each row is a
  micro batch, so stages wait for a third of the time;
- ``cp4``: context parallelism alone, with weights sharded by FSDP over the same ranks;
- ``tp4``: tensor and sequence parallelism alone;
- ``tp2 full``: two data parallel pairs that recompute every layer, the usual way to make a long row
  fit without context parallelism;
- ``tp2``: the same without recomputation, for comparison.

Prints one JSON line per alternative, with the hardware: the median time of a step and its ratio to
that of ``tp2 cp2`` (paired rounds), the bytes that the fullest rank keeps for backward of one row,
its peak in a step, and the bytes that a rank sends in a step by kind of message. Messages are
counted where they reach the process group, collectives as the ring algorithms send them.

    python benchmarks/alternatives.py            # several minutes on two cores
    python benchmarks/alternatives.py --quick    # seconds; tiny sizes, no real times
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch.distributed as dist
from harness.launched import as_launched
from harness.steps import Job, OurStep, llama_shape, peak_of
from harness.teams import Place, Team, hardware, measure, paired

from cp_megatron.config import MemoryConfig
from cp_megatron.config.words import read_options
from cp_megatron.plan import Grid

MIB = 1 << 20
RANKS = 4
FULL = MemoryConfig(recompute_granularity="full")
ALTERNATIVES = {
    "tp2 cp2": (Grid(dp=1, cp=2, tp=2), MemoryConfig()),
    "pp2 cp2": (Grid(pp=2, cp=2), MemoryConfig()),
    "cp4": (Grid(dp=1, cp=4, tp=1), MemoryConfig()),
    "tp4": (Grid(dp=1, cp=1, tp=4), MemoryConfig()),
    "tp2 full": (Grid(dp=2, cp=1, tp=2), FULL),
    "tp2": (Grid(dp=2, cp=1, tp=2), MemoryConfig()),
}
MODEL = llama_shape(num_layers=4, hidden=512, ffn=1408, heads=8, kv_heads=4)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ways to distribute a long row over four ranks."""

    tokens: int = 4096
    """Tokens per row."""
    rounds: int = 7
    """Measured rounds."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


class Bench:
    """Answers the parent's questions in each process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.steps: dict[str, OurStep] = {}

    def prepare(self, jobs: dict[str, Job]) -> None:
        """Builds the models and their rows."""
        self.steps = {name: OurStep(job) for name, job in jobs.items()}

    def time(self, name: str) -> tuple[float, float]:
        """Times at which a step began and ended."""
        dist.barrier()
        begin = time.monotonic()
        self.steps[name].run()
        return begin, time.monotonic()

    def kept(self, name: str) -> int:
        """Bytes kept for backward of one row."""
        return self.steps[name].kept()

    def traffic(self, name: str) -> dict[str, int]:
        """Bytes sent in a step, by kind of message."""
        return self.steps[name].traffic()

    def peak(self, job: Job) -> int:
        """The most bytes that a separate trainer holds at once."""
        return peak_of(OurStep, job)


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    tokens, rounds = (64, 2) if arguments.quick else (arguments.tokens, arguments.rounds)
    model = replace(MODEL, hidden_size=64, ffn_hidden_size=128) if arguments.quick else MODEL
    jobs = {
        name: Job(model=model, vocab_size=4096, tokens=tokens, rows=2, grid=grid, memory=memory)
        for name, (grid, memory) in ALTERNATIVES.items()
    }
    machine = hardware()
    team = Team(RANKS, 1, Bench, as_launched)
    team.ask("prepare", jobs)
    seconds = measure(dict.fromkeys(jobs, team), rounds, 1)
    kept = {name: max(team.ask("kept", name)) for name in jobs}
    sent = {name: team.ask("traffic", name) for name in jobs}
    team.close()
    for name, job in jobs.items():
        peak = 0
        if not arguments.quick:
            alone = Team(RANKS, 1, Bench, as_launched)
            peak = max(alone.ask("peak", job))
            alone.close()
        kinds = sorted({kind for rank in sent[name] for kind in rank})
        mean = {kind: sum(rank.get(kind, 0) for rank in sent[name]) / RANKS for kind in kinds}
        line = {
            "benchmark": "alternatives",
            "alternative": name,
            "tokens": tokens,
            "rows": job.rows,
            "seconds": round(statistics.median(seconds[name]), 3),
            "over_tp2_cp2": paired(seconds[name], seconds["tp2 cp2"]),
            "kept_mib": round(kept[name] / MIB, 2),
            "peak_mib": round(peak / MIB, 2),
            "sent_mib": {kind: round(value / MIB, 2) for kind, value in mean.items()},
            "sent_mib_in_all": round(sum(mean.values()) / MIB, 2),
            "hardware": machine,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
