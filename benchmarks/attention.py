"""Is context parallel attention as fast, as small and as exact as it should be?

Measures forward and backward with 8 heads of 64 in float32 on this machine's CPU, in three cases:

- ``long``: two ranks with one thread each and one causal sequence, compared with ``one`` (PyTorch's
  CPU flash op in one process with two threads) and PyTorch's private ring templates with load
  balancing;
- ``packed``: two ranks with one thread each and 32 documents of random lengths, compared with the
  same row as one causal sequence and one process with two threads that runs document by document;
- ``small``: four ranks with one thread and 256 tokens each, in every exchange, compared with
  PyTorch's rings and every installed package that runs on the CPU (``pip install
  axolotl-ringmaster para-attn``).

Ours compares inputs between ranks once, as a training run does, and ``checked`` before each
attention, as by default in a loop of your own on CPUs; other packages do not compare them.

Prints one JSON line per result, with the hardware:

- ``time``: medians in milliseconds, and the median over rounds of time(other) / time(ours);
- ``saved_bytes``: bytes kept for backward by one of two ranks and by one process;
- ``error``: relative L2 error against float64 on the worst rank, for short sequences.

    python benchmarks/attention.py                     # all three cases, minutes
    python benchmarks/attention.py --only packed
    python benchmarks/attention.py --quick             # seconds; tiny sizes, no real times
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from harness import contestants
from harness.contestants import Contestant
from harness.teams import Place, Team, compared, hardware, measure
from torch import Tensor

from cp_megatron.config.words import read_options
from cp_megatron.plan import Mask

HEADS = 8
HEAD_DIM = 64
ERROR_LIMIT = 2048  # the longest row whose float64 reference is computed
CASES = ("long", "packed", "small")
OURS: dict[str, dict[str, Any]] = {
    "p2p": {"exchange": "p2p"},
    "all_gather": {"exchange": "all_gather"},
    "a2a": {"exchange": "a2a"},
    "checked": {"check_ranks": "always"},
}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Attention: one process, this project's engine, and the rings of other projects."""

    only: Literal["all", "long", "packed", "small"] = "all"
    """Which case to measure."""
    tokens: tuple[int, ...] = (8192, 1024)
    """Sequence lengths of the case long."""
    packed_tokens: int = 16384
    """Row length of the case packed."""
    rounds: int = 10
    """Measured rounds; short sequences are measured in up to 40."""
    warmup: int = 2
    """Rounds before the first measured one."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The task of every contestant: a causal row of one or more documents."""

    case: str
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """The row length."""
        return sum(self.lengths)

    @property
    def mask(self) -> Mask:
        """The mask of the row."""
        if len(self.lengths) == 1:
            return Mask.causal(self.tokens)
        return Mask.documents(self.lengths)


def random_cuts(tokens: int, documents: int, seed: int = 0) -> tuple[int, ...]:
    """Cuts ``tokens`` at random into ``documents`` lengths of at least 1."""
    generator = np.random.default_rng(seed)
    cuts = np.sort(generator.choice(np.arange(1, tokens), documents - 1, replace=False))
    edges = np.concatenate([[0], cuts, [tokens]])
    return tuple(np.diff(edges).tolist())


@dataclass(kw_only=True)
class Bench:
    """Prepares a problem's contestants and answers the parent's questions, in each process."""

    place: Place
    passes: dict[str, Contestant] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    lengths: tuple[int, ...] = ()

    def prepare(self, problem: Problem) -> list[str]:
        """Prepares a problem; the names of the contestants that this process can run."""
        self.tensors = contestants.inputs(problem.tokens, HEADS, HEAD_DIM)
        self.lengths = problem.lengths
        if self.place.size == 1:
            self.passes = {
                "one": contestants.one_process(self.tensors, problem.lengths),
                "cp1": contestants.engine(None, self.tensors, problem.mask),
            }
            return list(self.passes)
        group, mask = dist.group.WORLD, problem.mask
        once: dict[str, Any] = {"check_ranks": "once"}
        self.passes = {"ours": contestants.engine(group, self.tensors, mask, **once)}
        if problem.case == "packed":
            whole = Mask.causal(problem.tokens)
            self.passes["causal"] = contestants.engine(group, self.tensors, whole, **once)
            zigzag = contestants.engine(group, self.tensors, mask, layout="zigzag", **once)
            self.passes["ours_zigzag"] = zigzag
            return list(self.passes)
        for rotate in ("allgather", "alltoall"):
            self.passes[f"torch_ring_{rotate}"] = contestants.torch_ring(rotate, self.tensors)
        if problem.case == "small":
            for name, options in OURS.items():
                ours = contestants.engine(group, self.tensors, mask, **once | options)
                self.passes[f"ours_{name}"] = ours
            self.passes |= contestants.peers(self.tensors)
        return list(self.passes)

    def time(self, name: str) -> tuple[float, float]:
        """Times at which the pass began and ended, on the monotonic clock."""
        if self.place.size > 1:
            dist.barrier()
        begin = time.monotonic()
        self.passes[name].run()
        return begin, time.monotonic()

    def saved(self, name: str) -> int:
        """Bytes kept for backward."""
        return contestants.saved_bytes(self.passes[name].run)

    def error(self, name: str) -> dict[str, float]:
        """The relative errors of this process's part."""
        run, positions = self.passes[name]
        exact = contestants.one_process([x.double() for x in self.tensors], self.lengths)
        return contestants.errors(run(), exact.run(), positions)


def bench(place: Place) -> Bench:
    """Runs in each process."""
    return Bench(place=place)


def results(
    one: Team | None, ring: Team, problem: Problem, rounds: int, warmup: int
) -> Iterator[dict[str, object]]:
    """All results of one problem."""
    teams = dict.fromkeys(ring.ask("prepare", problem)[0], ring)
    if one:
        one.ask("prepare", problem)
        teams["one"] = one
    yield {"result": "time", **compared(measure(teams, rounds, warmup), "ours")}
    if one:
        cp1, cp2 = one.ask("saved", "cp1")[0], max(ring.ask("saved", "ours"))
        share = round(cp2 / cp1, 4)
        yield {"result": "saved_bytes", "cp1": cp1, "cp2": cp2, "cp2_over_cp1": share}
    if problem.tokens <= ERROR_LIMIT:
        worst: dict[str, Any] = {}
        for name, team in teams.items():
            ranks = team.ask("error", name)
            worst[name] = {key: max(rank[key] for rank in ranks) for key in contestants.NAMES}
        yield {"result": "error", "relative_l2": worst}


def problems(arguments: Arguments) -> Iterator[Problem]:
    """The problems that the arguments select."""
    cases = CASES if arguments.only == "all" else (arguments.only,)
    if "long" in cases:
        for tokens in (256,) if arguments.quick else arguments.tokens:
            yield Problem(case="long", lengths=(tokens,))
    if "packed" in cases:
        tokens = 512 if arguments.quick else arguments.packed_tokens
        yield Problem(case="packed", lengths=random_cuts(tokens, 32))
    if "small" in cases:
        yield Problem(case="small", lengths=(64 if arguments.quick else 1024,))


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    rounds, warmup = (2, 1) if arguments.quick else (arguments.rounds, arguments.warmup)
    machine = hardware()
    one: Team | None = None
    rings: dict[int, Team] = {}
    for problem in problems(arguments):
        ranks = 4 if problem.case == "small" else 2
        if ranks not in rings:
            rings[ranks] = Team(ranks, 1, bench)
        if ranks == 2 and one is None:
            one = Team(1, 2, bench)
        longer = rounds if arguments.quick else max(rounds, min(40, 81920 // problem.tokens))
        alone = one if ranks == 2 else None
        head = {
            "benchmark": "attention",
            "case": problem.case,
            "ranks": ranks,
            "tokens": problem.tokens,
            "documents": len(problem.lengths),
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "float32",
        }
        for result in results(alone, rings[ranks], problem, longer, warmup):
            print(json.dumps({**head, **result, "hardware": machine}), flush=True)
    for team in (*rings.values(), *([one] if one else [])):
        team.close()


if __name__ == "__main__":
    main()
