"""Context parallelism against what people did before it: what does a long sequence cost?

Four ranks train the same model on the same two rows a step, float32 over gloo, sequence parallelism
wherever weights are split. Each alternative shares the rows out in its own way:

- ``tp2 cp2``: context parallelism within tensor parallelism;
- ``cp4``: context parallelism alone, weights sharded by FSDP over the same ranks;
- ``tp4``: tensor and sequence parallelism alone;
- ``tp2 full``: two data parallel pairs, every layer recomputed, which is how a row that does not
  fit was made to fit;
- ``tp2``: the same without recomputation, for scale.

Prints one JSON line per alternative, each with the hardware: the median time of a step and its
ratio to ``tp2 cp2``'s (paired rounds), bytes that the fullest rank keeps for backward of one row,
its peak of a step, and the bytes that a rank sends in a step by kind (counted where they reach the
process group; collectives as the ring algorithms send them).

    python benchmarks/alternatives.py            # some minutes on two cores
    python benchmarks/alternatives.py --quick    # tiny, seconds; the numbers mean nothing
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass, replace

import torch.distributed as dist
from harness.steps import Job, OurStep, peak_of
from harness.teams import Place, Team, hardware, measure, paired

from cp_megatron.config import MemoryConfig, ModelConfig
from cp_megatron.config.words import read_options
from cp_megatron.plan import Grid

MIB = 1 << 20
RANKS = 4
FULL = MemoryConfig(recompute_granularity="full")
ALTERNATIVES = {
    "tp2 cp2": (Grid(dp=1, cp=2, tp=2), MemoryConfig()),
    "cp4": (Grid(dp=1, cp=4, tp=1), MemoryConfig()),
    "tp4": (Grid(dp=1, cp=1, tp=4), MemoryConfig()),
    "tp2 full": (Grid(dp=2, cp=1, tp=2), FULL),
    "tp2": (Grid(dp=2, cp=1, tp=2), MemoryConfig()),
}
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=512,
    ffn_hidden_size=1408,
    num_attention_heads=8,
    num_query_groups=4,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Ways to share a long row out over four ranks."""

    tokens: int = 4096
    """Of a row."""
    rounds: int = 7
    """Measured rounds."""
    quick: bool = False
    """Tiny sizes: shows that the script runs, measures nothing."""


class Bench:
    """One process's side."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.steps: dict[str, OurStep] = {}

    def prepare(self, jobs: dict[str, Job]) -> None:
        """Builds what is timed and counted."""
        self.steps = {name: OurStep(job) for name, job in jobs.items()}

    def time(self, name: str) -> tuple[float, float]:
        """When a step began and ended."""
        dist.barrier()
        begin = time.monotonic()
        self.steps[name].run()
        return begin, time.monotonic()

    def kept(self, name: str) -> int:
        """Bytes kept for backward of a row."""
        return self.steps[name].kept()

    def traffic(self, name: str) -> dict[str, int]:
        """Bytes sent in a step."""
        return self.steps[name].traffic()

    def peak(self, job: Job) -> int:
        """Most bytes held by a trainer of its own."""
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
    team = Team(RANKS, 1, Bench)
    team.ask("prepare", jobs)
    seconds = measure(dict.fromkeys(jobs, team), rounds, 1)
    kept = {name: max(team.ask("kept", name)) for name in jobs}
    sent = {name: team.ask("traffic", name) for name in jobs}
    team.close()
    for name, job in jobs.items():
        peak = 0
        if not arguments.quick:
            alone = Team(RANKS, 1, Bench)
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
