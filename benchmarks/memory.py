"""Measures the memory of a token, and the time that saving memory costs.

Bytes are counted, not sampled: every allocation of torch's CPU allocator, and every tensor that
autograd keeps. Models have the proportions of SmolLM2-135M (a vocabulary of 85 x hidden, three
query heads per key/value head) and compute in float32. Prints one JSON line per result, with the
hardware:

- ``kept``: the bytes that a rank keeps for backward, per token of the row and layer, over 4 x
  hidden, for every ``--recompute-granularity`` on several grids (a layer is the difference of two
  models);
- ``loss``: the peak of output layer and loss, forward and backward, for 32K tokens and a vocabulary
  of 128K, over the size of all logits;
- ``longest``: the longest row that trains within ``--budget`` MiB per rank (weights, gradients,
  AdamW and everything else), for transformers with its own gradient checkpointing in one process,
  and for ours with full recomputation, tiles and offloading on one, two and four context parallel
  ranks. Memory grows linearly only for rows that are long enough (for shorter ones the peak is in
  the optimizer's step), so the row that a line predicts is trained for two steps, until one fits
  and leaves at most 2%;
- ``cost``: paired step times with and without each option, for sizes where matrices dominate.

    python benchmarks/memory.py                  # an hour on two cores
    python benchmarks/memory.py --only cost
    python benchmarks/memory.py --only longest --plot longest.png
    python benchmarks/memory.py --quick          # seconds; tiny sizes, no real times
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from harness.steps import Job, OurStep, TheirStep, model_of, peak_of, peak_of_loss
from harness.teams import Place, Team, hardware, measure, paired

from cp_megatron.config import MemoryConfig
from cp_megatron.config.words import read_options
from cp_megatron.plan import Grid

MIB = 1 << 20
CLOSE = 0.99
"""The share of the budget to aim at: a message that gloo's threads release late takes 0.6%."""
TRIES = 4
FULL = MemoryConfig(recompute_granularity="full")
LEAN = MemoryConfig(
    recompute_granularity="full", mlp_tile_size=512, loss_chunk_size=256, cpu_offloading=True
)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The memory of a training step."""

    only: Literal["all", "kept", "loss", "longest", "cost"] = "all"
    """Which question to answer."""
    budget: int = 256
    """MiB per rank for the longest row."""
    trained_ranks: int = 4
    """The longest row is trained on up to this many ranks; on more it is computed from two rows."""
    rounds: int = 9
    """Measured rounds of the cost."""
    plot: str | None = None
    """Draw the longest rows into this file, as PNG or SVG."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


class Bench:
    """Answers the parent's questions in each process."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.steps: dict[str, OurStep] = {}

    def kept(self, job: Job) -> int:
        """Bytes that this rank keeps for backward."""
        return OurStep(job).kept()

    def peak(self, question: tuple[str, Job]) -> int:
        """The peak while a trainer is built and makes two steps."""
        kind, job = question
        return peak_of(OurStep if kind == "ours" else TheirStep, job)

    def loss(self, sizes: tuple[int, int, int]) -> tuple[int, int]:
        """The peak of output layer and loss, and the size of all logits."""
        return peak_of_loss(*sizes)

    def prepare(self, jobs: dict[str, Job]) -> None:
        """Builds the models and their rows."""
        self.steps = {name: OurStep(job) for name, job in jobs.items()}

    def time(self, name: str) -> tuple[float, float]:
        """Times at which a step began and ended."""
        if self.place.size > 1:
            dist.barrier()
        begin = time.monotonic()
        self.steps[name].run()
        return begin, time.monotonic()


class Processes:
    """Teams of processes: if ``fresh``, new ones for each question, to share no memory."""

    def __init__(self, *, fresh: bool) -> None:
        self.fresh = fresh
        self.teams: dict[int, Team] = {}

    def ask(self, ranks: int, method: str, argument: object) -> list[Any]:
        """The answers of all ranks."""
        if ranks not in self.teams:
            self.teams[ranks] = Team(ranks, max(1, 2 // ranks), Bench)
        answers = self.teams[ranks].ask(method, argument)
        if self.fresh:
            self.close()
        return answers

    def close(self) -> None:
        """Ends the processes."""
        for team in self.teams.values():
            team.close()
        self.teams.clear()


# ---- the four questions --------------------------------------------------------------------------


def kept(arguments: Arguments, processes: Processes) -> Iterator[dict[str, object]]:
    """The bytes kept per token and layer."""
    tokens, width, vocab = (64, 4, 512) if arguments.quick else (1024, 4, 4096)
    grids = [Grid(dp=1, cp=1, tp=1), Grid(dp=1, cp=2, tp=2)]
    grids += [Grid(dp=1, cp=2, tp=1), Grid(dp=1, cp=4, tp=1), Grid(dp=1, cp=1, tp=4)]
    if arguments.quick:
        grids = grids[:1]
    alone: dict[str, float] = {}
    model = replace(model_of(2, width), num_query_groups=width)
    for grid in grids:
        for level in ("none", "selective", "full"):
            memory = MemoryConfig(recompute_granularity=level, loss_chunk_size=64)
            job = Job(model=model, vocab_size=vocab, tokens=tokens, grid=grid, memory=memory)
            deep = replace(job, model=replace(model, num_layers=4))
            few, many = (processes.ask(grid.world_size, "kept", each) for each in (job, deep))
            layer = max(b - a for a, b in zip(few, many, strict=True)) / 2 / tokens
            alone.setdefault(level, layer)
            yield {
                "grid": f"tp {grid.tp} x cp {grid.cp}",
                "recompute": level,
                "bytes_per_token_and_layer": layer,
                "over_hidden": round(layer / (4 * model.hidden_size), 4),
                "of_one_rank_over_ranks": round(layer / alone[level] * grid.world_size, 4),
            }


def loss(arguments: Arguments, processes: Processes) -> Iterator[dict[str, object]]:
    """The peak of output layer and loss over the size of all logits."""
    sizes = (512, 64, 4096) if arguments.quick else (32768, 128, 131072)
    peak, logits = processes.ask(1, "loss", sizes)[0]
    names = dict(zip(("tokens", "hidden", "vocabulary"), sizes))
    share = round(peak / logits, 4)
    yield {**names, "peak_mib": peak / MIB, "logits_mib": logits / MIB, "peak_over_logits": share}


def longest(arguments: Arguments, processes: Processes) -> Iterator[dict[str, object]]:
    """The longest row within the budget."""
    shape = {"model": model_of(4, 3), "vocab_size": 16384}
    budget, first = arguments.budget * MIB, 0
    contestants = [("transformers", 1), ("ours", 1), ("ours", 2), ("ours", 4)]
    if arguments.quick:
        shape, budget = {"model": model_of(2, 3), "vocab_size": 512}, 40 * MIB
        contestants = contestants[1:2]
    for kind, ranks in contestants:
        job = Job(**shape, tokens=0, grid=Grid(dp=1, cp=ranks, tp=1), memory=LEAN)
        low, high = (512, 1024) if kind == "transformers" else (4096 * ranks, 8192 * ranks)
        if arguments.quick:
            low, high = 128, 256

        def peak(tokens: int, kind: str = kind, ranks: int = ranks, job: Job = job) -> int:
            return max(processes.ask(ranks, "peak", (kind, replace(job, tokens=tokens))))

        rows = [(tokens, peak(tokens)) for tokens in (low, high)]
        trains = ranks <= arguments.trained_ranks and not arguments.quick
        for _ in range(TRIES if trains else 0):
            tokens = on_line(rows, CLOSE * budget, 2 * ranks)
            rows.append((tokens, peak(tokens)))
            if (2 * CLOSE - 1) * budget <= rows[-1][1] <= budget:
                break
        fitting = [row for row in rows[2:] if row[1] <= budget]
        tokens = max(fitting)[0] if fitting else on_line(rows, budget, 2 * ranks)
        first = first or tokens
        found: dict[str, object] = {"who": kind, "ranks": ranks, "tokens": tokens}
        found["bytes_per_token_and_rank"] = round(slope(rows))
        if fitting:
            found["trained_peak_mib"] = round(max(fitting)[1] / MIB, 1)
        found["rows"] = [[length, round(held / MIB, 1)] for length, held in sorted(rows)]
        yield {**found, "budget_mib": budget // MIB, "over_transformers": round(tokens / first, 2)}


def slope(rows: list[tuple[int, int]]) -> float:
    """Bytes per token, from the two longest rows of (tokens, bytes)."""
    (low, less), (high, more) = sorted(rows)[-2:]
    return (more - less) / (high - low)


def on_line(rows: list[tuple[int, int]], num_bytes: float, unit: int) -> int:
    """Tokens of the row that needs ``num_bytes``, a multiple of ``unit``."""
    tokens, held = max(rows)
    return int(tokens + (num_bytes - held) / slope(rows)) // unit * unit


def cost(arguments: Arguments, processes: Processes) -> Iterator[dict[str, object]]:
    """Paired step times."""
    tokens = 64 if arguments.quick else 2048
    model = model_of(2, 3) if arguments.quick else model_of(4, 12)
    vocab = 512 if arguments.quick else 16384
    whole = MemoryConfig(loss_chunk_size=tokens)
    full = replace(whole, recompute_granularity="full")
    options = {
        "none": whole,
        "chunked loss": replace(whole, loss_chunk_size=tokens // 4),
        "tiles": replace(whole, mlp_tile_size=tokens // 4),
        "selective": replace(whole, recompute_granularity="selective"),
        "full": full,
        "full, tiles": replace(full, mlp_tile_size=tokens // 4),
        "full, offload": replace(full, cpu_offloading=True),
    }
    jobs = {
        name: Job(model=model, vocab_size=vocab, tokens=tokens, memory=memory)
        for name, memory in options.items()
    }
    processes.fresh = False  # all options are measured in one process
    processes.ask(1, "prepare", jobs)
    rounds = 2 if arguments.quick else arguments.rounds
    seconds = measure(dict.fromkeys(jobs, processes.teams[1]), rounds, 1)
    for name, values in seconds.items():
        base = "full" if name.startswith("full,") else "none"
        if name != "none":
            yield {"option": name, "over": base, "time": paired(values, seconds[base])}


# ---- all of it -----------------------------------------------------------------------------------


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draws the longest rows as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    names = [f"{row['who']}, {row['ranks']} rank{'s'[: row['ranks'] > 1]}" for row in found]
    bars = axes.barh(names, [row["tokens"] for row in found], color=["0.7"] + ["C0"] * 3)
    axes.bar_label(bars, [f" {row['tokens']:,}" for row in found])
    axes.set(xscale="log", xlabel=f"tokens of the longest row, {found[0]['budget_mib']} MiB a rank")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    figure.savefig(path, dpi=150)


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    questions = {"kept": kept, "loss": loss, "longest": longest, "cost": cost}
    machine = hardware()
    shared = Processes(fresh=False) if arguments.quick else None
    for name, question in questions.items():
        if arguments.only not in ("all", name):
            continue
        rows = []
        processes = shared or Processes(fresh=True)
        for row in question(arguments, processes):
            rows.append(row)
            line = {"benchmark": "memory", "result": name, **row, "hardware": machine}
            print(json.dumps(line), flush=True)
        if not shared:
            processes.close()
        if name == "longest" and arguments.plot is not None:
            draw(rows, Path(arguments.plot))
    if shared:
        shared.close()


if __name__ == "__main__":
    main()
