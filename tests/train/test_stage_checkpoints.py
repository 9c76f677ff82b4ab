"""A checkpoint of pipeline stages continues exactly on any grid, bit for bit on its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from cp_megatron.checkpoint.load import load_checkpoint
from cp_megatron.checkpoint.manifest import Manifest, read_manifest
from cp_megatron.checkpoint.object_collectives import all_gather_objects
from cp_megatron.checkpoint.save import Save, SaveCache, start_save
from cp_megatron.errors import ConfigError
from cp_megatron.train.step import StepResult, TrainStep
from tests.ranks import run_ranks
from tests.train.expert_training import (
    VOCAB,
    Case,
    config_of,
    described,
    shards_of,
    steps_of,
    train_step_of,
    whole,
)

SAVED, STEPS = 2, 5
Trained = tuple[list[StepResult], dict[str, Tensor]]


def case(style: str, **sizes: int | str) -> Case:
    return Case(style=style, num_layers=4, document_mask=True, **sizes)  # type: ignore[arg-type]


def whole_of_stages(step: TrainStep) -> dict[str, Tensor]:
    """All parameters, moments and biases of experts, of all stages; copies are equal."""
    found = whole(step)
    merged = dict[str, Tensor]()
    for other in all_gather_objects(found, None):
        for name, tensor in other.items():
            assert torch.equal(merged.setdefault(name, tensor), tensor), name
    return merged


def train_and_save(rank: int, world_size: int, case: Case, folder: str) -> Trained:
    """Saves twice with one plan, and trains on meanwhile."""
    step, cache, group = train_step_of(case), SaveCache(), torch.distributed.new_group()
    under_way: Save | None = None
    for number in range(SAVED):
        steps_of(case, step, number, number + 1)
        if under_way is not None:
            under_way.wait()
        under_way = start_save(
            Path(folder),
            step=number + 1,
            consumed=4 * number + 4,
            model=step.model,
            optimizer=step.optimizer,
            config=config_of(case),
            grid=case.grid,
            data_fingerprint="",
            vocab_size=VOCAB,
            cache=cache,
            process_group=group,
        )
    trained = steps_of(case, step, SAVED, STEPS)
    assert under_way is not None
    under_way.wait()
    return trained, whole_of_stages(step)


def load_and_train(rank: int, world_size: int, case: Case, folder: str) -> Trained:
    step = train_step_of(case)
    load_checkpoint(Path(folder), model=step.model, optimizer=step.optimizer)
    return steps_of(case, step, SAVED, STEPS), whole_of_stages(step)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint, and how training went on after it."""

    folder: Path
    trained: Trained
    keeps: TemporaryDirectory[str]


@cache
def saved(case: Case) -> Saved:
    keeps = TemporaryDirectory()
    (trained, *_) = run_ranks(train_and_save, case.grid.world_size, case, keeps.name)
    return Saved(folder=Path(keeps.name) / f"step-{SAVED}", trained=trained, keeps=keeps)


def assert_same(found: Trained, expected: Trained) -> None:
    for here, there in zip(found[0], expected[0], strict=True):
        assert here.loss == pytest.approx(there.loss, rel=1e-10)
        assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-10)
        if there.experts is not None:
            assert here.experts is not None
            assert here.experts.counts == there.experts.counts
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= 1e-10 * tensor.norm(), name


TIED, EXPERTS = case("tied", pp=2, dp=2), case("sigmoid", pp=2, dp=2, ep=2)
MUON = case("dense", pp=2, tp=2, num_chunks=2, optimizer="muon")
OTHERS = {
    TIED: [case("tied"), case("tied", cp=2, tp=2)],
    EXPERTS: [case("sigmoid")],
}
LONG = {
    EXPERTS: [case("sigmoid", pp=2, tp=2, ep=2)],
    MUON: [case("dense", pp=4, optimizer="muon"), case("dense", optimizer="muon")],
    TIED: [case("tied", pp=4), case("tied", pp=2, num_chunks=2), case("tied", pp=2, cp=2)],
    case("sigmoid", dp=2, cp=2, ep=4): [EXPERTS, case("sigmoid", pp=4)],
    case("dense", pp=4): [case("dense", pp=2, cp=2)],
    case("tied", pp=2, dp=2, replicas=2): [case("tied", pp=4), case("tied", dp=2)],
    case("dense", dp=2, cp=2, optimizer="muon"): [MUON],
}


def pairs(others: dict[Case, list[Case]]) -> list[tuple[Case, Case]]:
    return [(source, target) for source, targets in others.items() for target in targets]


@pytest.mark.parametrize(
    ("source", "target"),
    [*pairs(OTHERS), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in pairs(LONG))],
    ids=described,
)
def test_another_grid_continues_exactly(source: Case, target: Case) -> None:
    written = saved(source)
    found = run_ranks(load_and_train, target.grid.world_size, target, str(written.folder))
    for here in found:
        assert_same(here, written.trained)


@pytest.mark.parametrize(
    "source", [TIED, EXPERTS, pytest.param(MUON, marks=pytest.mark.slow)], ids=described
)
def test_the_same_grid_continues_bit_for_bit(source: Case) -> None:
    written = saved(source)
    found = run_ranks(load_and_train, source.grid.world_size, source, str(written.folder))
    results, tensors = written.trained
    for here, held in found:
        assert here == results
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[name], tensors[name]) for name in tensors)


def test_the_manifest_describes_the_whole_model_once() -> None:
    manifest = read_manifest(saved(case("tied", pp=2, dp=2)).folder)
    alone = read_manifest(saved(case("tied")).folder)
    assert manifest.grid == {"pp": 2, "dp": 2, "cp": 1, "tp": 1}
    assert manifest.optimizer_steps == alone.optimizer_steps
    assert len(alone.optimizer_steps) == sum(name.startswith("model.") for name in alone.tensors)
    assert shapes(manifest) == shapes(alone)
    chunks = manifest.tensors["model.embedding.weight"].chunks
    assert [chunk.offsets for chunk in chunks] == [(0, 0), (192, 0)]


def shapes(manifest: Manifest) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in manifest.tensors.items()}


def losses(rank: int, world_size: int, case: Case, folder: str) -> tuple[float, bool]:
    """The loss of the saved model alone, and whether that left the optimizer without state."""
    step = train_step_of(case)
    load_checkpoint(Path(folder), model=step.model, optimizer=None)
    return step.evaluate(shards_of(0, case, step)), not step.optimizer.state


def test_the_model_alone_is_loaded_for_evaluations() -> None:
    folder = str(saved(TIED).folder)
    found = [
        *run_ranks(losses, 4, TIED, folder),
        *run_ranks(losses, 2, case("tied", cp=2), folder),
        *run_ranks(losses, 1, case("tied"), folder),
    ]
    assert all(stateless for _, stateless in found)
    assert all(loss == pytest.approx(found[0][0], rel=1e-12) for loss, _ in found)
    assert 1 < found[0][0] < 6


def refusal(rank: int, world_size: int, case: Case, folder: str) -> tuple[str, bool]:
    """Why a checkpoint is refused, and whether that left the model as it was."""
    step = train_step_of(case)
    before = whole_of_stages(step)
    try:
        load_checkpoint(Path(folder), model=step.model, optimizer=step.optimizer)
    except ConfigError as error:
        after = whole_of_stages(step)
        return str(error), all(torch.equal(before[name], after[name]) for name in before)
    return "", False


def test_another_model_and_damage_are_refused_alike_on_every_stage(tmp_path: Path) -> None:
    folder = saved(TIED).folder
    stages = replace(TIED, dp=1)
    fewer = run_ranks(refusal, 2, replace(stages, num_layers=3), str(folder))
    assert fewer[0] == fewer[1]
    assert "layers.3.attention.key.weight is not in this model" in fewer[0][0]
    more = run_ranks(refusal, 2, replace(stages, num_layers=5), str(folder))
    assert more[0] == more[1]
    assert "layers.4.attention.key.weight is not in the checkpoint" in more[0][0]
    shutil.copytree(folder, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "rank-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    damaged = run_ranks(refusal, 2, stages, str(shard.parent))
    assert damaged[0] == damaged[1]
    assert "rank-00003.safetensors is damaged" in damaged[0][0]
    assert all(unchanged for found in (fewer, more, damaged) for _, unchanged in found)
