"""Training on any grid equals training on one rank: 20 steps in float64."""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import (
    Config,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.ahead import Ahead
from cp_megatron.data.batch.batch import IGNORED, Batch, microbatches
from cp_megatron.data.rows.sampler import ConcatenatedRows
from cp_megatron.model.parallelize import build_model
from cp_megatron.plan import Grid, Mask, Schedule
from cp_megatron.train.optimizer import make_optimizer
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import StepResult, TrainStep
from tests.data.ranges import range_of
from tests.ranks import run_ranks

SEQ_LENGTH, BATCH, STEPS, VOCAB = 32, 4, 20, 257
SHAPE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
STYLES = {
    "gpt": ModelConfig(**SHAPE),
    "llama": ModelConfig(
        **SHAPE,
        num_query_groups=2,
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        disable_bias_linear=True,
        untie_embeddings_and_output_weights=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A grid, and how batches are computed on it."""

    tp: int = 1
    cp: int = 1
    dp: int = 1
    replicas: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    document_mask: bool = False
    recompute: str = "none"
    clip_grad: float = 0.5
    exchange: str = "auto"
    sizes: tuple[int, int] | None = None
    layout: str = "auto"
    window: tuple[int, int] | None = None
    window_layers: tuple[int, ...] | None = None
    padding: int = 0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    mlp_tile_size: int | None = None
    steps: int = STEPS


def config_of(style: str, case: Case) -> Config:
    model = replace(
        STYLES[style],
        attention_dropout=case.attention_dropout,
        hidden_dropout=case.hidden_dropout,
        window_size=case.window,
        window_layers=case.window_layers,
    )
    return Config(
        model=model,
        parallel=ParallelConfig(
            tensor_parallel_size=case.tp,
            context_parallel_size=case.cp,
            sequence_parallel=case.sequence_parallel,
            fsdp_reshard="always",  # auto would take the tiny model for what it is
        ),
        data=DataConfig(seq_length=SEQ_LENGTH, micro_batch_size=case.micro_batch_size),
        train=TrainConfig(seed=5),
        memory=MemoryConfig(recompute_granularity=case.recompute, mlp_tile_size=case.mlp_tile_size),
    )


def train_step_of(style: str, case: Case) -> TrainStep:
    config = config_of(style, case)
    groups = ParallelGroups.create(
        Grid(dp=case.dp, cp=case.cp, tp=case.tp, replicas=case.replicas), "cpu"
    )
    model = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device="cpu")
    optimizer = make_optimizer(model.parameters(), replace(config.optimizer, lr=1e-3))
    length = SEQ_LENGTH * (case.micro_batch_size if case.document_mask else 1)
    return TrainStep(
        model=model,
        optimizer=optimizer,
        groups=groups,
        cp=ContextParallel(
            groups.cp,
            Mask.causal(length + case.padding, config.model.row_window),
            layout=case.layout,
            exchange=case.exchange,
            hierarchical_sizes=case.sizes,
            kernel="reference" if case.attention_dropout else "auto",
        ),
        device=torch.device("cpu"),
        seed=5,
        clip_grad=case.clip_grad,
    )


def batches_of(step: int, case: Case, groups: ParallelGroups) -> list[Batch]:
    """Rows with unevenly masked labels: row 1 has none in either half that a CP2 rank holds."""
    tokens = (np.arange(4096) * 7 % 61).astype(np.uint16)
    tokens[::13] = 256
    rows = ConcatenatedRows(range_of(tokens), seq_length=SEQ_LENGTH, seed=3)
    found = list(
        microbatches(
            rows,
            consumed=step * BATCH,
            global_batch_size=BATCH,
            micro_batch_size=case.micro_batch_size,
            dp_rank=groups.coordinates.dp,
            dp_size=case.dp,
            document_mask=case.document_mask,
            window=config_of("gpt", case).model.row_window,
            padding=case.padding,
        )
    )
    first = groups.coordinates.dp * (BATCH // case.dp)
    for number, batch in enumerate(found):
        labels = batch.labels[:, : batch.labels.shape[1] - case.padding]
        labels = labels.view(case.micro_batch_size, SEQ_LENGTH)
        for local in range(case.micro_batch_size):
            row = first + number * case.micro_batch_size + local
            labels[local, : 3 * row] = IGNORED
            if row == 1:
                labels[local, 8:24] = IGNORED
                labels[local, 25:] = IGNORED
            if row == 2:
                labels[local] = IGNORED
    return found


def shards_of(step: int, case: Case, train_step: TrainStep) -> list[Shard]:
    return [train_step.prepare(batch) for batch in batches_of(step, case, train_step.groups)]


def train(rank: int, world_size: int, style: str, case: Case) -> list[StepResult]:
    train_step = train_step_of(style, case)
    return [
        train_step.run(shards_of(number, case, train_step), step=number + 1, lr=3e-3)
        for number in range(case.steps)
    ]


# Every (tp, cp, dp) of 4 ranks. Twenty steps on one grid are in test_pipeline.py, by default.
CASES = [
    *(
        pytest.param(style, case, marks=pytest.mark.slow)
        for style, case in [
            ("llama", Case(cp=2, dp=2)),
            ("gpt", Case(tp=2, dp=2)),
            ("gpt", Case(dp=4)),
            ("llama", Case(cp=2, dp=2, replicas=2)),
            ("gpt", Case(cp=4)),
            ("gpt", Case(tp=2, cp=2, sequence_parallel=True, micro_batch_size=2)),
            ("llama", Case(tp=4, micro_batch_size=2)),
            ("llama", Case(dp=4, replicas=2)),
            ("llama", Case(tp=2, dp=2, replicas=2)),
            ("llama", Case(dp=4, replicas=4)),
        ]
    ),
]
MIXED: dict[str, Any] = {"window": (5, 0), "window_layers": (1,)}
# With and without sequence parallelism, accumulation, clipping, recomputation; the other exchanges,
# layouts and masks: what differs shows in a few steps.
CASES += [
    (style, replace(case, steps=4))
    for style, case in [
        ("gpt", Case(tp=2, cp=2, sequence_parallel=True, micro_batch_size=2)),
        ("llama", Case(cp=2, dp=2)),
        ("llama", Case(tp=2, dp=2, sequence_parallel=True, micro_batch_size=2)),
        ("gpt", Case(tp=4, sequence_parallel=True, micro_batch_size=4, clip_grad=0.0)),
        ("gpt", Case(dp=4, replicas=2)),
        ("llama", Case(dp=4, replicas=4)),
        ("llama", Case(tp=2, dp=2, replicas=2, sequence_parallel=True)),
        ("llama", Case(tp=2, cp=2, micro_batch_size=2, attention_dropout=0.3, recompute="full")),
        ("llama", Case(cp=4, exchange="a2a+p2p", sizes=(2, 2), micro_batch_size=4, padding=8)),
        ("gpt", Case(cp=4, exchange="all_gather", document_mask=True, micro_batch_size=2)),
        ("gpt", Case(cp=4, layout="balanced", window=(9, 0), document_mask=True, padding=4)),
    ]
]
# Each part of these is in one of those.
CASES += [
    pytest.param(style, replace(case, steps=4), marks=pytest.mark.slow)
    for style, case in [
        ("gpt", Case(dp=4)),
        ("llama", Case(tp=4, micro_batch_size=2)),
        ("llama", Case(cp=4, micro_batch_size=4)),
        ("llama", Case(cp=4, exchange="a2a")),
        ("llama", Case(dp=2, cp=2, exchange="a2a", attention_dropout=0.3)),
        ("llama", Case(tp=2, cp=2, sequence_parallel=True, micro_batch_size=4, recompute="full")),
        ("llama", Case(tp=2, cp=2, **MIXED, exchange="a2a", recompute="full")),
        ("gpt", Case(tp=2, cp=2)),
        ("llama", Case(tp=2, cp=2, micro_batch_size=2)),
        ("llama", Case(tp=2, cp=2, micro_batch_size=4, recompute="selective")),
        ("gpt", Case(tp=2, cp=2, document_mask=True, micro_batch_size=2)),
        ("gpt", Case(tp=2, cp=2, exchange="a2a", window=(9, 0), document_mask=True)),
        ("llama", Case(tp=2, cp=2, micro_batch_size=2, **MIXED, document_mask=True)),
        ("llama", Case(cp=4, **MIXED, document_mask=True, sequence_parallel=True)),
    ]
]


def alone(case: Case) -> Case:
    """The same training without a grid."""
    kept = ("document_mask", "clip_grad", "window", "window_layers")
    kept += ("attention_dropout", "hidden_dropout")
    special = case.window or case.attention_dropout
    steps = case.steps if special else STEPS
    return Case(**{name: getattr(case, name) for name in kept}, steps=steps)


@cache
def on_one_rank(style: str, case: Case) -> list[StepResult]:
    return run_ranks(train, 1, style, case)[0]


def described(value: object) -> str:
    """What a case changes."""
    if not isinstance(value, Case):
        return str(value)
    changed = {row.name: getattr(value, row.name) for row in fields(Case)}
    return ",".join(f"{k}={v}" for k, v in changed.items() if v != getattr(Case(), k))


@pytest.mark.parametrize(("style", "case"), CASES, ids=described)
def test_twenty_steps_equal_one_rank(style: str, case: Case) -> None:
    reference = on_one_rank(style, alone(case))
    assert reference[0].loss - reference[-1].loss > (0.5 if len(reference) == STEPS else 0.1)
    assert max(result.grad_norm for result in reference) > 0.5
    for results in run_ranks(train, 4, style, case):
        for here, there in zip(results, reference[: case.steps], strict=True):
            assert here.loss == pytest.approx(there.loss, rel=1e-10)
            assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-10)


def train_ahead(rank: int, world_size: int, case: Case) -> tuple[list[StepResult], list[str]]:
    """Trains on shards that a thread prepares; also returns which threads planned."""
    train_step = train_step_of("llama", case)
    planners: list[str] = []
    steps = (shards_of(step, case, train_step) for step in range(case.steps))
    with pytest.MonkeyPatch.context() as patch, Ahead(steps) as ahead:
        plan = Schedule.rounds

        def rounds(self: Schedule, rank: int) -> object:
            planners.append(threading.current_thread().name)
            return plan(self, rank)

        patch.setattr(Schedule, "rounds", rounds)
        found = [train_step.run(shards, step=step, lr=3e-3) for step, shards in enumerate(ahead, 1)]
    return found, planners


@pytest.mark.parametrize("window", [{}, MIXED])
def test_steps_planned_ahead_have_the_same_bits_and_need_no_more_planning(window: Any) -> None:
    case = Case(cp=2, document_mask=True, micro_batch_size=2, steps=4, **window)
    direct = run_ranks(train, 2, "llama", case)
    for (found, planners), expected in zip(run_ranks(train_ahead, 2, case), direct):
        assert found == expected
        assert len(planners) >= case.steps * (2 if window else 1)
        assert all(name.startswith("ahead") for name in planners)


def contexts_of_a_batch(rank: int, world_size: int) -> list[tuple[object, ...]]:
    """Exchange, route and layout of each layer, and the pairs of the shard."""
    case = Case(cp=2, document_mask=True, micro_batch_size=4, **MIXED)
    train_step = train_step_of("llama", case)
    (batch,) = batches_of(0, case, train_step.groups)
    shard, config = train_step.prepare(batch), train_step.model.config
    found: list[tuple[object, ...]] = []
    dense = 0
    for cp in train_step.model.layer_contexts(shard.cp):
        schedule = cp.schedule(4, 2, 8)
        found.append((schedule.exchange, schedule.route, cp.layout, cp.mask.window))
        dense += int(Mask.documents(batch.mask.lengths, window=cp.mask.window).dense().sum())
    assert shard.num_pairs == dense / config.num_layers / case.cp
    return found


def test_layers_with_and_without_the_window_share_layout_and_exchange() -> None:
    for whole, windowed in run_ranks(contexts_of_a_batch, 2):
        assert whole[:3] == windowed[:3]
        assert (whole[3], windowed[3]) == ((-1, 0), (5, 0))


def masked_everywhere(rank: int, world_size: int) -> StepResult:
    case = Case(cp=2)
    train_step = train_step_of("llama", case)
    batches = batches_of(0, case, train_step.groups)
    for batch in batches:
        batch.labels.fill_(IGNORED)
    return train_step.run([train_step.prepare(batch) for batch in batches], step=1, lr=1e-3)


def test_a_batch_without_labels_has_loss_zero() -> None:
    for result in run_ranks(masked_everywhere, 2):
        pairs = BATCH * SEQ_LENGTH * (SEQ_LENGTH + 1) / 2
        assert result == StepResult(loss=0.0, grad_norm=0.0, num_pairs=pairs)
