"""Dropout on any grid drops what one process drops: loss and gradients, and twenty steps."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from torch import Tensor

from cp_megatron.train.step import StepResult, TrainStep
from tests.model.grids import full, worst
from tests.ranks import run_ranks
from tests.train import expert_training
from tests.train.expert_training import Case as ExpertCase
from tests.train.test_step import Case, alone, described, shards_of, train, train_step_of

TOLERANCE = 1e-12
DROPS: dict[str, Any] = {"hidden_dropout": 0.2, "attention_dropout": 0.3, "clip_grad": 0.0}
SP: dict[str, Any] = {"sequence_parallel": True}
PACKED: dict[str, Any] = {"document_mask": True, "micro_batch_size": 2}


def gradients(
    rank: int, world_size: int, style: str, case: Case | ExpertCase, step: int
) -> tuple[float, dict[str, Tensor]]:
    """The loss and whole gradients of one step."""
    if isinstance(case, ExpertCase):
        train_step = expert_training.train_step_of(case)
        shards = expert_training.shards_of(step, case, train_step)
    else:
        train_step = train_step_of(style, case)
        shards = shards_of(step, case, train_step)
    return gradients_of(train_step, shards)


def gradients_of(train_step: TrainStep, shards: Any) -> tuple[float, dict[str, Tensor]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step.optimizer, "zero_grad", lambda: None)
        loss = train_step.run(shards, step=1, lr=0.0).loss
    named = train_step.model.named_parameters()
    return loss, {name: full(p.grad) for name, p in named if p.grad is not None}


@cache
def on_one_rank(style: str, case: Case | ExpertCase, step: int) -> tuple[float, dict[str, Tensor]]:
    return run_ranks(gradients, 1, style, case, step)[0]


def check(style: str, case: Case | ExpertCase, reference: Case | ExpertCase) -> None:
    expected, expected_gradients = on_one_rank(style, reference, 3)
    ranks = case.dp * case.cp * case.tp
    for loss, found in run_ranks(gradients, ranks, style, case, 3):
        assert loss == pytest.approx(expected, rel=TOLERANCE)
        gap, name = worst(found, expected_gradients)
        assert gap < TOLERANCE, name


QUICK = [
    ("gpt", Case(cp=2, micro_batch_size=2)),
    ("gpt", Case(tp=2, recompute="selective")),
    ("gpt", Case(tp=2, **SP, recompute="full", micro_batch_size=2)),
    ("gpt", Case(dp=2, recompute="full")),
    ("gpt", Case(dp=2, micro_batch_size=2, mlp_tile_size=5)),
    ("llama", Case(tp=2, cp=2, **SP, **PACKED)),
    ("llama", Case(tp=2, cp=2, **SP, recompute="selective", mlp_tile_size=5, **PACKED)),
    ("llama", Case(tp=2, cp=2, recompute="full", mlp_tile_size=5)),
]
GRIDS: list[dict[str, Any]] = [
    *({"cp": 2}, {"tp": 2}, {"tp": 2, **SP}, {"dp": 2}),
    *({"tp": 2, "cp": 2}, {"tp": 2, "cp": 2, **SP}, {"dp": 2, "cp": 2}, {"dp": 2, "tp": 2, **SP}),
]
LONG = [
    ("llama", Case(**grid, **more))
    for grid in GRIDS
    for more in (
        {"mlp_tile_size": 7},
        {"micro_batch_size": 2, "recompute": "selective"},
        {"padding": 4, "recompute": "full", **PACKED},
    )
]


@pytest.mark.parametrize(
    ("style", "case"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)],
    ids=described,
)
def test_gradients_are_those_of_one_process(style: str, case: Case) -> None:
    case = replace(case, **DROPS)
    check(style, case, alone(case))


def test_experts() -> None:
    grid = ExpertCase(tp=2, cp=2, ep=2, hidden_dropout=0.2, micro_batch_size=2, recompute="full")
    check("", grid, ExpertCase(hidden_dropout=0.2))


def test_rows_of_another_step_drop_other_numbers() -> None:
    """The order of the rows' numbers decides, so a global batch is not the next one's copy."""
    case = alone(Case(**DROPS))
    plain = replace(case, hidden_dropout=0.0)
    losses = {on_one_rank("gpt", some, step)[0] for some in (case, plain) for step in (3, 4)}
    assert len(losses) == 4


@pytest.mark.parametrize(
    ("style", "case"),
    [
        ("gpt", Case(tp=2, cp=2, **SP, micro_batch_size=2, steps=4)),
        pytest.param("gpt", Case(tp=2, cp=2, **SP, micro_batch_size=2), marks=pytest.mark.slow),
        pytest.param("llama", Case(dp=2, cp=2, **PACKED), marks=pytest.mark.slow),
    ],
    ids=described,
)
def test_steps_equal_one_rank(style: str, case: Case) -> None:
    case = replace(case, **DROPS | {"clip_grad": 0.5})
    reference = trained_alone(style, alone(case))
    for results in run_ranks(train, 4, style, case):
        for here, there in zip(results, reference, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-10)
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-10)


@cache
def trained_alone(style: str, case: Case) -> list[StepResult]:
    return run_ranks(train, 1, style, case)[0]
