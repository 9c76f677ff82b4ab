"""Is context-parallel attention as fast, as small and as exact as it should be?

Causal attention, forward and backward, 8 heads of 64, float32, on this machine's CPU:

- ``one``: PyTorch's CPU flash op over the whole sequence, one process, two threads;
- ``cp2``: ``ContextParallel.attention``, two processes of one thread each;
- ``torch_ring_allgather`` and ``torch_ring_alltoall``: PyTorch's own (private) ring templates with
  load balance around the same flash op, called without autograd, in the same two processes.

All take turns inside every round, in a rotating order, so that whatever else the machine does
hits them alike. Prints one JSON line per result, each with the hardware:

- ``time``: medians in milliseconds, and over rounds the median of time(other) / time(cp2);
- ``saved_bytes``: storage kept for backward by one rank of CP2 against CP1 (each storage once);
- ``error``: relative L2 against float64, worst rank, for sequences where float64 is cheap.

    python benchmarks/attention.py                     # 8,192 and 1,024 tokens, minutes
    python benchmarks/attention.py --quick             # small, seconds; the numbers mean nothing

Shapes: B batch (1), H heads, S sequence, D head_dim.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import tyro
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.plan import Mask

HEADS = 8
HEAD_DIM = 64
CP = 2
ERROR_LIMIT = 2048  # tokens up to which the float64 reference is computed
PAUSE = 0.05  # seconds between two measurements
ANSWER_TIMEOUT = 600.0  # seconds
NAMES = ("out", "dq", "dk", "dv")

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Pass = Callable[[], tuple[Tensor, ...]]
"""One forward and backward: out, dq, dk, dv of this process, each [B, S or S/cp, H, D]."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Causal attention: one process against two ranks of context parallelism."""

    tokens: tuple[int, ...] = (8192, 1024)
    """Sequence lengths."""
    rounds: int = 10
    """Measured rounds; short sequences take up to 40."""
    warmup: int = 2
    """Rounds before the first measured one."""
    quick: bool = False
    """Tiny sizes: shows that the script runs, measures nothing."""


# ---- what is measured ----------------------------------------------------------------------------


def inputs(tokens: int) -> list[Tensor]:
    """q, k, v and the gradient of out, [B, S, H, D] float32, alike in every process."""
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(4)]


def heads_first(x: Tensor) -> Tensor:
    """[B, S, H, D] -> [B, H, S, D], contiguous: the flash op's own layout."""
    return rearrange(x, "b s h d -> b h s d").contiguous()


def heads_last(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [B, S, H, D]."""
    return rearrange(x, "b h s d -> b s h d")


def one_process(tensors: list[Tensor]) -> Pass:
    """The flash op itself over the whole sequence, without autograd around it."""
    q, k, v, dout = [heads_first(x) for x in tensors]

    def run() -> tuple[Tensor, ...]:
        out, lse = FORWARD(q, k, v, 0.0, True)
        gradients = BACKWARD(dout, q, k, v, out, lse, 0.0, True)
        return tuple(heads_last(x) for x in (out, *gradients))

    return run


def context_parallel(cp: ContextParallel, tensors: list[Tensor]) -> Pass:
    """Ours, through autograd as a model calls it."""
    q, k, v, dout = [cp.shard(x, 1).contiguous() for x in tensors]
    qkv = (q, k, v)
    for x in qkv:
        x.requires_grad_()

    def run() -> tuple[Tensor, ...]:
        out = cp.attention(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, qkv, dout))

    return run


def torch_ring(rotate: str, positions: Tensor, tensors: list[Tensor]) -> Pass:
    """PyTorch's ring templates; their load balance deals the same two chunks as zigzag."""
    from torch.distributed.tensor.experimental import _context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    ring = _context_parallel._attention
    q, k, v, dout = [heads_first(x[:, positions]) for x in tensors]
    group = dist.group.WORLD
    assert group is not None
    same: dict[str, Any] = {"query": q, "key": k, "value": v, "is_causal": True, "dropout_p": 0.0}

    def run() -> tuple[Tensor, ...]:
        set_rotate_method(rotate)
        out, lse, *_ = ring._templated_ring_attention(group, 2, FORWARD, **same)
        dq, dk, dv, *_ = ring._templated_ring_attention_backward(
            group, 2, BACKWARD, dout, "grad_out", out=out, logsumexp=lse, **same
        )
        return tuple(heads_last(x) for x in (out, dq, dk, dv))

    return run


def saved_bytes(run: Pass) -> int:
    """Bytes of the storages that autograd keeps between forward and backward, each once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


def reference(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """out, dq, dk, dv over the whole sequence in float64."""
    return one_process([x.double() for x in tensors])()


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], positions: Tensor) -> list[float]:
    """||x - ref|| / max(||ref on this rank||, ||ref|| / sqrt(ranks)), for each tensor."""
    share = (positions.numel() / exact[0].shape[1]) ** 0.5
    result = []
    for x, whole in zip(found, exact, strict=True):
        here = whole[:, positions]
        scale = max(here.norm().item(), whole.norm().item() * share)
        result.append((x.double() - here).norm().item() / scale)
    return result


# ---- the processes -------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Bench:
    """One process's side: prepares the passes for a length and answers the parent's questions."""

    rank: int | None  # None: the process that has the whole sequence
    passes: dict[str, Pass] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    positions: Tensor = field(default_factory=lambda: torch.empty(0))

    def prepare(self, tokens: int) -> list[str]:
        self.tensors = inputs(tokens)
        group = None if self.rank is None else dist.group.WORLD
        cp = ContextParallel(group, Mask.causal(tokens), layout="zigzag", exchange="p2p")
        self.positions = cp.positions
        ours = context_parallel(cp, self.tensors)
        if self.rank is None:
            self.passes = {"one": one_process(self.tensors), "cp1": ours}
        else:
            rings = {
                f"torch_ring_{rotate}": torch_ring(rotate, self.positions, self.tensors)
                for rotate in ("allgather", "alltoall")
            }
            self.passes = {"cp2": ours, **rings}
        return list(self.passes)

    def time(self, name: str) -> tuple[float, float]:
        """When the pass began and ended, on the machine's one monotonic clock."""
        if self.rank is not None:
            dist.barrier()
        begin = time.monotonic()
        self.passes[name]()
        return begin, time.monotonic()

    def saved(self, name: str) -> int:
        return saved_bytes(self.passes[name])

    def error(self, name: str) -> list[float]:
        return errors(self.passes[name](), reference(self.tensors), self.positions)


def serve(connection: Connection, threads: int, rank: int | None, store: str) -> None:
    """Answers (method, argument) until the pipe closes."""
    torch.set_num_threads(threads)
    if rank is not None:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=CP)
    bench = Bench(rank=rank)
    while True:
        try:
            method, argument = connection.recv()
        except EOFError:
            break
        connection.send(getattr(bench, method)(argument))
    if rank is not None:
        dist.destroy_process_group()


class Team:
    """The parent's side of processes that do the same thing at the same time."""

    def __init__(self, ranks: list[int | None], threads: int, store: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.members: list[tuple[Connection, SpawnProcess]] = []
        for rank in ranks:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(theirs, threads, rank, store), daemon=True
            )
            process.start()
            theirs.close()
            self.members.append((ours, process))

    def ask(self, method: str, argument: object) -> list[Any]:
        for connection, _ in self.members:
            connection.send((method, argument))
        return [self._answer(connection) for connection, _ in self.members]

    @staticmethod
    def _answer(connection: Connection) -> Any:
        if not connection.poll(ANSWER_TIMEOUT):
            raise TimeoutError(f"no answer within {ANSWER_TIMEOUT:g} s")
        return connection.recv()

    def seconds(self, name: str) -> float:
        """From the first member's begin to the last one's end."""
        spans = self.ask("time", name)
        return float(max(end for _, end in spans) - min(begin for begin, _ in spans))

    def close(self) -> None:
        for connection, _ in self.members:
            connection.close()
        for _, process in self.members:
            process.join(10)


# ---- results -------------------------------------------------------------------------------------


def hardware() -> Mapping[str, object]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def measure(teams: Mapping[str, Team], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds per contestant and round, in a new order every round.

    Nobody always follows the same one: the threads of a process that has just finished keep
    spinning for a moment, which costs whoever comes next. The pause lets them go to sleep.
    """
    names = list(teams)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        shuffle(names)
        for name in names:
            time.sleep(PAUSE)
            elapsed = teams[name].seconds(name)
            if turn >= warmup:
                seconds[name].append(elapsed)
    return seconds


def paired(over: list[float], under: list[float]) -> dict[str, object]:
    """The median and quartiles of the rounds' ratios."""
    ratios = [first / second for first, second in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def time_results(seconds: Mapping[str, list[float]]) -> dict[str, object]:
    """Medians, and the time of everything else over cp2's (above 1: cp2 is faster)."""
    medians = {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()}
    over = {
        name: paired(values, seconds["cp2"]) for name, values in seconds.items() if name != "cp2"
    }
    return {"rounds": len(seconds["one"]), "median_ms": medians, "over_cp2": over}


def results(
    one: Team, ring: Team, tokens: int, rounds: int, warmup: int
) -> Iterator[dict[str, object]]:
    """All results of one sequence length."""
    one.ask("prepare", tokens)
    contestants = ring.ask("prepare", tokens)[0]
    teams = {"one": one, **dict.fromkeys(contestants, ring)}
    yield {"result": "time", **time_results(measure(teams, rounds, warmup))}
    cp1, cp2 = one.ask("saved", "cp1")[0], max(ring.ask("saved", "cp2"))
    yield {"result": "saved_bytes", "cp1": cp1, "cp2": cp2, "cp2_over_cp1": round(cp2 / cp1, 4)}
    if tokens <= ERROR_LIMIT:
        worst = {
            name: dict(
                zip(NAMES, map(max, zip(*team.ask("error", name), strict=True)), strict=True)
            )
            for name, team in teams.items()
        }
        yield {"result": "error", "relative_l2": worst}


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    lengths = (256,) if arguments.quick else arguments.tokens
    rounds, warmup = (2, 1) if arguments.quick else (arguments.rounds, arguments.warmup)
    machine = hardware()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "rendezvous")
        one, ring = Team([None], 2, store), Team(list(range(CP)), 1, store)
        problem = {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "float32", "mask": "causal"}
        for tokens in lengths:
            longer = rounds if arguments.quick else max(rounds, min(40, 81920 // tokens))
            for result in results(one, ring, tokens, longer, warmup):
                line = {"benchmark": "attention", "tokens": tokens, **problem, **result}
                print(json.dumps({**line, "hardware": machine}), flush=True)
        one.close()
        ring.close()


if __name__ == "__main__":
    main()
