"""Muon is what its papers say, on every grid, and obeys what AdamW obeys."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import OptimizerConfig
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid
from cp_megatron.spec import ParameterSpec
from cp_megatron.tensor_parallel import place as placed
from cp_megatron.tensor_parallel import place_stacked
from cp_megatron.train import muon
from cp_megatron.train.muon import Muon, choose_optimizer
from cp_megatron.train.optimizer import update
from cp_megatron.train.step import StepResult, TrainStep
from tests.ranks import run_ranks
from tests.train.checkpoints import differing, metrics_of, numbers
from tests.train.expert_training import Case as ExpertCase
from tests.train.expert_training import shards_of as expert_shards_of
from tests.train.expert_training import train_step_of as expert_step_of
from tests.train.test_loop import GRIDS, STEPS, STOP, Place, refused, save_again, train
from tests.train.test_loop import place as place  # the fixture
from tests.train.test_step import Case, config_of, shards_of, train_step_of

CPU = torch.device("cpu")
MUON = OptimizerConfig(
    optimizer="muon", lr=0.1, weight_decay=0.2, muon_momentum=0.7, muon_num_ns_steps=3
)
Split = dict[str, int]
# Rows that four ranks cannot share evenly, fewer rows than ranks, both ways to split over tp.
MATRICES: dict[str, tuple[tuple[int, int], Split]] = {
    "wide": ((4, 6), {"tp": 0}),
    "tall": ((10, 4), {"tp": 1}),
    "short": ((2, 8), {}),
    "uneven": ((5, 7), {}),
    "same": ((5, 7), {}),
    "broad": ((4, 6), {"tp": 1}),
}
# Experts whose rows two and four ranks can share evenly, and others.
STACKS = {"shared": (4, 8, 3), "whole": (6, 5, 4)}


class Stacks(nn.Module):
    """Stacked matrices, whole or over ep and edp."""

    def __init__(self, groups: ParallelGroups | None, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        for name, shape in STACKS.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if groups is not None:
                mesh = groups.meshes["ep"]
                value = place_stacked(value.chunk(mesh.size())[mesh.get_local_rank()], mesh, CPU)
            self.register_parameter(name, nn.Parameter(value))
        if groups is not None:
            assert groups.expert_sharding is not None
            ranks = groups["edp"].size()
            fully_shard(
                self,
                mesh=groups.expert_sharding,
                shard_placement_fn=lambda x: Shard(0 if x.shape[1] % ranks else 1),
            )


class Matrices(nn.Module):
    """The matrices, stacks and a vector, whole or on a grid."""

    def __init__(self, groups: ParallelGroups | None, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, (shape, split) in {**MATRICES, "vector": ((6,), {})}.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            if groups is not None:
                spec = ParameterSpec(name=name, shape=shape, init="zeros", split=split)
                value = placed(value, spec, groups.meshes["tp"], "cpu")
            self.register_parameter(name, nn.Parameter(value))
        self.experts = Stacks(groups, dtype)
        if groups is not None:
            fully_shard(self, mesh=groups.sharding)


def made(
    config: OptimizerConfig, groups: ParallelGroups | None = None, dtype: torch.dtype | None = None
) -> tuple[Matrices, Muon]:
    model = Matrices(groups, dtype or torch.float64)
    parameters = dict(model.named_parameters())
    others = [parameters.pop("vector")]
    group = None if groups is None else groups.world
    return model, Muon(list(parameters.values()), others, config, group=group, device=CPU)


def gradient(parameter: Tensor) -> Tensor:
    return parameter.detach().cos() * 3


def oracle(config: OptimizerConfig, updates: int) -> dict[str, Tensor]:
    """Plain Muon, one float64 matrix after another."""
    parameters = dict(Matrices(None, torch.float64).named_parameters())
    del parameters["vector"]
    return {
        name: torch.stack([plain(matrix, config, updates) for matrix in x.detach()])
        if x.ndim == 3
        else plain(x.detach(), config, updates)
        for name, x in parameters.items()
    }


def plain(x: Tensor, config: OptimizerConfig, updates: int) -> Tensor:
    sets = {"simple": [(3.4445, -4.7750, 2.0315)] * 3}
    sets["quintic"] = [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377)]
    sets["quintic"] += [(3.7418, -5.5913, 2.3037)]
    mean = torch.zeros_like(x)
    rows, columns = x.shape
    for _ in range(updates):
        grad = x.cos() * 3
        beta = config.muon_momentum
        mean = beta * mean + (1 - beta) * grad
        o = beta * mean + (1 - beta) * grad if config.muon_nesterov else mean
        o = o / o.square().sum().sqrt()
        for a, b, c in sets[config.muon_coefficient_type]:
            o = a * o + b * o @ o.T @ o + c * o @ o.T @ o @ o.T @ o
        factor = {
            "spectral": max(rows, columns) ** 0.5,
            "unit_rms_norm": (rows / columns) ** 0.5,
            "shape_scaling": max(1, rows / columns) ** 0.5,
        }[config.muon_scale_mode]
        x = x - config.lr * config.weight_decay * x
        x = x - config.lr * factor * config.muon_extra_scale_factor * o
    return x


def updated(
    rank: int, world_size: int, config: OptimizerConfig, grid: Grid | None, updates: int
) -> dict[str, Tensor]:
    """The whole matrices after some updates."""
    groups = None if grid is None else ParallelGroups.create(grid, "cpu", has_experts=True)
    model, optimizer = made(config, groups)
    for _ in range(updates):
        for parameter in model.parameters():
            parameter.grad = gradient(parameter)
        update(optimizer, skip=None)
    values = ((name, x.detach()) for name, x in model.named_parameters() if name != "vector")
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in values}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() < bound * value.norm(), name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"muon_nesterov": True, "muon_scale_mode": "unit_rms_norm"},
        {"muon_coefficient_type": "simple", "muon_scale_mode": "shape_scaling"},
        {"muon_extra_scale_factor": 0.2, "weight_decay": 0.0},
    ],
)
def test_an_update_is_the_plain_one(changes: dict[str, Any]) -> None:
    config = replace(MUON, **changes)
    assert_same(updated(0, 1, config, None, 2), oracle(config, 2), 1e-13)


GRIDS_OF_MATRICES = [
    Grid(cp=2, tp=2),
    Grid(dp=4),
    Grid(cp=2, tp=2, ep=2),
    Grid(dp=4, ep=2, replicas=2),
]


@pytest.mark.parametrize("grid", GRIDS_OF_MATRICES, ids=str)
@pytest.mark.parametrize("elements", [1 << 26, 10])
def test_parts_of_any_size_give_the_plain_update(grid: Grid, elements: int) -> None:
    for found in run_ranks(updated_in_rounds, 4, MUON, grid, elements):
        assert_same(found, oracle(MUON, 3), 1e-13)


def updated_in_rounds(
    rank: int, world_size: int, config: OptimizerConfig, grid: Grid, elements: int
) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "_ROUND_ELEMENTS", elements)
        return updated(rank, world_size, config, grid, 3)


def test_simple_is_torchs_muon() -> None:
    """Torch multiplies in bfloat16."""
    config = replace(MUON, muon_coefficient_type="simple", muon_extra_scale_factor=0.2)
    model, optimizer = made(config, dtype=torch.float32)
    other = Matrices(None, torch.float32)
    reference = torch.optim.Muon(
        [x for x in other.parameters() if x.ndim == 2],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        nesterov=False,
        ns_steps=config.muon_num_ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    for each in (model, other):
        for parameter in each.parameters():
            parameter.grad = gradient(parameter)
    optimizer.step()
    reference.step()
    there = dict(other.named_parameters())
    for name in MATRICES:
        change = model.get_parameter(name) - before[name]
        assert (change - (there[name] - before[name])).norm() < 0.02 * change.norm(), name


def changed(
    dtype: torch.dtype, *, skip: bool | None, times: float = 1.0, factor: float | None = None
) -> list[Tensor]:
    """Parameters and state after two updates, the second of which is asked for as given."""
    model, optimizer = made(MUON, dtype=dtype)
    for number in range(2):
        for parameter in model.parameters():
            parameter.grad = gradient(parameter) * ((math.nan if skip else times) if number else 1)
        second = number == 1
        update(
            optimizer,
            skip=torch.tensor(skip) if second and skip is not None else None,
            factor=torch.tensor(factor, dtype=dtype) if second and factor is not None else None,
        )
    state = [x for held in optimizer.state.values() for x in held.values()]
    return [x.detach() for x in (*model.parameters(), *state)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_update_changes_nothing_and_another_is_as_usual(dtype: torch.dtype) -> None:
    plain = changed(dtype, skip=None)
    assert all(map(torch.equal, changed(dtype, skip=False), plain))
    model, optimizer = made(MUON, dtype=dtype)
    for parameter in model.parameters():
        parameter.grad = gradient(parameter)
    update(optimizer, skip=None)
    once = [*model.parameters(), *(x for held in optimizer.state.values() for x in held.values())]
    assert all(map(torch.equal, changed(dtype, skip=True), once))


def test_a_factor_multiplies_gradients() -> None:
    ours = changed(torch.float64, skip=None, factor=0.3)
    for actual, expected in zip(ours, changed(torch.float64, skip=None, times=0.3)):
        torch.testing.assert_close(actual, expected)
    assert not torch.equal(ours[0], changed(torch.float64, skip=None)[0])


def muon_step_of(style: str, case: Case) -> TrainStep:
    step = train_step_of(style, case)
    config = replace(
        config_of(style, case).optimizer, optimizer="muon", muon_extra_scale_factor=0.2
    )
    optimizer = choose_optimizer(step.model, config, group=step.groups.world, device=CPU)
    return replace(step, optimizer=optimizer)


def train_by_muon(rank: int, world_size: int, style: str, case: Case) -> list[StepResult]:
    step = muon_step_of(style, case)
    return [
        step.run(shards_of(number, case, step), step=number + 1, lr=3e-3)
        for number in range(case.steps)
    ]


@cache
def on_one_rank(style: str) -> list[StepResult]:
    return run_ranks(train_by_muon, 1, style, Case())[0]


@pytest.mark.parametrize(
    ("style", "case"),
    [
        *(  # a pipeline's twenty steps are in the default run (test_pipeline.py)
            pytest.param(style, case, marks=pytest.mark.slow)
            for style, case in [
                ("llama", Case(dp=2, cp=2)),
                ("llama", Case(tp=4, micro_batch_size=2)),  # two key/value heads on four ranks
                ("gpt", Case(tp=2, cp=2, sequence_parallel=True)),
                ("llama", Case(tp=2, dp=2)),
                ("gpt", Case(cp=4)),
                ("llama", Case(dp=4)),
            ]
        ),
    ],
)
def test_twenty_steps_equal_one_rank(style: str, case: Case) -> None:
    reference = on_one_rank(style)
    assert reference[0].loss - reference[-1].loss > 0.5
    for results in run_ranks(train_by_muon, 4, style, case):
        for here, there in zip(results, reference, strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-10)
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-10)


def kinds_of_state(rank: int, world_size: int) -> dict[str, list[str]]:
    step = muon_step_of("llama", Case())
    step.run(shards_of(0, Case(), step), step=1, lr=1e-3)
    state = step.optimizer.state
    return {name: sorted(state[x]) for name, x in step.model.named_parameters()}


def test_only_matrices_inside_layers_have_momentum() -> None:
    (kinds,) = run_ranks(kinds_of_state, 1)
    by_muon = {name for name, keys in kinds.items() if keys == ["momentum_buffer"]}
    of_layers = {name for name in kinds if name.startswith("layers.") and "norm" not in name}
    assert by_muon == of_layers
    assert len(by_muon) == 2 * 7
    assert "embedding.weight" in kinds.keys() - by_muon


def kinds_of_mixture(rank: int, world_size: int) -> dict[str, list[str]]:
    case = ExpertCase(style="softmax", optimizer="muon")
    step = expert_step_of(case)
    step.run(expert_shards_of(0, case, step), step=1, lr=1e-3)
    return {name: sorted(step.optimizer.state[x]) for name, x in step.model.named_parameters()}


def test_experts_and_routers_are_matrices_and_their_biases_are_not() -> None:
    (kinds,) = run_ranks(kinds_of_mixture, 1)
    mlp = {
        name.removeprefix("layers.1.mlp."): keys
        for name, keys in kinds.items()
        if ".1.mlp." in name
    }
    by_muon = {name for name, keys in mlp.items() if keys == ["momentum_buffer"]}
    assert by_muon == {"router.weight", "experts.gate", "experts.up", "experts.down"}
    biases = {"router.bias", *(f"experts.{name}_bias" for name in ("gate", "up", "down"))}
    assert mlp.keys() - by_muon == biases
    assert all("exp_avg_sq" in mlp[name] for name in biases)


@pytest.mark.slow
def test_a_run_continues_on_its_grid_bit_for_bit_and_on_another(place: Place) -> None:
    flags = ["--dtype", "float64", "--optimizer", "muon", "--muon-nesterov", *GRIDS["tp2 cp2"]]
    run_ranks(train, 4, place.argv("whole", *flags))
    run_ranks(train, 4, place.argv("cut", *flags), STOP)
    step = place.folder / "cut" / f"step-{STOP}"
    load = ["--load", str(step), *GRIDS["cp4"], "--save"]
    run_ranks(save_again, 4, [*load, place.run("again")])
    assert differing(step, place.folder / "again" / step.name) == []
    run_ranks(train, 4, [*load, place.run("on")])
    expected = metrics_of(place.folder / "whole")[STOP:]
    for row, other in zip(metrics_of(place.folder / "on"), expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-10)
    run_ranks(train, 4, place.load("cut"))
    whole, cut = place.folder / "whole", place.folder / "cut"
    assert differing(whole / f"step-{STEPS}", cut / f"step-{STEPS}") == []
    assert list(map(numbers, metrics_of(whole))) == list(map(numbers, metrics_of(cut)))
    for error in run_ranks(refused, 4, [*load, place.run("adam"), "--optimizer", "adam"]):
        assert isinstance(error, ConfigError)
        assert (error.flag, error.value) == ("--optimizer", "adam")
        assert error.works.startswith("--optimizer muon, or launch/convert.py --load RUN")
