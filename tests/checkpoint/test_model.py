"""The real model with AdamW, saved on TP2 x CP2, loads on every grid with the same bits."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.errors import ConfigError
from cp_megatron.train.step import TrainStep
from tests.checkpoint.toy import save_checkpoint, whole
from tests.ranks import run_ranks
from tests.train.checkpoints import tensors_of
from tests.train.test_step import STYLES, VOCAB, Case, config_of, shards_of, train_step_of

STEPS = 2
# Tied embedding, biases, padded vocabulary, and fewer heads of keys than TP4 has ranks.
MODEL = replace(STYLES["gpt"], num_query_groups=2)
SAVED = Case(tp=2, cp=2)
CASES = [SAVED, Case(cp=4), Case(tp=4), Case(tp=2, dp=2), Case(dp=4), Case()]

State = dict[str, Tensor]


def train_step_for(case: Case) -> TrainStep:
    with mock.patch.dict(STYLES, gpt=MODEL):
        return train_step_of("gpt", case)


def train(train_step: TrainStep, case: Case, start: int) -> list[float]:
    """Returns the losses of the next two steps; the second one depends on the optimizer state."""
    return [
        train_step.run(shards_of(step, case, train_step), step=step, lr=3e-3).loss
        for step in range(start, start + STEPS)
    ]


def state_of(train_step: TrainStep) -> State:
    """Returns the whole tensors of model and optimizer, named as in a checkpoint."""
    found = {}
    for name, parameter in train_step.model.named_parameters():
        found[f"model.{name}"] = whole(parameter)
        for moment, value in train_step.optimizer.state[parameter].items():
            found[f"optimizer.{name}.{moment}"] = whole(value)
    return found


def train_and_save(rank: int, world_size: int, folder: Path) -> tuple[State, list[float]]:
    """Returns what was saved, and the losses of the next steps."""
    train_step = train_step_for(SAVED)
    train(train_step, SAVED, 0)
    save_checkpoint(
        folder,
        step=STEPS,
        consumed=8,
        model=train_step.model,
        optimizer=train_step.optimizer,
        config=config_of("gpt", SAVED),
        grid=train_step.groups.grid,
        data_fingerprint="abc",
        vocab_size=VOCAB,
    )
    return state_of(train_step), train(train_step, SAVED, STEPS)


def load(rank: int, world_size: int, case: Case, folder: Path) -> tuple[State, list[float]]:
    """Returns what was loaded and, on the grid of the save, the losses of the next steps."""
    train_step = train_step_for(case)
    with torch.no_grad():
        for parameter in train_step.model.parameters():
            parameter.fill_(99)
    load_checkpoint(folder, model=train_step.model, optimizer=train_step.optimizer)
    loaded = state_of(train_step)
    return loaded, train(train_step, case, STEPS) if case == SAVED else []


def load_another(rank: int, world_size: int, folder: Path) -> str:
    train_step = train_step_of("llama", Case(cp=2))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(folder, model=train_step.model, optimizer=train_step.optimizer)
    return str(refused.value)


@functools.cache
def saved() -> tuple[tempfile.TemporaryDirectory[str], Path, State, list[float]]:
    """One checkpoint for all tests; no test changes it."""
    holder = tempfile.TemporaryDirectory()
    state, losses = run_ranks(train_and_save, 4, Path(holder.name), timeout=120)[0]
    return holder, Path(holder.name, f"step-{STEPS}"), state, losses


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"tp{case.tp} cp{case.cp} dp{case.dp}")
def test_loads_on_any_grid(case: Case) -> None:
    _, folder, expected, further = saved()
    for state, losses in run_ranks(load, case.tp * case.cp * case.dp, case, folder):
        assert state.keys() == expected.keys()
        for name, tensor in expected.items():
            assert state[name].dtype == tensor.dtype, name
            assert torch.equal(state[name], tensor), name
        assert losses == (further if case == SAVED else [])


def test_the_shards_hold_the_tensors_of_the_ranks() -> None:
    _, folder, expected, _ = saved()
    stored = tensors_of(folder)
    assert stored.keys() == {name for name in expected if not name.endswith(".step")}
    assert any(name.endswith(".exp_avg_sq") for name in stored)
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name


def test_another_model_is_refused_on_every_rank() -> None:
    answers = run_ranks(load_another, 2, saved()[1])
    assert answers[0] == answers[1]
    differences = answers[0].partition(" is of another model: ")[2]
    assert differences.startswith("model.")
