"""A tiny mixture of experts that is trained on any grid: the cases of several tests."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.config import (
    Config,
    DataConfig,
    MemoryConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from cp_megatron.config.schema.parallel_config import FsdpReshard
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import IGNORED, Batch, microbatches
from cp_megatron.data.rows.sampler import ConcatenatedRows
from cp_megatron.model.parallelize import build_model
from cp_megatron.pipeline import StageLinks
from cp_megatron.plan import Grid, Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.spec import keeps_whole_weights
from cp_megatron.train.muon import choose_optimizer
from cp_megatron.train.shard import Shard
from cp_megatron.train.step import StepResult, TrainStep
from tests.data.ranges import range_of
from tests.model.grids import LLAMA

SEQ, ROWS, VOCAB = 16, 4, 257
STEPS = 20
MODEL = replace(
    LLAMA,
    hidden_size=16,
    num_query_groups=4,
    init_method_std=0.2,
    num_experts=8,
    moe_ffn_hidden_size=12,
    moe_shared_expert_intermediate_size=8,
    moe_shared_expert_gate=True,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_bias_update_rate=0.05,
    moe_aux_loss_coeff=0.5,
    moe_z_loss_coeff=0.01,
)
SOFTMAX = replace(
    MODEL,
    moe_router_score_function="softmax",
    moe_router_enable_expert_bias=False,
    moe_router_pre_softmax=True,
    moe_router_add_bias=True,
    moe_router_topk=3,
    moe_shared_expert_intermediate_size=None,
    moe_shared_expert_gate=False,
    add_mlp_bias=True,
    moe_layers=(1,),
)
STYLES = {
    "sigmoid": MODEL,
    "softmax": SOFTMAX,
    "dense": replace(LLAMA, hidden_size=16, init_method_std=0.2),
    "tied": replace(
        LLAMA, hidden_size=16, init_method_std=0.2, untie_embeddings_and_output_weights=False
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A grid, and how batches are computed on it."""

    style: str = "sigmoid"
    tp: int = 1
    cp: int = 1
    dp: int = 1
    ep: int = 1
    replicas: int = 1
    pp: int = 1
    num_chunks: int = 1
    num_layers: int = 2
    fsdp_reshard: FsdpReshard | None = None  # auto with stages, as for a large model without them
    micro_batch_size: int = 1
    document_mask: bool = False
    padding: int = 0
    recompute: str = "none"
    kind: str = "seq_aux_loss"
    optimizer: str = "adam"
    dtype: str = "float64"
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    memory: tuple[tuple[str, Any], ...] = ()

    @property
    def grid(self) -> Grid:
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        return Grid(replicas=self.replicas, ep=self.ep, **sizes)


def config_of(case: Case) -> Config:
    model = replace(
        STYLES[case.style],
        num_layers=case.num_layers,
        hidden_dropout=case.hidden_dropout,
        attention_dropout=case.attention_dropout,
    )
    if model.num_experts:
        model = replace(model, moe_router_load_balancing_type=case.kind)
    memory = MemoryConfig(recompute_granularity=case.recompute, **dict(case.memory))  # type: ignore[arg-type]
    reshard = case.fsdp_reshard or ("auto" if case.pp > 1 else "always")
    return Config(
        model=model,
        parallel=ParallelConfig(sequence_parallel=case.tp > 1, fsdp_reshard=reshard),
        data=DataConfig(seq_length=SEQ, micro_batch_size=case.micro_batch_size),
        train=TrainConfig(seed=5),
        optimizer=OptimizerConfig(optimizer=case.optimizer, lr=3e-3, weight_decay=0.1),  # type: ignore[arg-type]
        memory=memory,
    )


def train_step_of(case: Case) -> TrainStep:
    config = config_of(case)
    has_experts = bool(config.model.num_experts)
    groups = ParallelGroups.create(case.grid, "cpu", has_experts=has_experts)
    stages = Stages.split(
        [1.0] * case.num_layers, first=0, last=0.5, num_stages=case.pp, num_chunks=case.num_chunks
    )
    model = build_model(
        config,
        groups,
        vocab_size=VOCAB,
        dtype=case.dtype,  # type: ignore[arg-type]
        device="cpu",
        chunks=stages.of(groups.coordinates.pp),
    )
    cpu = torch.device("cpu")
    length = SEQ * (case.micro_batch_size if case.document_mask else 1)
    return TrainStep(
        model=model,
        optimizer=choose_optimizer(model, config.optimizer, group=groups.stage, device=cpu),
        groups=groups,
        cp=ContextParallel(
            groups.cp,
            Mask.causal(length + case.padding),
            kernel="reference" if case.attention_dropout else "auto",
        ),
        device=cpu,
        seed=5,
        clip_grad=0.5,
        reduces_once=keeps_whole_weights(config, case.grid, model.spec),
        stream_dtype=getattr(torch, case.dtype),
        links=StageLinks(groups.channels),
    )


def batches_of(step: int, case: Case, train_step: TrainStep) -> list[Batch]:
    """Rows with unevenly masked labels."""
    tokens = (np.arange(4096) * 7 % 61).astype(np.uint16)
    tokens[::13] = 256
    place = train_step.groups.coordinates
    found = list(
        microbatches(
            ConcatenatedRows(range_of(tokens), seq_length=SEQ, seed=3),
            consumed=step * ROWS,
            global_batch_size=ROWS,
            micro_batch_size=case.micro_batch_size,
            dp_rank=place.dp,
            dp_size=case.dp,
            document_mask=case.document_mask,
            padding=case.padding,
        )
    )
    first = place.dp * (ROWS // case.dp)
    for number, batch in enumerate(found):
        labels = batch.labels[:, : batch.labels.shape[1] - case.padding].unflatten(1, (-1, SEQ))
        for local, row in enumerate(labels.flatten(0, 1)):
            row[: 2 * (first + number * case.micro_batch_size + local)] = IGNORED
    return found


def shards_of(step: int, case: Case, train_step: TrainStep) -> list[Shard]:
    return [train_step.prepare(batch) for batch in batches_of(step, case, train_step)]


def steps_of(case: Case, step: TrainStep, first: int, last: int) -> list[StepResult]:
    return [
        step.run(shards_of(number, case, step), step=number + 1, lr=3e-3)
        for number in range(first, last)
    ]


def train(rank: int, world_size: int, case: Case, steps: int = STEPS) -> list[StepResult]:
    return steps_of(case, train_step_of(case), 0, steps)


def whole(step: TrainStep) -> dict[str, Tensor]:
    """All parameters, moments and biases of experts."""
    found = {name: buffer.clone() for name, buffer in step.model.named_buffers()}
    for name, parameter in step.model.named_parameters():
        held = {name: parameter, **step.optimizer.state[parameter]}
        for key, value in held.items():
            found[f"{name} {key}"] = (
                value.full_tensor().detach() if isinstance(value, DTensor) else value.clone()
            )
    return found


def described(case: Case) -> str:
    changed = {row.name: getattr(case, row.name) for row in fields(Case)}
    return ",".join(f"{k}={v}" for k, v in changed.items() if v != getattr(Case(), k))
