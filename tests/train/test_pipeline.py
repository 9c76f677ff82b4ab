"""Training on pipeline stages equals training on one rank: 20 steps in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from cp_megatron.train.step import StepResult
from tests.ranks import run_ranks
from tests.train.expert_training import STEPS, Case, described, train


@cache
def on_one_rank(case: Case, steps: int) -> list[StepResult]:
    return run_ranks(train, 1, case, steps)[0]


def alone(case: Case) -> Case:
    names = ("style", "document_mask", "kind", "hidden_dropout", "attention_dropout", "optimizer")
    kept: dict[str, Any] = {name: getattr(case, name) for name in names}
    return Case(**kept, num_layers=case.num_layers, micro_batch_size=case.micro_batch_size)


def grids(world_size: int) -> list[dict[str, int]]:
    """Every (pp, tp, cp, dp) of so many ranks with several stages."""
    sizes = [size for size in (1, 2, 4, 8) if size <= world_size]
    return [
        {"pp": pp, "tp": tp, "cp": cp, "dp": world_size // pp // tp // cp}
        for pp in sizes[1:]
        for tp in sizes
        for cp in sizes
        if world_size % (pp * tp * cp) == 0
    ]


FOUR = {"num_layers": 4, "document_mask": True}
QUICK = [
    (Case(pp=2, cp=2, style="tied", hidden_dropout=0.1, attention_dropout=0.1, **FOUR), 6),
    (Case(pp=2, tp=2, ep=2, num_chunks=2, **FOUR), 6),
    (Case(pp=2, dp=2, style="dense", optimizer="muon", **FOUR), 6),
]
LONG = [
    *(case for case, steps in QUICK if steps < STEPS),
    *(Case(**sizes, style=style, **FOUR) for sizes in grids(4) for style in ("tied", "softmax")),
    *(Case(**sizes, num_chunks=2, num_layers=8, style="tied") for sizes in grids(4)),
    *(Case(**sizes, ep=2, **FOUR) for sizes in grids(4) if sizes["pp"] == 2),
    Case(pp=2, dp=2, replicas=2, style="dense", **FOUR),
    Case(pp=2, dp=2, fsdp_reshard="always", **FOUR),
    Case(pp=2, cp=2, recompute="full", num_chunks=2, **FOUR),
    Case(pp=2, tp=2, recompute="selective", **FOUR),
    Case(pp=2, tp=2, num_chunks=2, style="tied", hidden_dropout=0.1, attention_dropout=0.1, **FOUR),
    Case(pp=2, tp=2, cp=2, ep=2, num_chunks=2, **FOUR),
    Case(pp=4, style="tied", optimizer="muon", **FOUR),
    Case(pp=2, tp=2, ep=2, optimizer="muon", **FOUR),
    Case(pp=4, dp=2, style="tied", num_chunks=2, num_layers=8),
]


def check(case: Case, steps: int) -> None:
    reference = on_one_rank(alone(case), steps)
    assert reference[0].loss - reference[-1].loss > 0.02
    for found in run_ranks(train, case.grid.world_size, case, steps, timeout=300):
        for here, there in zip(found, reference, strict=True):
            assert abs(here.loss - there.loss) < 1e-10 * there.loss
            assert abs(here.grad_norm - there.grad_norm) < 1e-10 * there.grad_norm
            assert here.num_pairs == pytest.approx(there.num_pairs)
            if there.experts is not None:
                assert here.experts is not None
                assert here.experts.counts == there.experts.counts
                assert here.experts.aux_loss == pytest.approx(there.experts.aux_loss, rel=1e-10)


@pytest.mark.parametrize(("case", "steps"), QUICK, ids=[described(case) for case, _ in QUICK])
def test_steps_equal_one_rank(case: Case, steps: int) -> None:
    check(case, steps)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG, ids=described)
def test_twenty_steps_equal_one_rank(case: Case) -> None:
    check(case, STEPS)


@pytest.mark.parametrize("recompute", [pytest.param("none", marks=pytest.mark.slow), "full"])
def test_stages_round_as_one_rank(recompute: str) -> None:
    """In bfloat16, rounded copies of weights serve several micro batches in flight, and gradients
    are added up in float32."""
    kept = {"dtype": "bfloat16", "recompute": recompute, "style": "tied", **FOUR}
    case = Case(pp=2, cp=2, num_chunks=2, **kept)
    reference = run_ranks(train, 1, replace(alone(case), dtype="bfloat16"), 3)[0]
    for reshard in ("never", "always"):
        found = run_ranks(train, 4, replace(case, fsdp_reshard=reshard), 3)[0]
        for here, there in zip(found, reference, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=5e-3)
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=2e-2)
