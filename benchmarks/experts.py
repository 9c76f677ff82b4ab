"""What do experts cost on one device?

Every token of a row is computed by K of E experts, forward and backward, in float32, by a router
that sends tokens anywhere. Prints one JSON line per result, with the hardware, the medians in
milliseconds, and the ratios of paired rounds, time(theirs) / time(ours). With one thread, the times
are of the CPU, which other load on the machine disturbs less than time on the clock:

- ``linear``: ``grouped_linear`` against one product of as many rows with one weight (``dense``),
  and against a batched product in which every expert has equally many rows (``even``). Both have
  the same FLOPs; the second one also reads and writes as many weights;
- ``mlp``: the dispatch of the rows, three grouped linears and the gated unit, and the weighted sum,
  against the modules of transformers' Qwen3-MoE with its ways of computing experts, and against a
  dense MLP on as many rows.

    python benchmarks/experts.py                        # two minutes
    python benchmarks/experts.py --hidden 256 --width 128 --threads 2
    python benchmarks/experts.py --quick
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from harness.launched import as_launched
from harness.teams import Place, Team, compared, hardware, measure
from torch import Tensor, nn

from cp_megatron.config.words import read_options
from cp_megatron.expert_parallel import Dispatch, count_rows
from cp_megatron.kernels.gated import GatedFunction, gated
from cp_megatron.kernels.grouped import grouped_linear, grouped_products


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Experts of one layer on one device."""

    experts: int = 128
    """Number of experts."""
    topk: int = 8
    """Experts of a token."""
    tokens: int = 1024
    """Tokens."""
    hidden: int = 512
    """Width of the residual stream."""
    width: int = 256
    """Width of an expert."""
    rounds: int = 10
    """Measured rounds."""
    threads: int = 1
    """Threads."""
    only: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """The results to measure."""
    quick: bool = False
    """Use tiny sizes, which show that the script runs but measure nothing."""


TINY = Arguments(experts=4, topk=2, tokens=16, hidden=16, width=16, rounds=2)
WAYS = ("eager", "grouped_mm")


def transformers_experts(arguments: Arguments, way: str) -> nn.Module:
    """The experts of Qwen3-MoE; importing transformers takes seconds."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=arguments.experts,
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.width,
    )
    config._experts_implementation = way
    return Qwen3MoeExperts(config)  # type: ignore[no-any-return]


@dataclass(kw_only=True)
class Bench:
    """Answers the parent's questions in its process."""

    runs: dict[str, Callable[[], object]] = field(default_factory=dict)

    def prepare(self, arguments: Arguments) -> float:
        """Draws tensors; returns how far the results of the MLPs are apart, relative."""
        self.generator = torch.Generator().manual_seed(0)
        self.arguments = arguments
        scores = self.drawn(arguments.tokens, arguments.experts)
        self.weights, self.chosen = scores.softmax(1).topk(arguments.topk)
        self.weights.requires_grad_()
        self.counts = count_rows(self.chosen, arguments.experts, None).counts
        self.prepare_linear()
        return self.prepare_mlp()

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def prepare_linear(self) -> None:
        """Rows that are sorted already."""
        rows = self.arguments.tokens * self.arguments.topk
        experts, hidden, width = self.arguments.experts, self.arguments.hidden, self.arguments.width
        x = self.drawn(rows, hidden).requires_grad_()
        weight = self.drawn(experts, width, hidden).requires_grad_()
        one = self.drawn(width, hidden).requires_grad_()
        even = self.drawn(experts, rows // experts, hidden).requires_grad_()
        dy = self.drawn(rows, width)
        self.add("linear ours", lambda: grouped_linear(x, weight, self.counts), (x, weight), dy)
        self.add("linear dense", lambda: F.linear(x, one), (x, one), dy)
        shaped = dy[: even.shape[0] * even.shape[1]].view(*even.shape[:2], width)
        product = lambda: torch.bmm(even, weight.transpose(1, 2))  # noqa: E731
        self.add("linear even", product, (even, weight), shaped)

    def prepare_mlp(self) -> float:
        experts, hidden, width = self.arguments.experts, self.arguments.hidden, self.arguments.width
        x = self.drawn(self.arguments.tokens, hidden).requires_grad_()
        gate, up = (self.drawn(experts, width, hidden).div_(hidden**0.5) for _ in range(2))
        down = self.drawn(experts, hidden, width).div_(width**0.5)
        ours = [t.requires_grad_() for t in (gate, up, down)]
        dy = self.drawn(self.arguments.tokens, hidden)
        self.add("mlp ours", lambda: self.mlp(x, *ours), (x, self.weights, *ours), dy)
        results = [self.mlp(x, *ours).detach()]
        for way in WAYS:
            module = transformers_experts(self.arguments, way)
            module.gate_up_proj.data = torch.cat((gate, up), 1).detach()  # type: ignore[union-attr]
            module.down_proj.data = down.detach()  # type: ignore[union-attr]
            run = lambda module=module: module(x, self.chosen, self.weights)  # noqa: E731
            leaves = (x, self.weights, *module.parameters())
            self.add(f"mlp transformers {way}", run, leaves, dy)
            results.append(run().detach())
        one = [t[0].detach().clone().requires_grad_() for t in ours]
        rows = x.detach().repeat_interleave(self.arguments.topk, 0).requires_grad_()
        wide = dy.repeat_interleave(self.arguments.topk, 0)
        self.add("mlp dense", lambda: dense(rows, *one), (rows, *one), wide)
        return max(float((y - results[0]).norm() / y.norm()) for y in results[1:])

    def mlp(self, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """[n, h] -> [n, h]."""
        splits = count_rows(self.chosen, self.arguments.experts, None)
        way = Dispatch(self.chosen, splits, None)
        rows, weights = way.send(x, self.weights)
        left, right = grouped_products(rows, [gate, up], splits.counts)
        wide = gated(left, right, GatedFunction(), weights)
        return way.back(grouped_linear(wide, down, splits.counts))

    def add(
        self, name: str, forward: Callable[[], Tensor], inputs: Sequence[Tensor], dy: Tensor
    ) -> None:
        self.runs[name] = lambda: torch.autograd.grad(forward(), inputs, dy)

    def time(self, name: str) -> tuple[float, float]:
        """Seconds before and after a run: of this process's CPU, with threads on the clock."""
        clock = time.process_time if self.arguments.threads == 1 else time.monotonic
        begin = clock()
        self.runs[name]()
        return begin, clock()


def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The MLP of every token with one expert."""
    return F.linear(gated(F.linear(x, gate), F.linear(x, up), GatedFunction()), down)


def bench(place: Place) -> Bench:
    """Runs in each process."""
    return Bench()


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    sizes = (
        replace(TINY, only=arguments.only, threads=arguments.threads)
        if arguments.quick
        else arguments
    )
    machine, team = hardware(), Team(1, sizes.threads, bench, as_launched)
    apart = team.ask("prepare", sizes)[0]
    assert apart < 1e-5, f"the results differ by {apart}"
    contestants = {
        "linear": ("dense", "even"),
        "mlp": ("dense", *(f"transformers {way}" for way in WAYS)),
    }
    names = ("experts", "topk", "tokens", "hidden", "width", "threads")
    problem = {name: getattr(sizes, name) for name in names}
    for part in sizes.only:
        others = contestants[part]
        teams = {f"{part} {name}": team for name in ("ours", *others)}
        seconds = measure(teams, sizes.rounds, 2)
        times = compared({k.partition(" ")[2]: v for k, v in seconds.items()}, "ours")
        line = {"benchmark": "experts", "result": part, **problem, **times, "hardware": machine}
        print(json.dumps(line), flush=True)
    team.close()


if __name__ == "__main__":
    main()
