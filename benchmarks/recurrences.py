"""What do linear recurrences cost: their computation, their exchange, and the bytes they move?

Shapes are those of Qwen3-Next, whose recurrence is a gated DeltaNet with heads of 128. Prints one
JSON line per result, with the hardware:

- ``speed``: forward and backward on one rank, 8 heads in float32, against the function of
  transformers, called document by document. Median milliseconds, the median over rounds of
  time(theirs) / time(ours), and for both the bytes kept for backward and the most temporary bytes;
- ``overhead``: CPU seconds of all ranks, forward and backward of one document, zigzag, over those
  of one rank, as the median of paired rounds;
- ``exchange``: milliseconds of one forward exchange on four ranks with 16 key and 32 value heads
  and 2,048 tokens each: states by heads, with the products along their chains; tokens to heads and
  outputs back; and the halo of the convolution;
- ``bytes``: MiB that a rank receives in forward, as the mean over ranks, for one layer and one
  document of 128K tokens, from the plans: keys of an attention layer of the same model (2 key/value
  heads of 256), states, and tokens sent to heads (bfloat16, g and beta float32).

    python benchmarks/recurrences.py                  # minutes
    python benchmarks/recurrences.py --only speed --threads 2
    python benchmarks/recurrences.py --quick
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from harness.teams import Place, Team, compared, hardware, measure, paired
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.config.words import read_options
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.short_convolution import HaloExchange
from cp_megatron.context_parallel.state_exchange import StateExchange
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.states import StatePlan, StateSize
from tests.allocations import counting_memory

GROUPS, HEADS, DIM, SPEED_HEADS = 16, 32, 128, 8
CHANNELS, WIDTH = (2 * GROUPS + HEADS) * DIM, 4
TOKENS, ROW, RANKS = 2048, 128 << 10, 4
DOCUMENTS: Mapping[str, tuple[int, ...]] = {
    "one": (2048,),
    "six": (700, 300, 48, 400, 500, 100),
    "128 of 16": (16,) * 128,
}
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Linear recurrences: computation, exchange and bytes."""

    only: Literal["all", "speed", "overhead", "exchange", "bytes"] = "all"
    """Which part to measure."""
    threads: int = 1
    """Threads of the process in the part speed."""
    rounds: int = 10
    """Measured rounds."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


def inputs(tokens: int, heads: int, dim: int) -> tuple[list[Tensor], Tensor]:
    """q, k, v, g and beta, and the gradient of out; float32, whole rows."""
    generator = torch.Generator().manual_seed(tokens)
    shape = 1, tokens, heads
    q, k, v, dout = (torch.randn(*shape, dim, generator=generator) for _ in range(4))
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    g, beta = (torch.rand(shape, generator=generator) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v, -0.1 * g, beta)], dout


def theirs() -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function of transformers; importing it takes seconds."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    return torch_chunk_gated_delta_rule  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class Bench:
    """Answers the parent's questions in each process."""

    place: Place
    runs: dict[str, Callable[[], object]] = field(default_factory=dict)
    forward: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def prepare_speed(self, problem: tuple[tuple[int, ...], int, int]) -> None:
        """Prepares a row of documents: their lengths, the heads and their width."""
        lengths, heads, dim = problem
        given, dout = inputs(sum(lengths), heads, dim)
        cp, chunked = ContextParallel(None, Mask.documents(lengths)), theirs()

        def by_document() -> Tensor:
            parts = zip(*(x.split(lengths, dim=1) for x in given))
            return torch.cat([chunked(*part, chunk_size=64)[0] for part in parts], dim=1)

        self.forward = {"ours": lambda: cp.linear_attention(*given), "transformers": by_document}
        self.runs = {
            name: lambda run=run: torch.autograd.grad(run(), given, dout)  # type: ignore[misc]
            for name, run in self.forward.items()
        }

    def prepare_overhead(self, problem: tuple[int, int, int]) -> None:
        """Prepares a document that the team shares: its tokens, the heads and their width."""
        tokens, heads, dim = problem
        group = dist.group.WORLD if self.place.size > 1 else None
        cp = ContextParallel(group, Mask.causal(tokens), "zigzag")
        whole, dout = inputs(tokens, heads, dim)
        given = [cp.shard(x.detach(), 1).requires_grad_() for x in whole]
        dout = cp.shard(dout, 1)
        self.runs = {"ours": lambda: torch.autograd.grad(cp.linear_attention(*given), given, dout)}

    def cpu_seconds(self, name: str) -> float:
        """CPU seconds that this process spends on a run."""
        begin = time.process_time()
        self.runs[name]()
        return time.process_time() - begin

    def memory(self, name: str) -> tuple[int, int]:
        """Bytes kept for backward, inputs included, and the most held beyond the inputs."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = self.forward[name]()
        del out
        with counting_memory() as count:
            self.runs[name]()
        return sum(kept.values()), count.peak

    def prepare_exchange(self, problem: tuple[int, int, int]) -> None:
        """Prepares what is sent: tokens of a rank, the width of heads and channels."""
        tokens, dim, channels = problem
        group, rank, size = dist.group.WORLD, self.place.rank, self.place.size
        mask = Mask.causal(tokens * size)
        layout = SequenceLayout.make(mask, size, "zigzag")
        plan, buffers, sums = StatePlan.of(mask, layout, HEADS), Buffers(), LinkSums()
        leaving, through = len(plan.leaving[rank]), len(plan.through[rank])
        increments = torch.randn(1, leaving, HEADS, dim, dim)
        transitions = torch.randn(1, through, HEADS, dim, dim) / dim
        halo = HaloExchange(mask, layout, WIDTH, rank, group, buffers, sums)
        x = torch.randn(1, tokens, channels)
        # q, k, v, g and beta of some heads to each rank, and back the output; bfloat16, as bytes.
        key = 2 * dim * GROUPS // size * 2 + 2 * dim * HEADS // size + 8 * HEADS // size
        sent = torch.zeros(size, tokens, key, dtype=torch.uint8)
        back = torch.zeros(size, tokens, 2 * dim * HEADS // size, dtype=torch.uint8)

        def states() -> object:
            with buffers.lend(torch.device("cpu")) as memory:
                exchange = StateExchange(plan, rank, group, memory, sums)
                return exchange.entering_states(increments, transitions)

        def to_heads() -> None:
            for message in (sent, back):
                dist.all_to_all_single(torch.empty_like(message), message, group=group)

        self.runs = {"states": states, "tokens": to_heads, "halo": lambda: halo.fetch(x)}

    def time(self, name: str) -> tuple[float, float]:
        """Times at which a run began and ended, on the monotonic clock."""
        if self.place.size > 1:
            dist.barrier()
        begin = time.monotonic()
        self.runs[name]()
        return begin, time.monotonic()


def bench(place: Place) -> Bench:
    """Runs in each process."""
    return Bench(place=place)


def speed_results(arguments: Arguments) -> Iterator[dict[str, object]]:
    """Yields a result for each kind of row."""
    team = Team(1, arguments.threads, bench)
    rounds, warmup = (2, 1) if arguments.quick else (arguments.rounds, 1)
    heads, dim = (2, 8) if arguments.quick else (SPEED_HEADS, DIM)
    for name, lengths in DOCUMENTS.items():
        cut = lengths[:4] if arguments.quick else lengths
        team.ask("prepare_speed", (cut, heads, dim))
        teams = {"ours": team, "transformers": team}
        times = compared(measure(teams, rounds, warmup), "ours")
        memory = {
            of: dict(zip(("kept", "peak"), team.ask("memory", of)[0], strict=True)) for of in teams
        }
        yield {"documents": name, "threads": arguments.threads, **times, "bytes": memory}
    team.close()


def overhead_results(arguments: Arguments) -> Iterator[dict[str, object]]:
    """Yields a result for each number of ranks."""
    rounds, problem = arguments.rounds, (RANKS * TOKENS, SPEED_HEADS, DIM)
    if arguments.quick:
        rounds, problem = 2, (64, 2, 8)
    sizes = (1, 2) if arguments.quick else (1, 2, RANKS)
    teams = {size: Team(size, 1, bench) for size in sizes}
    spent: dict[int, list[float]] = {size: [] for size in teams}
    for team in teams.values():
        team.ask("prepare_overhead", problem)
        team.ask("cpu_seconds", "ours")
    for _ in range(rounds):
        for size, team in teams.items():
            spent[size].append(sum(team.ask("cpu_seconds", "ours")))
    for size, team in teams.items():
        over = paired(spent[size], spent[1])
        yield {"ranks": size, "tokens": problem[0], "cpu_over_one_rank": over}
        team.close()


def exchange_results(arguments: Arguments) -> Iterator[dict[str, object]]:
    """Yields the times of the three exchanges."""
    team = Team(RANKS, 1, bench)
    problem = (32, 4, 8) if arguments.quick else (TOKENS, DIM, CHANNELS)
    team.ask("prepare_exchange", problem)
    rounds, warmup = (2, 1) if arguments.quick else (2 * arguments.rounds, 2)
    seconds = measure(dict.fromkeys(("states", "tokens", "halo"), team), rounds, warmup)
    yield {"ranks": RANKS, "tokens": problem[0], **compared(seconds, "states")}
    team.close()


def tokens_to_heads(size: int) -> float | None:
    """Bytes that a rank receives in forward if tokens are sent to heads; None if it cannot be."""
    if HEADS % size:
        return None
    heads, groups = HEADS // size, max(1, GROUPS // size)
    arriving = ROW * (size - 1) / size * ((2 * groups + heads) * DIM * 2 + 8 * heads)
    return arriving + ROW / size * (HEADS - heads) * DIM * 2


def bytes_results(arguments: Arguments) -> Iterator[dict[str, object]]:
    """Yields a result for each number of ranks."""
    mask = Mask.causal(ROW)
    for size in (2,) if arguments.quick else (2, 4, 8, 16, 32, 64):
        layouts = {kind: SequenceLayout.make(mask, size, kind) for kind in ("zigzag", "contiguous")}
        schedule = Schedule.build(mask, layouts["zigzag"], "p2p", num_heads=16, num_kv_heads=2)
        keys = sum(schedule.bytes_received(rank, 256, 2) for rank in range(size)) / size
        found: dict[str, float | None] = {"keys": keys, "tokens": tokens_to_heads(size)}
        for kind, layout in layouts.items():
            plan, head = StatePlan.of(mask, layout, HEADS), StateSize.of(DIM, DIM, "matrix")
            received = [plan.bytes_received(rank, head) for rank in range(size)]
            found[f"states_{kind}"] = sum(received) / size
        in_mib = {name: None if x is None else round(x / MIB, 1) for name, x in found.items()}
        yield {"ranks": size, **in_mib}


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    machine = hardware()
    parts = {"speed": speed_results, "overhead": overhead_results}
    parts |= {"exchange": exchange_results, "bytes": bytes_results}
    for name, results in parts.items():
        if arguments.only not in ("all", name):
            continue
        for row in results(arguments):
            line = {"benchmark": "recurrences", "result": name, **row, "hardware": machine}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
