"""The real model with its AdamW: two steps on TP2 x CP2, loaded on every grid, the same bits."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.store import load_checkpoint, save_checkpoint
from cp_megatron.errors import ConfigError
from cp_megatron.train.step import Trainer
from tests.checkpoint.toy import whole
from tests.ranks import run_ranks
from tests.train.checkpoints import tensors_of
from tests.train.test_step import VOCAB, Case, batches_of, config_of, trainer_of

STEPS = 2
STYLES = ("gpt", "llama")  # tied embedding and biases; untied, fewer heads of keys than TP4
SAVED = Case(tp=2, cp=2)
CASES = [SAVED, Case(cp=4), Case(tp=4), Case(tp=2, dp=2), Case(dp=4), Case()]


def train_and_save(
    rank: int, world_size: int, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """What was saved of each style, and the loss of the step after it."""
    states, losses = {}, {}
    for style in STYLES:
        trainer = trainer_of(style, SAVED)
        for step in range(STEPS):
            trainer.step(batches_of(step, SAVED, trainer.groups), step=step, lr=3e-3)
        save_checkpoint(
            folder / style,
            step=STEPS,
            consumed=8,
            model=trainer.model,
            optimizer=trainer.optimizer,
            config=config_of(style, SAVED),
            grid=trainer.groups.grid,
            data_fingerprint="abc",
            vocab_size=VOCAB,
        )
        states[style] = state_of(trainer)
        losses[style] = next_loss(trainer, SAVED)
    return states, losses


def load(
    rank: int, world_size: int, case: Case, folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """What was loaded of each style, and the loss of the step after it."""
    states, losses = {}, {}
    for style in STYLES:
        trainer = trainer_of(style, case)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(99)
        load_checkpoint(
            folder / style / f"step-{STEPS}", model=trainer.model, optimizer=trainer.optimizer
        )
        states[style] = state_of(trainer)
        losses[style] = next_loss(trainer, case)
    return states, losses


def load_another(rank: int, world_size: int, folder: Path) -> str:
    trainer = trainer_of("llama", Case(cp=2))
    with pytest.raises(ConfigError) as refused:
        load_checkpoint(folder, model=trainer.model, optimizer=trainer.optimizer)
    return str(refused.value)


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every number of model and optimizer, whole, named as in a checkpoint."""
    found = {}
    for name, parameter in trainer.model.named_parameters():
        found[f"model.{name}"] = whole(parameter)
        for moment, value in trainer.optimizer.state[parameter].items():
            found[f"optimizer.{name}.{moment}"] = whole(value)
    return found


def next_loss(trainer: Trainer, case: Case) -> float:
    batches = batches_of(STEPS, case, trainer.groups)
    trainer.step(batches, step=STEPS, lr=3e-3)
    # The loss after one more update tells whether the optimizer went on, too.
    batches = batches_of(STEPS + 1, case, trainer.groups)
    return trainer.step(batches, step=STEPS + 1, lr=3e-3).loss


@functools.cache
def saved() -> tuple[
    tempfile.TemporaryDirectory[str], dict[str, dict[str, Tensor]], dict[str, float]
]:
    """One run of each style for all tests; nobody writes to it."""
    holder = tempfile.TemporaryDirectory()
    states, losses = run_ranks(train_and_save, 4, Path(holder.name))[0]
    return holder, states, losses


def folder() -> Path:
    return Path(saved()[0].name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"tp{case.tp} cp{case.cp} dp{case.dp}")
def test_loads_on_any_grid(case: Case) -> None:
    _, expected, further = saved()
    world_size = case.tp * case.cp * case.dp
    for states, losses in run_ranks(load, world_size, case, folder()):
        for style in STYLES:
            assert states[style].keys() == expected[style].keys()
            for name, tensor in expected[style].items():
                assert states[style][name].dtype == tensor.dtype, (style, name)
                assert torch.equal(states[style][name], tensor), (style, name)
        # The same grid does the same sums in the same order, another one does not.
        assert losses == (further if case == SAVED else pytest.approx(further, rel=1e-10))


@pytest.mark.parametrize("style", STYLES)
def test_the_shards_hold_what_the_ranks_held(style: str) -> None:
    expected = saved()[1][style]
    stored = tensors_of(folder() / style / f"step-{STEPS}")
    assert stored.keys() == {name for name in expected if not name.endswith(".step")}
    assert any(name.endswith(".exp_avg_sq") for name in stored)
    for name, tensor in stored.items():
        assert torch.equal(tensor, expected[name]), name


def test_another_model_is_refused_on_every_rank_alike() -> None:
    answers = run_ranks(load_another, 2, folder() / "gpt" / f"step-{STEPS}")
    assert answers[0] == answers[1]
    assert "is of another model: " in answers[0]
    assert "model." in answers[0].partition("is of another model: ")[2]
