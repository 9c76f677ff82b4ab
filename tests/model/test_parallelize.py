"""Tests the model on a grid: placements, precision, accumulation."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import Transformer, build_model
from cp_megatron.model.gated_delta_net import Decay, GatedDeltaNet
from cp_megatron.model.parallelize import ComputeDType
from cp_megatron.plan import Grid, Mask
from cp_megatron.spec import ModelSpec
from cp_megatron.tensor_parallel import SpecifiedModule
from tests.model.grids import (
    LLAMA,
    RECURRENT,
    SEQ,
    STYLES,
    VOCAB,
    batch,
    error,
    full,
    no_warnings,
    plain_step,
    run_config,
    worst,
)
from tests.ranks import run_ranks
from tests.tensor_parallel.test_linear import gathered_cross_entropy


def losses_of(model: Transformer, groups: ParallelGroups, row: int | None = None) -> Tensor:
    """This rank's token losses of the batch, or of one row of it; no dp."""
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    tokens, labels = (x if row is None else x[row : row + 1] for x in batch())
    logits = model(cp.shard(tokens, 1), cp=cp)
    return gathered_cross_entropy(logits, cp.shard(labels, 1), groups.tp)


def local_shapes(rank: int, world_size: int, style: str) -> dict[str, list[int]]:
    groups = ParallelGroups.create(Grid(dp=1, cp=2, tp=2), "cpu")
    model = build_model(
        run_config(STYLES[style]), groups, vocab_size=VOCAB, dtype="float32", device="cpu"
    )
    return {
        name: list(p.to_local().shape)
        for name, p in model.named_parameters()
        if isinstance(p, DTensor)
    }


def test_every_rank_holds_its_part() -> None:
    shapes = run_ranks(local_shapes, 4, "llama")[3]
    # [global rows / tp / (dp x cp), columns], row parallel weights [rows / (dp x cp), columns / tp]
    assert shapes["embedding.weight"] == [384 // 4, 32]
    assert shapes["head.weight"] == [384 // 4, 32]
    assert shapes["layers.0.attention.query.weight"] == [32 // 4, 32]
    assert shapes["layers.1.attention.key.weight"] == [16 // 4, 32]
    assert shapes["layers.1.attention.out.weight"] == [32 // 2, 32 // 2]
    assert shapes["layers.0.mlp.gate.weight"] == [LLAMA.ffn_size // 4, 32]
    assert shapes["layers.0.mlp.down.weight"] == [32 // 2, LLAMA.ffn_size // 2]
    assert shapes["layers.0.mlp_norm.weight"] == [32 // 2]
    # one kv head for two tp ranks: replicated over tp
    shared = run_ranks(local_shapes, 4, "mixed")[3]
    assert shared["layers.0.attention.key.weight"] == [8 // 2, 32]
    assert shared["layers.0.attention.query.weight"] == [32 // 4, 32]


@pytest.mark.parametrize("style", STYLES)
def test_the_start_tables_count_is_what_ranks_hold(style: str) -> None:
    grid = Grid(dp=1, cp=2, tp=2)
    for rank, shapes in enumerate(run_ranks(local_shapes, 4, style)):
        spec = ModelSpec.of(STYLES[style], vocab_size=VOCAB, seq_length=SEQ)
        expected = spec.parameters_on_rank(grid, rank)
        assert sum(math.prod(shape) for shape in shapes.values()) == expected


def accumulated(rank: int, world_size: int, sync_every: bool) -> dict[str, Tensor] | None:
    """Gradients of the batch, one row at a time, with sequence parallelism."""
    groups = ParallelGroups.create(Grid(dp=1, cp=2, tp=2), "cpu")
    config = run_config(STYLES["mixed"], sequence_parallel=True)
    model = build_model(config, groups, vocab_size=VOCAB, dtype="float64", device="cpu")
    assert isinstance(model, FSDPModule)
    valid = int((batch()[1] >= 0).sum())
    with no_warnings():
        for row in range(2):
            model.set_requires_gradient_sync(sync_every or row == 1)
            (losses_of(model, groups, row).sum() / valid).backward()
    gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return gradients if rank == 0 else None


@pytest.mark.parametrize("sync_every", [False, True])
def test_gradients_accumulate(sync_every: bool) -> None:
    expected = plain_step(run_config(STYLES["mixed"])).gradients
    gap, name = worst(run_ranks(accumulated, 4, sync_every)[0], expected)
    assert gap < 1e-12, name


def precision(
    rank: int, world_size: int, dtype: ComputeDType, grid: Grid
) -> tuple[set[torch.dtype], torch.dtype, set[torch.dtype], float, dict[str, Tensor]]:
    """(dtypes of parameters, of logits, of gradients, loss, gradients)."""
    with no_warnings():
        groups = ParallelGroups.create(grid, "cpu")
        config = run_config(LLAMA, sequence_parallel=True)
        model = build_model(config, groups, vocab_size=VOCAB, dtype=dtype, device="cpu")
        cp = ContextParallel(groups.cp, Mask.causal(SEQ), kernel="reference")
        tokens, labels = batch()
        logits = model(cp.shard(tokens, 1), cp=cp)
        losses = gathered_cross_entropy(logits, cp.shard(labels, 1), groups.tp)
        loss = losses.sum() / int((labels >= 0).sum())
        loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total, group=groups.dp_cp)
    parameters = dict(model.named_parameters())
    gradients = {
        name: full(p.grad).double() for name, p in parameters.items() if p.grad is not None
    }
    dtypes = {p.dtype for p in parameters.values()}
    grad_dtypes = {p.grad.dtype for p in parameters.values() if p.grad is not None}
    return dtypes, logits.dtype, grad_dtypes, total.item(), gradients


@pytest.mark.parametrize("grid", [Grid(dp=1, cp=1, tp=1), Grid(dp=1, cp=2, tp=2)])
def test_bfloat16_computes_over_float32_weights(grid: Grid) -> None:
    weights, logits, grads, loss, gradients = run_ranks(
        precision, grid.world_size, "bfloat16", grid
    )[0]
    assert weights == grads == {torch.float32}
    assert logits == torch.bfloat16
    expected = plain_step(run_config(LLAMA))
    assert loss == pytest.approx(expected.loss, rel=1e-3)
    assert max(error(gradients[name], x) for name, x in expected.gradients.items()) < 0.05


def test_float32_is_float32() -> None:
    weights, logits, grads, loss, gradients = run_ranks(
        precision, 2, "float32", Grid(dp=1, cp=1, tp=2)
    )[0]
    assert weights == grads == {torch.float32}
    assert logits == torch.float32
    expected = plain_step(run_config(LLAMA))
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    assert max(error(gradients[name], x) for name, x in expected.gradients.items()) < 1e-5


def rotation_types(rank: int, world_size: int) -> set[torch.dtype]:
    """Types of the angles' sines that layers get in bfloat16."""
    groups = ParallelGroups.create(Grid(dp=1, cp=1, tp=1), "cpu")
    config = run_config(LLAMA)
    model = build_model(config, groups, vocab_size=VOCAB, dtype="bfloat16", device="cpu")
    found = set()
    for layer in model.layers.values():
        layer.register_forward_pre_hook(lambda _, args: found.add(args[1].sin.dtype))
    model(batch()[0], cp=ContextParallel(groups.cp, Mask.causal(SEQ)))
    return found


def test_angles_stay_float32_where_a_model_computes_in_bfloat16() -> None:
    assert run_ranks(rotation_types, 1) == [{torch.float32}]


def empty(rank: int, world_size: int) -> list[str]:
    """The names of parameters that wait for weights and are not zero, on TP 4."""
    groups = ParallelGroups.create(Grid(tp=4), "cpu")
    model = build_model(
        run_config(RECURRENT),
        groups,
        vocab_size=VOCAB,
        dtype="float32",
        device="cpu",
        initialize=False,
    )
    return [name for name, x in model.named_parameters() if full(x.detach()).any()]


def test_parameters_of_one_number_on_a_rank_wait_for_their_weights() -> None:
    assert run_ranks(empty, 4) == [[]] * 4


def types_in_forward(rank: int, world_size: int) -> dict[str, set[torch.dtype]]:
    """The types that a model in bfloat16 computes the decay of recurrences with, and its result."""
    groups = ParallelGroups.create(Grid(cp=2), "cpu")
    model = build_model(
        run_config(RECURRENT), groups, vocab_size=VOCAB, dtype="bfloat16", device="cpu"
    )
    found: dict[str, set[torch.dtype]] = {"decay": set(), "query": set()}

    def local(module: Decay, name: str) -> Tensor:
        value = SpecifiedModule.local(module, name)
        found["decay"].add(value.dtype)
        return value

    for module in model.modules():
        if isinstance(module, GatedDeltaNet):
            module.decay.register_forward_hook(lambda _, __, out: found["decay"].add(out.dtype))
            module.query_conv.register_forward_hook(
                lambda _, __, out: found["query"].add(out.dtype)
            )
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    tokens, labels = (cp.shard(x, 1) for x in batch())
    with mock.patch.object(Decay, "local", local):
        model(tokens, cp=cp, labels=labels)[0].backward()
    grads = {x.grad.dtype for name, x in model.named_parameters() if "decay" in name}
    return {**found, "gradients": grads}


def test_the_decay_of_a_recurrence_is_not_rounded_to_bfloat16() -> None:
    exact, rounded = {torch.float32}, {torch.bfloat16}
    expected = {"decay": exact, "query": rounded, "gradients": exact}
    assert run_ranks(types_in_forward, 2) == [expected] * 2
