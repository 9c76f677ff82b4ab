"""The ring is an all-gather of keys and values forward and a reduce-scatter of gradients backward,
without what no rank reads; and only attention knows of the group.

Shapes: B = batch, S = tokens of the row, N = ranks, G = key/value heads, D = E = head dim.
A message is [tokens, B, G * 2 * D].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model import build_model
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import Norm
from cp_megatron.plan import Grid, Mask
from cp_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel
from tests.model.grids import GPT, LLAMA, SEQ, VOCAB, batch, run_config
from tests.oracles import attention_inputs, dense_attention
from tests.ranks import run_ranks

MASKS = {
    "causal": Mask.causal(48),
    "full": Mask.full(48),
    "documents": Mask.documents([1, 7, 21, 2, 5, 11, 1]),
    "window": Mask.causal(48, window=(7, 0)),
}


@contextmanager
def recording() -> Iterator[list[Tensor]]:
    """Copies of all messages that are received, in the order of posting."""
    original = dist.batch_isend_irecv
    buffers: list[Tensor] = []

    def record(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
        for work in original(p2p_op_list):
            work.wait()
        buffers.extend(o.tensor.clone() for o in p2p_op_list if o.op is dist.irecv)
        return []

    dist.batch_isend_irecv = record
    try:
        yield buffers
    finally:
        dist.batch_isend_irecv = original


def packed(k: Tensor, v: Tensor) -> Tensor:
    """[B, K, G, D] twice -> [K, B, G * 2 * D], independently of the engine."""
    return torch.cat([x.transpose(0, 1).flatten(2) for x in (k, v)], dim=-1)


def run(mask: Mask, route: str, layout: str) -> tuple[ContextParallel, Any, Any, Any]:
    """One forward and backward: cp, (inputs of the row), buffers of both, gradients [S/N, ..]."""
    inputs = attention_inputs(11, 2, mask.seq_len, 4, 2, 8, 8)
    cp = ContextParallel(dist.group.WORLD, mask, layout, kernel="reference", route=route)
    q, k, v, dout = (cp.shard(x, 1) for x in inputs)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with recording() as keys:
        out = cp.attention(q, k, v)
    with recording() as grads:
        out.backward(dout)
    assert k.grad is not None
    assert v.grad is not None
    return cp, inputs, (keys, grads), packed(k.grad, v.grad)


def all_gathered(cp: ContextParallel, k: Tensor, v: Tensor) -> Tensor:
    """[S, B, ..]: the result of a real all-gather of all keys and values, by position."""
    shard = packed(cp.shard(k, 1), cp.shard(v, 1)).contiguous()
    parts = [torch.empty_like(shard) for _ in range(cp.cp_size)]
    dist.all_gather(parts, shard)
    whole = torch.empty(cp.mask.seq_len, *shard.shape[1:], dtype=shard.dtype)
    for rank, part in enumerate(parts):
        whole[torch.from_numpy(cp.layout.positions(rank))] = part
    return whole


def gather_gap(rank: int, world_size: int, mask: Mask, route: str, layout: str) -> None:
    """Own keys and arrivals are the all-gather, to the bit, without keys no rank below reads."""
    cp, (_, k, v, _), (keys, _), _ = run(mask, route, layout)
    whole = all_gathered(cp, k, v)
    arrivals = iter(keys)
    have = np.zeros(mask.seq_len, np.bool_)
    have[cp.positions.numpy()] = True
    for round_ in cp.schedule(1).rounds(cp.rank)[1:]:
        where = np.concatenate([np.arange(0), *(np.arange(*span) for span in round_.keys)])
        if len(where):
            assert torch.equal(next(arrivals), whole[torch.from_numpy(where)])
        assert not have[where].any(), "a key came twice"
        have[where] = True
    assert next(arrivals, None) is None
    dense = mask.dense()
    assert not dense[cp.positions.numpy()][:, ~have].any(), "a key that is read never came"
    if mask.kind == "full":
        assert have.all()
    if route == "direct":
        read = dense[cp.positions.numpy()].any(axis=0)
        read[cp.positions.numpy()] = True
        assert np.array_equal(read, have)


def contribution(cp: ContextParallel, inputs: list[Tensor]) -> Tensor:
    """[S, B, ..]: gradients of all keys and values from this rank's queries alone, densely."""
    q, k, v, dout = (x.clone() for x in inputs)
    own = torch.zeros(cp.mask.seq_len, dtype=torch.bool)
    own[cp.positions] = True
    dout[:, ~own] = 0
    k.requires_grad_()
    v.requires_grad_()
    dk, dv = torch.autograd.grad(dense_attention(q, k, v, cp.mask), (k, v), dout)
    return packed(dk, dv)


def scatter_gap(rank: int, world_size: int, mask: Mask, route: str, layout: str) -> list[float]:
    """Errors of (own + returned gradients, those of k and v) against a real reduce-scatter."""
    cp, inputs, (_, buffers), grads = run(mask, route, layout)
    mine = contribution(cp, inputs)
    order = [torch.from_numpy(cp.layout.positions(r)) for r in range(world_size)]
    summed = torch.empty_like(grads).contiguous()
    dist.reduce_scatter_tensor(summed, mine[torch.cat(order)].contiguous())

    home = mine[cp.positions].clone()
    arrived = iter(buffers)
    for slot in range(world_size + 1):
        round_ = cp.schedule(1).rounds(cp.rank)[slot] if slot < world_size else None
        before = cp.schedule(1).rounds(cp.rank)[slot - 1] if slot else None
        if round_ and round_.receive_keys:
            next(arrived)
        if before and before.receive_passed:
            next(arrived)
        if before and before.receive_returned:
            spans = before.receive_returned.spans
            home[torch.cat([torch.arange(*span) for span in spans])] += next(arrived)
    assert next(arrived, None) is None
    return [float((x - summed).norm() / summed.norm()) for x in (home, grads)]


CASES = [
    (mask, route, layout)
    for mask in MASKS
    for route in ("ring", "direct")
    for layout in ("zigzag", "contiguous")
]


@pytest.mark.parametrize(("mask", "route", "layout"), CASES)
def test_the_ring_brings_the_all_gather(mask: str, route: str, layout: str) -> None:
    run_ranks(gather_gap, 4, MASKS[mask], route, layout)


@pytest.mark.parametrize(("mask", "route", "layout"), CASES)
def test_returned_gradients_are_the_reduce_scatter(mask: str, route: str, layout: str) -> None:
    for errors in run_ranks(scatter_gap, 4, MASKS[mask], route, layout):
        assert max(errors) < 1e-12


# ---- only attention knows the group --------------------------------------------------------------

LOCAL = (Norm, MLP, ColumnParallelLinear, RowParallelLinear)
KNOWS = (dist.ProcessGroup, DeviceMesh, ParallelGroups, TensorParallel, ContextParallel)


def groups_of(module: nn.Module) -> list[str]:
    """Names of a module's own attributes that are, or contain, a group."""
    found = []
    for name, value in vars(module).items():
        if name in ("_parameters", "_modules"):
            continue
        values = list(value.values()) if isinstance(value, dict) else [value]
        values += [x for y in values if isinstance(y, list | tuple) for x in y]
        found += [name for x in values if isinstance(x, KNOWS)]
    return found


def modules_without_groups(rank: int, world_size: int, llama: bool) -> dict[str, int]:
    """Counts the local modules by type; raises if one of them holds or receives a group."""
    groups = ParallelGroups.create(Grid(cp=2, tp=2), "cpu")
    config = run_config(LLAMA if llama else GPT, sequence_parallel=True)
    model = build_model(config, groups, vocab_size=VOCAB, dtype="float32", device="cpu")
    calls: dict[str, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        assert all(type(x) in (Tensor, bool, type(None)) for x in given), (module, args, kwargs)
        name = next(kind.__name__ for kind in LOCAL if isinstance(module, kind))  # not FSDP's class
        calls[name] = calls.get(name, 0) + 1

    for name, module in model.named_modules():
        if isinstance(module, LOCAL):
            assert not groups_of(module), (name, groups_of(module))
            parameters = inspect.signature(module.forward).parameters.values()
            assert {p.annotation for p in parameters} <= {
                "Tensor",
                Tensor,
                "bool",
                "Tensor | None",
            }, name
            module.register_forward_pre_hook(before, with_kwargs=True)
    cp = ContextParallel(groups.cp, Mask.causal(SEQ))
    model(cp.shard(batch()[0], 1), cp=cp).sum()
    assert groups_of(model) == ["tp"], "the test sees a group where there is one"
    return calls


@pytest.mark.parametrize("llama", [False, True])
def test_norms_and_mlp_never_hold_or_get_a_group(llama: bool) -> None:
    for calls in run_ranks(modules_without_groups, 4, llama):
        assert calls["Norm"] == 2 * 2 + 1
        assert calls["MLP"] == 2
        assert calls["RowParallelLinear"] == 2 * 2
