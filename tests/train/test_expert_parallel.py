"""Training a mixture of experts on any grid equals training on one rank: 20 steps in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.expert_parallel import count_rows
from cp_megatron.model import expert_mixture
from cp_megatron.model.expert_mixture import Router
from cp_megatron.model.row_counts import RowCounts
from cp_megatron.train.step import StepResult
from tests.ranks import run_ranks
from tests.train.expert_training import SEQ, STEPS, Case, described, shards_of, train, train_step_of


def alone(case: Case) -> Case:
    """The same training on one rank: with an imbalance of rows, micro batches change nothing."""
    kept: dict[str, Any] = {
        name: getattr(case, name) for name in ("style", "document_mask", "kind", "optimizer")
    }
    return Case(**kept, micro_batch_size=case.micro_batch_size if case.kind == "aux_loss" else 1)


@cache
def on_one_rank(case: Case, steps: int) -> list[StepResult]:
    return run_ranks(train, 1, case, steps)[0]


def gaps(case: Case, found: list[StepResult]) -> tuple[float, float, bool]:
    """The largest relative errors of loss and norm, and whether all counts and terms agree."""
    losses, norms, same = [0.0], [0.0], True
    for here, there in zip(found, on_one_rank(alone(case), len(found)), strict=True):
        losses.append(abs(here.loss - there.loss) / there.loss)
        norms.append(abs(here.grad_norm - there.grad_norm) / there.grad_norm)
        assert here.experts is not None
        assert there.experts is not None
        same &= here.experts.counts == there.experts.counts
        for name in ("aux_loss", "z_loss"):
            one, other = getattr(here.experts, name), getattr(there.experts, name)
            same &= abs(one - other) <= 1e-10 * abs(other)
    return max(losses), max(norms), same


def grids(world_size: int) -> list[dict[str, int]]:
    """Every (tp, cp, dp, ep) of so many ranks."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world_size]
    return [
        {"tp": tp, "cp": cp, "dp": world_size // tp // cp, "ep": ep}
        for tp in sizes
        for cp in sizes
        for ep in sizes
        if world_size % (tp * cp) == 0 and world_size // tp // cp <= 4
    ]


QUICK = [  # twenty steps of each are slow
    (Case(tp=2, cp=2, ep=4, padding=4), 6),
    (Case(dp=2, cp=2, ep=2, replicas=2, style="softmax"), 6),
    (Case(tp=2, dp=2, ep=2, document_mask=True, micro_batch_size=2, padding=2), 6),
    (Case(cp=4, ep=2, optimizer="muon"), 6),
]
MUON = [
    *(Case(**{axis: 2}, ep=2, optimizer="muon") for axis in ("dp", "cp", "tp")),
    *(Case(**sizes, optimizer="muon") for sizes in grids(4) if sizes["ep"] == 4),
    Case(dp=4, ep=1, optimizer="muon", style="softmax"),
    Case(dp=4, ep=2, replicas=2, optimizer="muon", style="softmax"),
    Case(tp=2, cp=2, ep=2, optimizer="muon", style="softmax", padding=8),
]
LONG = [
    *(case for case, _ in QUICK),
    *MUON,
    Case(cp=4, ep=2, style="softmax", document_mask=True, micro_batch_size=2, kind="aux_loss"),
    *(Case(**sizes, document_mask=True, micro_batch_size=1) for sizes in grids(4)),
    *(Case(**sizes, style="softmax", padding=8) for sizes in grids(4) if sizes["ep"] == 2),
    Case(dp=4, ep=2, replicas=2),
    Case(tp=2, dp=2, ep=2, replicas=2),
    Case(dp=2, cp=2, ep=4, kind="aux_loss", micro_batch_size=2),
    Case(tp=2, cp=2, dp=2, ep=4),
    Case(cp=2, dp=4, ep=2, replicas=2, style="softmax"),
]


def check(case: Case, steps: int) -> None:
    reference = on_one_rank(alone(case), steps)
    assert reference[0].loss - reference[-1].loss > 0.02
    assert max(result.grad_norm for result in reference) > 0.5  # clipped
    for found in run_ranks(train, case.grid.world_size, case, steps, timeout=300):
        loss, norm, same = gaps(case, found)
        assert same
        assert max(loss, norm) < 1e-10


@pytest.mark.parametrize(("case", "steps"), QUICK, ids=[described(case) for case, _ in QUICK])
def test_steps_equal_one_rank(case: Case, steps: int) -> None:
    check(case, steps)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=described)
def test_twenty_steps_equal_one_rank(case: Case) -> None:
    check(case, STEPS)


def mutated(rank: int, world_size: int, case: Case, mutation: str) -> list[StepResult]:
    """Three steps of a program that is wrong in one way."""
    with pytest.MonkeyPatch.context() as patch:
        if mutation == "router's gradient":
            patch.setattr(Router, "is_partial", lambda self, name: False)
        if mutation == "counts":
            patch.setattr(RowCounts, "__init__", unsummed)
        step = train_step_of(case)
        if mutation == "averaged experts":
            for layer in step.model.layers.values():
                layer.mlp.experts.set_gradient_divide_factor(2.0)
        found = [
            step.run(shards_of(number, case, step), step=number + 1, lr=3e-3) for number in range(3)
        ]
    dist.barrier()
    return found


def unsummed(self: Any, numbers: Tensor, counts: Tensor | None, group: object) -> None:
    self.numbers, self._counts, self._work = numbers, counts, None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "case"),
    [
        ("none", Case(tp=2, cp=2, ep=2)),
        ("router's gradient", Case(tp=2, cp=2, ep=2)),
        ("counts", Case(tp=2, cp=2, ep=2)),
        ("averaged experts", Case(tp=2, cp=2, ep=2)),
    ],
)
def test_wrong_programs_are_noticed(mutation: str, case: Case) -> None:
    loss, norm, same = gaps(case, run_ranks(mutated, 4, case, mutation)[0])
    assert (norm < 1e-10 and loss < 1e-10 and same) == (mutation == "none")
    if mutation != "none":
        assert norm > 1e-5


def parameters_held(rank: int, world_size: int, case: Case) -> tuple[int, int]:
    """Elements of the parameters that this rank stores, and what the description says."""
    step = train_step_of(case)
    held = sum(p.to_local().numel() for p in step.model.parameters())  # type: ignore[attr-defined]
    return held, step.model.spec.parameters_on_rank(case.grid, rank)


@pytest.mark.parametrize("case", [Case(tp=2, dp=2, ep=2), Case(dp=4, ep=2, style="softmax")])
def test_a_rank_stores_what_the_description_says(case: Case) -> None:
    for held, said in run_ranks(parameters_held, 4, case):
        assert held == said


LEVELS = {
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "kept attention": {"recompute": "full", "memory": (("recompute_keeps_attention", True),)},
    "offloaded": {"recompute": "full", "memory": (("cpu_offloading", True),)},
}
BY_DEFAULT = ("kept attention",)


def trained(rank: int, world_size: int, case: Case) -> tuple[list[StepResult], list[Tensor], int]:
    """Three steps, the parameters after them, and bytes of rows that were exchanged."""
    sent = 0
    with pytest.MonkeyPatch.context() as patch:
        exchange = dist.all_to_all_single

        def counted(out: Tensor, x: Tensor, *args: Any, **options: Any) -> Any:
            nonlocal sent
            if args and x.dtype.is_floating_point and x.ndim < 3:
                to, me = args[1], dist.get_rank(options["group"])
                width = x.numel() // max(1, len(x)) * x.element_size()
                sent += (sum(to) - to[me]) * width
            return exchange(out, x, *args, **options)

        patch.setattr(dist, "all_to_all_single", counted)
        step = train_step_of(case)
        found = [
            step.run(shards_of(number, case, step), step=number + 1, lr=3e-3) for number in range(3)
        ]
    dist.barrier()
    held = [p.detach().to_local().clone() for p in step.model.parameters()]  # type: ignore[attr-defined]
    return found, held, sent


@pytest.mark.parametrize(
    "level",
    [x if x in BY_DEFAULT else pytest.param(x, marks=pytest.mark.slow) for x in LEVELS],
)
@pytest.mark.parametrize("style", ["sigmoid", pytest.param("softmax", marks=pytest.mark.slow)])
def test_recomputation_changes_no_bit(level: str, style: str) -> None:
    case = Case(tp=2, cp=2, ep=4, style=style, document_mask=True)
    again = replace(case, **LEVELS[level])  # type: ignore[arg-type]
    for before, after in zip(plain(case), run_ranks(trained, 4, again), strict=True):
        assert before[0] == after[0]
        assert all(map(torch.equal, before[1], after[1]))


@cache
def plain(case: Case) -> list[tuple[list[StepResult], list[Tensor], int]]:
    return run_ranks(trained, 4, case)


def test_a_dispatch_sends_what_the_formula_says() -> None:
    # Each of 4 ranks has 16 tokens of its own in each of 3 steps, and 2 layers with 2 experts each.
    case = Case(tp=2, cp=2, ep=4, document_mask=True)
    row, weight, uniform = 16 * 8, 8, 3 / 4
    rows = 4 * SEQ * 3 * 2 * 2
    sent = sum(result[2] for result in plain(case))
    expected = 2 * rows * (2 * row + weight) * uniform
    assert sent == pytest.approx(expected, rel=0.05)
    # A second run sends the tokens once more, but not the results, which nobody reads.
    again = run_ranks(trained, 4, replace(case, recompute="full"))
    more = sum(result[2] for result in again) - sent
    assert more / sent == pytest.approx((row + weight) / (4 * row + 2 * weight), rel=1e-12)


def routed_once(rank: int, world_size: int, case: Case) -> tuple[int, int]:
    """How often tokens were counted and scores were ranked in a step with recomputation."""
    counted = ranked = 0
    with pytest.MonkeyPatch.context() as patch:
        route = expert_mixture.route

        def counting(*args: Any) -> Any:
            nonlocal counted
            counted += 1
            return count_rows(*args)

        def routing(*args: Any, **options: Any) -> Any:
            nonlocal ranked
            ranked += options.get("experts") is None
            return route(*args, **options)

        patch.setattr(expert_mixture, "count_rows", counting)
        patch.setattr(expert_mixture, "route", routing)
        step = train_step_of(case)
        step.run(shards_of(0, case, step), step=1, lr=3e-3)
    dist.barrier()
    return counted, ranked


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_second_run_reuses_the_choice(recompute: str) -> None:
    case = Case(cp=2, ep=2, recompute=recompute)
    assert run_ranks(routed_once, 2, case) == [(8, 8)] * 2  # 4 micro batches, 2 layers


def biases_after(rank: int, world_size: int, case: Case) -> list[float]:
    """The largest bias of an expert after a skipped step, an evaluation, and a step."""
    step, found = train_step_of(case), list[float]()
    biases = [buffer for name, buffer in step.model.named_buffers() if "expert_bias" in name]
    shards = shards_of(0, case, step)
    for accept in (lambda loss, norm: loss < 0, None, lambda loss, norm: loss > 0):
        if accept is None:
            step.evaluate(shards)
        else:
            step.run(shards, step=1, lr=3e-3, accept=accept)
        found.append(max(float(bias.abs().max()) for bias in biases))
    return found


def test_only_an_applied_step_moves_the_biases_of_experts() -> None:
    moved = pytest.approx(0.05)
    assert run_ranks(biases_after, 2, Case(cp=2, ep=2)) == [[0.0, 0.0, moved]] * 2
