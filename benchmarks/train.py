"""How fast is a training step, how much of it is mathematics, and what does it hold?

Trains one model (6 layers of 512 by default, float32, AdamW, clipping) on one row a step in
different ways, which run in turns, in a new random order in every round. Ours runs in processes of
its own, which keep freed memory as the launcher lets them:

- ``ours`` on one process with two threads, and ``ours lean`` with full recomputation, tiles, small
  chunks of the loss, and offloading;
- ``ours compiled``, only if it is named by ``--only``: ``ours`` with ``--compile``;
- ``ours cp2``, ``ours tp2`` and ``ours tp2 cp2`` on 2, 2 and 4 ranks with one thread each;
- ``transformers``: its model with scaled_dot_product_attention and fused AdamW, no checkpointing;
  with ``--num-experts`` its Qwen3-MoE, once with its experts ``eager`` and once ``grouped_mm``, its
  default (``batched_mm`` copies the weights of an expert for each of its rows, gigabytes a layer);
- ``plain``: the least that a loop over PyTorch's modules does (``harness/plain.py``);
- ``before`` and ``before cp2``, ``before tp2``, ``before tp2 cp2`` with ``--before``: ours of
  another checkout of this project, whose own ``benchmarks/harness`` makes the step.

Prints one JSON line per row length and way, with the hardware:

- ``tokens_per_second``, from the median time of a step;
- ``speed_over_...``: the median and quartiles, over rounds, of this way's speed divided by that of
  ``ours``, ``transformers`` or, with ``--before``, the same way before;
- ``gemm`` and ``attention``: their shares of a profiled step, as the mean over ranks;
- ``peak_mib``: the most bytes that the fullest rank holds while the model is built and makes two
  steps.

``--profile 12`` also prints, to stderr, the 12 other ops that take the most time.

    python benchmarks/train.py                                      # a quarter of an hour
    python benchmarks/train.py --tokens 2048 --rounds 5 --only ours transformers --profile 20
    git worktree add ../before 7a4af13
    python benchmarks/train.py --before ../before
    python benchmarks/train.py --tokens 2048 --only ours ours-compiled
    python benchmarks/train.py --num-experts 64 --moe-router-topk 8 --tokens 2048 --num-layers 4 \\
        --hidden-size 256 --moe-ffn-hidden-size 128 --only ours transformers
    python benchmarks/train.py --quick                              # seconds
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch.distributed as dist
from harness.steps import Job, OurStep, TheirStep, llama_shape, peak_of
from harness.teams import Place, Team, hardware, measure, paired

from cp_megatron.config import MemoryConfig
from cp_megatron.config.words import read_options
from cp_megatron.plan import Grid

# The harness of an older checkout finds here what it does not have itself.
harness.__path__.append(str(Path(__file__).resolve().parent / "harness"))

MIB = 1 << 20
LEAN = MemoryConfig(
    recompute_granularity="full", mlp_tile_size=512, loss_chunk_size=256, cpu_offloading=True
)
GRIDS: Mapping[str, Grid] = {
    "ours": Grid(dp=1, cp=1, tp=1),
    "ours cp2": Grid(dp=1, cp=2, tp=1),
    "ours tp2": Grid(dp=1, cp=1, tp=2),
    "ours tp2 cp2": Grid(dp=1, cp=2, tp=2),
}
ALONE = Grid(dp=1, cp=1, tp=1)
WAYS = (*GRIDS, "ours lean", "transformers", "plain")
THEIR_EXPERTS = ("eager", "grouped_mm")
QUICK = ("ours", "plain")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Training steps of this project, of transformers and of a plain loop."""

    tokens: tuple[int, ...] = (2048, 8192)
    """Tokens per row."""
    num_layers: int = 6
    """Layers."""
    hidden_size: int = 512
    """Width of the model."""
    ffn_hidden_size: int = 1408
    """Width of the MLPs."""
    num_attention_heads: int = 8
    """Query heads."""
    num_query_groups: int = 4
    """Key and value heads."""
    vocab_size: int = 8192
    """Size of the vocabulary. Embedding and output layer share their weights."""
    num_experts: int | None = None
    """Train a Qwen3-MoE with this many experts per layer."""
    moe_router_topk: int = 8
    """Experts that compute a token."""
    moe_ffn_hidden_size: int = 128
    """Width of an expert."""
    only: tuple[str, ...] = ()
    """The ways to measure, with "-" for each space: ours, ours-cp2, plain. By default all."""
    before: str | None = None
    """Another checkout of this project to compare with."""
    rounds: int = 9
    """Measured rounds."""
    warmup: int = 2
    """Rounds before the first measured one."""
    profile: int = 0
    """Print this many of the ops that are neither GEMM nor attention, to stderr."""
    peak: bool = True
    """Measure the peaks of memory."""
    shares: bool = True
    """Profile two steps of each way."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


class Bench:
    """Answers the parent's questions in each process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.steps: dict[str, Any] = {}

    def make(self, question: tuple[str, Job]) -> Any:
        """A trainer, with ``run``."""
        way, job = question
        if way.startswith("transformers"):
            experts = way.partition(" ")[2] or None
            return TheirStep(job, checkpointing=False, experts=experts)
        if way == "plain":
            from harness.plain import PlainStep

            return PlainStep(job)
        return OurStep(job)

    def prepare(self, questions: list[tuple[str, Job]]) -> None:
        """Builds the models and their rows, in place of those of an earlier call."""
        self.steps.clear()
        self.steps.update((way, self.make((way, job))) for way, job in questions)

    def time(self, way: str) -> tuple[float, float]:
        """Times at which a step began and ended."""
        if self.place.size > 1:
            dist.barrier()
        begin = time.monotonic()
        self.steps[way].run()
        return begin, time.monotonic()

    def profile(self, way: str) -> Any:
        """Where the time of a step is."""
        from harness.profiling import profiled

        return profiled(self.steps[way].run, steps=2)

    def peak(self, question: tuple[str, Job]) -> int:
        """The most bytes that a trainer of its own holds at once."""
        return peak_of(lambda job: self.make((question[0], job)), question[1])


@contextmanager
def packages_of(checkout: Path | None) -> Iterator[None]:
    """Processes that are started inside import this project's packages from ``checkout``."""
    held = list(sys.path)
    if checkout is not None:
        sys.path[:0] = [str(checkout / "benchmarks"), str(checkout)]
    try:
        yield
    finally:
        sys.path[:] = held


def jobs_of(arguments: Arguments) -> dict[str, Job]:
    """The job of each way that is measured."""
    model = llama_shape(
        num_layers=arguments.num_layers,
        hidden=arguments.hidden_size,
        ffn=arguments.ffn_hidden_size,
        heads=arguments.num_attention_heads,
        kv_heads=arguments.num_query_groups,
    )
    chosen = [way.replace("-", " ") for way in arguments.only] or [*WAYS]
    if arguments.num_experts is not None:
        model = replace(
            model,
            qk_layernorm=True,
            num_experts=arguments.num_experts,
            moe_router_topk=arguments.moe_router_topk,
            moe_ffn_hidden_size=arguments.moe_ffn_hidden_size,
        )
        chosen = [way for way in chosen if way != "plain"]
        if "transformers" in chosen:
            chosen.remove("transformers")
            chosen += [f"transformers {way}" for way in THEIR_EXPERTS]
    job = Job(model=model, vocab_size=arguments.vocab_size, tokens=0)
    jobs = {way: replace(job, grid=GRIDS.get(way, ALONE)) for way in chosen}
    if "ours compiled" in jobs:
        jobs["ours compiled"] = replace(jobs["ours compiled"], compiled=True)
    if "ours lean" in jobs:
        jobs["ours lean"] = replace(jobs["ours lean"], memory=LEAN)
    if arguments.before:
        ours = [way for way in chosen if way.startswith("ours")]
        jobs |= {way.replace("ours", "before"): jobs[way] for way in ours}
    return jobs


def teams_of(jobs: Mapping[str, Job], before: Path | None) -> dict[str, Team]:
    """For each way the team that runs it: one per number of ranks and kind of way."""
    from harness.launched import as_launched  # what an older checkout cannot import

    teams: dict[tuple[int, str], Team] = {}
    result = {}
    for way, job in jobs.items():
        size, kind = job.grid.world_size, way.split()[0]
        if (size, kind) not in teams:
            with packages_of(before if kind == "before" else None):
                enter = as_launched if kind == "ours" else None
                teams[size, kind] = Team(size, 2 if size == 1 else 1, Bench, enter)
        result[way] = teams[size, kind]
    return result


def results(
    arguments: Arguments, jobs: Mapping[str, Job], teams: Mapping[str, Team]
) -> Iterator[dict[str, object]]:
    """One result per way, for rows of one length."""
    for team in {id(team): team for team in teams.values()}.values():
        team.ask("prepare", [(way, jobs[way]) for way in jobs if teams[way] is team])
    seconds = measure(teams, arguments.rounds, arguments.warmup)
    for way, job in jobs.items():
        median = statistics.median(seconds[way])
        line: dict[str, object] = {"way": way, "ranks": job.grid.world_size}
        line |= {"milliseconds": round(median * 1e3, 2)}
        line |= {"tokens_per_second": round(job.tokens / median, 1)}
        theirs = (name for name in jobs if name.startswith("transformers"))
        for other in ("ours", *theirs, way.replace("ours", "before")):
            if other in seconds and other != way:
                name = "before" if other.startswith("before") else other
                line[f"speed_over_{name.replace(' ', '_')}"] = paired(seconds[other], seconds[way])
        if arguments.shares:
            line |= shares(way, teams[way], arguments.profile)
        if arguments.peak:
            line |= {"peak_mib": round(max(teams[way].ask("peak", (way, job))) / MIB, 1)}
        yield line


def shares(way: str, team: Team, rows: int) -> dict[str, object]:
    """The shares of GEMM and attention; prints the other ops if ``rows`` are wanted."""
    from harness.profiling import mean_profile, table

    step = mean_profile(team.ask("profile", way))
    if rows:
        print(table(way, step, rows), file=sys.stderr, flush=True)
    gemm, attention = step.gemm / step.wall, step.attention / step.wall
    return {
        "gemm": round(gemm, 4),
        "attention": round(attention, 4),
        "gemm_and_attention": round(gemm + attention, 4),
    }


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    if arguments.quick:
        sizes = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 128, "vocab_size": 128}
        arguments = replace(arguments, tokens=(64,), rounds=2, warmup=1, **sizes)  # type: ignore[arg-type]
        arguments = replace(arguments, only=arguments.only or QUICK)
    machine = hardware()
    jobs = jobs_of(arguments)
    before = Path(arguments.before).resolve() if arguments.before else None
    teams = teams_of(jobs, before)
    for tokens in arguments.tokens:
        shape = {way: replace(job, tokens=tokens) for way, job in jobs.items()}
        for line in results(arguments, shape, teams):
            head = {"benchmark": "train", "tokens": tokens, "rounds": arguments.rounds}
            print(json.dumps({**head, **line, "hardware": machine}), flush=True)
    for team in {id(team): team for team in teams.values()}.values():
        team.close()


if __name__ == "__main__":
    main()
