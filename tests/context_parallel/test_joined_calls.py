"""Several tiles in one call of a kernel, and one tile's result in the kernel's type, on every path.

The CUDA kernel runs on a double of its ops that keeps float64, so that each number can be exact.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.send_receive import Pending
from cp_megatron.context_parallel import ContextParallel, p2p, partials
from cp_megatron.context_parallel.attention_function import planned_attention
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.rank_plan import RankPlan
from cp_megatron.kernels import cuda
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.interface import Kernel
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from tests.context_parallel.test_sinks import Case, extra_inputs, results
from tests.kernels import double_many
from tests.kernels.rounding import RoundingKernel
from tests.oracles import attention_inputs, relative_error, relative_gap
from tests.ranks import run_ranks

MASKS = {
    "documents": Mask.documents([1, 7, 21, 2, 5, 11, 1]),
    "short": Mask.documents([1] * 12 + [2] * 12 + [3, 3, 3, 3]),
    "bidirectional": Mask.documents([5, 9, 1, 33], causal=False),
    "window": Mask.documents([1, 14, 2, 14, 17], window=(6, 0)),
    "both sides": Mask.documents([9, 3, 20, 16], causal=False, window=(4, 2)),
}
OPTIONS: list[dict[str, Any]] = [
    {"exchange": "p2p", "route": "ring", "layout": "zigzag"},
    {"exchange": "p2p", "route": "direct", "layout": "balanced"},
    {"exchange": "all_gather", "layout": "contiguous"},
    {"exchange": "a2a"},
]


def joined_errors(
    rank: int, world_size: int, mask: Mask, options: dict[str, Any], batch: int
) -> tuple[dict[str, float], int]:
    """One rank's errors with sinks and a gradient of the lse, and the calls for several tiles."""
    inputs = attention_inputs(3, batch, mask.seq_len, 4, 2, 16, 8)
    sinks, dlse = extra_inputs(4, batch, mask.seq_len, 4)
    reference = results(Case(mask, {}), inputs, sinks, dlse)
    many = 0

    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal many
        many += args[3] is not None
        return double_many.aten_forward(*args, **kwargs)

    before = cuda._forward, cuda._backward
    cuda._forward, cuda._backward = forward, double_many.aten_backward  # type: ignore[assignment]
    try:
        cp = ContextParallel(dist.group.WORLD, mask, **options)
        cp.kernels.load = lambda *_, **__: CudaKernel()  # type: ignore[method-assign]
        q, k, v, dout = (cp.shard(x, 1) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        attended = cp.attention(*leaves[:3], sinks=leaves[3], return_lse=True)
        grads = torch.autograd.grad(attended, leaves, (dout, cp.shard(dlse, 2)))
        (plain,) = torch.autograd.grad(cp.attention(*leaves[:3]), leaves[:1], dout)
    finally:
        cuda._forward, cuda._backward = before  # type: ignore[assignment]
    dist.all_reduce(grads[3])
    found = {"out": attended[0].detach(), **dict(zip(("dq", "dk", "dv"), grads))}
    errors = {
        name: relative_error(x, reference[name], cp.positions, 2) for name, x in found.items()
    }
    exact = results(Case(mask, {}), inputs, torch.full_like(sinks, -torch.inf), 0 * dlse)["dq"]
    errors["dq without sinks"] = relative_error(plain, exact, cp.positions)
    return {**errors, "ds": relative_gap(grads[3], reference["ds"])}, many


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_dense_attention(mask: str, options: dict[str, Any]) -> None:
    joined = 0
    for batch in (1, 2):
        for errors, many in run_ranks(joined_errors, 2, MASKS[mask], options, batch):
            assert max(errors.values()) < 1e-12, errors
            joined += many
    assert joined


class Launches(TorchDispatchMode):
    """Counts operations that launch a kernel: all but allocations and views."""

    FREE = frozenset({"empty", "empty_like", "new_empty", "detach", "view", "slice", "select"})
    VIEWS = frozenset({"alias", "_unsafe_view", "transpose", "permute", "unsqueeze", "expand"})

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE | self.VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def packed_documents(count: int, tokens: int, seed: int) -> Mask:
    """A row of ``count`` documents whose lengths are log-normal."""
    weights = np.random.default_rng(seed).lognormal(0, 1, count)
    lengths = np.maximum(1, (weights / weights.sum() * tokens).astype(int))
    lengths[-1] += tokens - lengths.sum()
    return Mask.documents(lengths.tolist())


def launches(plan: RankPlan, shard_len: int) -> tuple[int, int]:
    """Launches of one attention of a rank, forward and backward, on meta tensors."""
    q, k, v = (
        torch.empty(1, shard_len, n, 128, device="meta", dtype=torch.bfloat16).requires_grad_()
        for n in (32, 8, 8)
    )
    with Launches() as forward:
        out = planned_attention(plan, CudaKernel(), q, k, v, 0.1, None)
    assert isinstance(out, Tensor)
    with Launches() as backward:
        torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    return forward.counts.total(), backward.counts.total()


@pytest.mark.parametrize("seed", range(3))
def test_launches_follow_rounds_and_not_documents(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 8 ranks that share a row of 128K tokens."""
    # autocast does not know meta tensors, messages have no receiver, and a merge is one launch on
    # a GPU with Triton.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(p2p, "post", lambda *_, **__: Pending((), (), (), LinkSums()))
    monkeypatch.setattr(partials, "merge_", lambda out, lse, new_out, new_lse: out.copy_(new_out))
    tokens, size = 1 << 17, 8
    for count in (32, 512):
        mask = packed_documents(count, tokens, seed)
        layout = SequenceLayout.make(mask, size, "balanced")
        schedule = Schedule.build(mask, layout, "p2p", "auto", 32, 8, head_dim=128)
        for rank in range(size):
            plan = RankPlan(schedule, rank, None, Buffers(), LinkSums())
            forward, backward = launches(plan, tokens // size)
            assert forward <= 35
            assert backward <= 65


def single_rank(kernel: Kernel, mask: Mask, *, sums: bool) -> list[Tensor]:
    """out, lse and gradients in bfloat16, with or without sums where there is nothing to add."""
    cp = ContextParallel(None, mask)
    heads = 4, 2, 16, 16
    plan = RankPlan(cp.schedule(*heads), 0, None, Buffers(), LinkSums())
    if sums:
        plan.merges, plan.sums_own_keys, plan.is_alone = True, True, False
    inputs = attention_inputs(5, 2, mask.seq_len, *heads)
    q, k, v, dout = (x.to(torch.bfloat16) for x in inputs)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = planned_attention(plan, kernel, *leaves, 0.3, None, returns_lse=True)
    grads = torch.autograd.grad(out[0], leaves, dout)
    return [out[0].detach(), out[1].detach(), *grads]


@pytest.mark.parametrize("mask", [Mask.causal(48), MASKS["documents"]], ids=["one", "several"])
def test_one_tile_keeps_its_type_and_its_bits(mask: Mask) -> None:
    """Sums in float32 of one number each, rounded back to bfloat16, are that number."""
    found = single_rank(RoundingKernel(), mask, sums=False)
    expected = single_rank(RoundingKernel(), mask, sums=True)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def equal_after_exchange(rank: int, world_size: int, mask: Mask, heads: tuple[int, int]) -> bool:
    """Whether an all-to-all returns the same bits with sums and without."""
    found = []
    for sums in (False, True):
        cp = ContextParallel(dist.group.WORLD, mask, exchange="a2a")
        cp.kernels.load = lambda *_, **__: RoundingKernel()  # type: ignore[method-assign]
        if sums:
            plan = cp._plan((*heads, 16, 16))
            plan.merges, plan.sums_own_keys, plan.is_alone = True, True, False
        inputs = attention_inputs(5, 2, mask.seq_len, *heads, 16, 16)
        q, k, v, dout = (cp.shard(x, 1).to(torch.bfloat16) for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = cp.attention(*leaves)
        assert isinstance(out, Tensor)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    return all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)], ids=["own heads", "shared head"])
def test_gradients_that_several_ranks_add_travel_unrounded(heads: tuple[int, int]) -> None:
    """Four terms: a sum of two would be rounded once either way."""
    assert all(run_ranks(equal_after_exchange, 4, Mask.causal(48), heads))


def test_no_pass_over_a_single_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second layer on: the first one copies the edges of the documents to the device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    for mask in (Mask.causal(48), MASKS["documents"]):
        cp = ContextParallel(None, mask)
        schedule = cp.schedule(32, 8, 128)
        plan = RankPlan(schedule, 0, None, Buffers(), LinkSums())
        launches(plan, mask.seq_len)
        assert launches(plan, mask.seq_len) == (1, 1)
