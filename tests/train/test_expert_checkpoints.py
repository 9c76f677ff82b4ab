"""A checkpoint of a mixture of experts continues exactly on other grids, bit for bit on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.save import start_save
from cp_megatron.train.step import StepResult
from tests.ranks import run_ranks
from tests.train.expert_training import (
    VOCAB,
    Case,
    config_of,
    described,
    steps_of,
    train_step_of,
    whole,
)

SAVED, STEPS = 2, 4
CASE = Case(dp=2, cp=2, ep=4)
OTHERS = [
    Case(),
    Case(dp=2, cp=2, ep=2),
    Case(tp=2, cp=2, ep=2),
    Case(tp=4, ep=4),
    Case(cp=2),
]
MUON = [replace(case, optimizer="muon") for case in OTHERS]
Trained = tuple[list[StepResult], dict[str, Tensor]]


def train_and_save(rank: int, world_size: int, case: Case, folder: str) -> Trained:
    step = train_step_of(case)
    steps_of(case, step, 0, SAVED)
    start_save(
        Path(folder),
        step=SAVED,
        consumed=4 * SAVED,
        model=step.model,
        optimizer=step.optimizer,
        config=config_of(case),
        grid=case.grid,
        data_fingerprint="",
        vocab_size=VOCAB,
        background=False,
    ).wait()
    return steps_of(case, step, SAVED, STEPS), whole(step)


def load_and_train(rank: int, world_size: int, case: Case, folder: str) -> Trained:
    step = train_step_of(case)
    load_checkpoint(Path(folder), model=step.model, optimizer=step.optimizer)
    return steps_of(case, step, SAVED, STEPS), whole(step)


Saved = Callable[[str], tuple[str, Trained]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """For an optimizer, a checkpoint, and how training went on after it."""

    @cache
    def made(optimizer: str) -> tuple[str, Trained]:
        folder = str(tmp_path_factory.mktemp(optimizer))
        case = replace(CASE, optimizer=optimizer)
        (trained, *_) = run_ranks(train_and_save, 4, case, folder)
        return f"{folder}/step-{SAVED}", trained

    return made


@pytest.mark.parametrize(
    "case", [*OTHERS, *(pytest.param(case, marks=pytest.mark.slow) for case in MUON)], ids=described
)
def test_another_grid_continues_exactly(case: Case, saved: Saved) -> None:
    folder, (results, tensors) = saved(case.optimizer)
    found, held = run_ranks(load_and_train, case.grid.world_size, case, folder)[0]
    for here, there in zip(found, results, strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-10)
        assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-10)
        assert here.experts is not None
        assert there.experts is not None
        assert here.experts.counts == there.experts.counts
    assert held.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(held[name], tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_same_grid_continues_bit_for_bit(optimizer: str, saved: Saved) -> None:
    folder, (results, tensors) = saved(optimizer)
    case = replace(CASE, optimizer=optimizer)
    found, held = run_ranks(load_and_train, 4, case, folder)[0]
    assert found == results
    assert held.keys() == tensors.keys()
    assert all(torch.equal(held[name], tensors[name]) for name in tensors)
    biases = [tensor for name, tensor in tensors.items() if name.endswith("expert_bias")]
    assert len(biases) == 2
    assert all(bias.abs().max() > 0.09 for bias in biases)
