"""Attention over sharded sequences against the dense reference: out and gradients on each rank."""

from __future__ import annotations

from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from tests.oracles import attention_inputs, dense_gradients, relative_error
from tests.ranks import run_ranks

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-6}
MASKS = {
    "causal": Mask.causal(48),
    "full": Mask.full(48),
    "documents": Mask.documents([1, 7, 21, 2, 5, 11, 1]),
    "documents_full": Mask.documents([13, 3, 32], causal=False),
    "one_token_documents": Mask.documents([1] * 48),
    "window": Mask.causal(48, window=(5, 0)),
    "window_both": Mask.full(48, window=(9, 3)),
    "documents_window": Mask.documents([1, 30, 17], window=(6, 0)),
}
HEADS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}


def errors(
    rank: int,
    world_size: int,
    mask: Mask,
    heads: tuple[int, int],
    dims: tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, str],
) -> dict[str, float]:
    """The relative errors of one rank."""
    inputs = attention_inputs(7, 2, mask.seq_len, *heads, *dims)
    inputs = [x.to(dtype).to(torch.float64) for x in inputs]
    reference = dense_gradients(inputs, mask)
    cp = ContextParallel(dist.group.WORLD, mask, **options)
    q, k, v, dout = (cp.shard(x, 1).to(dtype) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = cp.attention(q, k, v)
    out.backward(dout)
    found: dict[str, Any] = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    assert all(x.dtype == dtype for x in found.values())
    terms = {"dk": heads[0] // heads[1], "dv": heads[0] // heads[1]}
    return {
        name: relative_error(x, reference[name], cp.positions, terms.get(name, 1))
        for name, x in found.items()
    }


# Eight ranks share two cores in CI: one case of them runs by default.
@pytest.mark.parametrize(
    ("world_size", "mask", "layout"),
    [
        pytest.param(size, mask, layout, marks=pytest.mark.slow if is_slow else ())
        for size, mask, layout in product([1, 2, 3, 4, 8], MASKS, ["contiguous", "zigzag"])
        for is_slow in [size == 8 and (mask, layout) != ("documents_window", "zigzag")]
    ],
)
def test_equals_dense_attention_float64(world_size: int, mask: str, layout: str) -> None:
    for heads in HEADS.values():
        options = {"layout": layout, "kernel": "cpu"}
        args = (MASKS[mask], heads, (8, 8), torch.float64, options)
        for result in run_ranks(errors, world_size, *args):
            assert max(result.values()) < 1e-12, (heads, result)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("route", ["ring", "direct"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("dims", [(16, 16), (24, 8), (8, 24)])
def test_kernels_routes_and_widths(
    kernel: str, route: str, dtype: torch.dtype, dims: tuple[int, int]
) -> None:
    for mask in (MASKS["causal"], MASKS["documents"], MASKS["documents_window"]):
        options = {"kernel": kernel, "route": route}
        for result in run_ranks(errors, 4, mask, (6, 2), dims, dtype, options):
            assert max(result.values()) < BOUNDS[dtype], (mask.kind, result)


def traffic(rank: int, world_size: int, mask: Mask, route: str) -> tuple[list[Any], list[Any]]:
    """The messages that one rank receives in forward and backward: (peer, tokens, elements)."""
    seen: list[tuple[int, int]] = []
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                seen.append((operation.group_peer, operation.tensor.shape[0]))
        return original(operations)

    dist.batch_isend_irecv = counting
    try:
        cp = ContextParallel(dist.group.WORLD, mask, route=route)
        inputs = attention_inputs(1, 1, mask.seq_len, 2, 1, 4, 4)
        q, k, v, dout = (cp.shard(x, 1) for x in inputs)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out = cp.attention(q, k, v)
        forward = list(seen)
        seen.clear()
        out.backward(dout)
    finally:
        dist.batch_isend_irecv = original
    return forward, list(seen)


@pytest.mark.parametrize("route", ["ring", "direct"])
@pytest.mark.parametrize("mask", ["causal", "full", "documents", "window"])
def test_messages_on_the_wire_equal_the_plan(mask: str, route: str) -> None:
    results = run_ranks(traffic, 4, MASKS[mask], route)
    cp = ContextParallel(None, MASKS[mask])
    assert cp.schedule(1).kv_tokens_received(0) == 0
    layout = SequenceLayout.make(MASKS[mask], 4, "auto")
    schedule = Schedule.build(MASKS[mask], layout, route=route)
    for rank, (forward, backward) in enumerate(results):
        rounds = schedule.rounds(rank)
        keys = [(m.peer, m.num_tokens) for round_ in rounds if (m := round_.receive_keys)]
        assert forward == keys
        assert sum(tokens for _, tokens in forward) == schedule.kv_tokens_received(rank)
        grads = [
            (message.peer, message.num_tokens)
            for round_ in rounds
            for message in (round_.receive_passed, round_.receive_returned)
            if message
        ]
        assert Counter(backward) == Counter(keys + grads)


def shard_and_gather(rank: int, world_size: int) -> tuple[list[int], Tensor, Tensor]:
    cp = ContextParallel(dist.group.WORLD, Mask.causal(8))
    whole = torch.arange(8.0, requires_grad=True)
    part = cp.shard(whole, 0)
    (part * (rank + 1)).sum().backward()
    local = part.detach().requires_grad_()
    gathered = cp.gather(local, 0)
    (gathered * torch.arange(8.0)).sum().backward()
    assert torch.equal(gathered, torch.arange(8.0))
    assert whole.grad is not None
    assert local.grad is not None
    return cp.positions.tolist(), whole.grad, local.grad


def test_shard_and_gather_literally() -> None:
    (zero, one) = run_ranks(shard_and_gather, 2)
    assert zero[0] == [0, 1, 6, 7]
    assert one[0] == [2, 3, 4, 5]
    assert zero[1].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]
    assert one[1].tolist() == [0, 0, 2, 2, 2, 2, 0, 0]
    # Every rank used the whole tensor, so the gradient is the sum of both.
    assert zero[2].tolist() == [0, 2, 12, 14]
    assert one[2].tolist() == [4, 6, 8, 10]


def test_one_rank_needs_no_group_and_no_message() -> None:
    cp = ContextParallel(None, Mask.documents([3, 5]))
    assert cp.positions.tolist() == list(range(8))
    assert cp.document_positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert cp.with_mask(Mask.causal(6)).positions.tolist() == list(range(6))
    x = torch.randn(1, 8, 2, 4)
    assert torch.equal(cp.shard(x, 1), x)
    assert torch.equal(cp.gather(x, 1), x)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 8, 3, 4), (1, 8, 2, 4), (1, 8, 2, 4)], "multiple of kv heads"),
        ([(1, 8, 2, 4), (1, 8, 2, 8), (1, 8, 2, 4)], "equally wide"),
        ([(1, 7, 2, 4), (1, 7, 2, 4), (1, 7, 2, 4)], "tokens must be this rank's 8"),
        ([(8, 2, 4), (8, 2, 4), (8, 2, 4)], "must be [batch, tokens, heads, head_dim]"),
        ([(1, 8, 2, 4), (1, 8, 1, 4), (1, 8, 2, 4)], "must agree"),
    ],
)
def test_wrong_shapes_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    cp = ContextParallel(None, Mask.causal(8))
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        cp.attention(*(torch.zeros(shape) for shape in shapes))


def rounds_as_gather(rank: int, world_size: int) -> list[Tensor]:
    """This rank's part of positions as keys that travelled around the ring."""
    mask = Mask.causal(16)
    cp = ContextParallel(dist.group.WORLD, mask)
    return [
        torch.tensor([p for a, b in round_.keys for p in range(a, b)])
        for round_ in cp.schedule(1).rounds(rank)
    ]


def test_the_ring_moves_an_all_gather_without_unread_keys() -> None:
    arrivals = run_ranks(rounds_as_gather, 4)
    dense = torch.from_numpy(Mask.causal(16).dense())
    for rank, arrived in enumerate(arrivals):
        seen = torch.cat(arrived)
        assert len(seen) == len(set(seen.tolist()))
        never = set(range(16)) - set(seen.tolist())
        # A missing key is read neither here nor further down the ring from its owner.
        queries = arrived[0]
        assert not dense[queries][:, sorted(never)].any(), rank


@pytest.mark.parametrize("scale", [0.0, -0.5, float("inf"), float("nan")])
def test_a_scale_that_kernels_cannot_take_is_refused(scale: float) -> None:
    x = torch.zeros(1, 8, 2, 4)
    with pytest.raises(ConfigError, match="must be positive"):
        ContextParallel(None, Mask.causal(8)).attention(x, x, x, scale=scale)


def test_lists_are_sizes_too() -> None:
    x = torch.zeros(1, 8, 2, 4)
    cp = ContextParallel(None, Mask.causal(8), exchange="a2a+p2p", hierarchical_sizes=[1, 1])  # type: ignore[arg-type]
    assert cp.attention(x, x, x).shape == x.shape


def test_autocast_rounds_the_inputs_but_not_the_sums_of_the_engine() -> None:
    inputs = attention_inputs(1, 1, 32, 2, 2, 8, 8)
    q, k, v, dout = (x.bfloat16() for x in inputs)
    for kernel in ("cpu", "reference"):
        cp = ContextParallel(None, Mask.causal(32), kernel=kernel)
        results = []
        for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
            leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = cp.attention(*leaves)
                grads = torch.autograd.grad(out, leaves, dout)
            results.append([out, *(x.bfloat16() for x in grads)])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x, y)


def test_torch_compile_does_not_trace_attention() -> None:
    """One graph break per attention, and no new compilation for a new mask."""
    q, k, v = (x.requires_grad_() for x in attention_inputs(1, 1, 16, 2, 2, 4, 4)[:3])
    frames = 0

    def counting(graph: Any, example_inputs: Any) -> Any:
        nonlocal frames
        frames += 1
        return graph.forward

    def layer(cp: ContextParallel, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return cp.attention(q * 2, k, v) + 1

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=counting)
    masks = [Mask.causal(16), Mask.documents([3, 13]), Mask.documents([9, 2, 5])]
    counts = []
    for mask in masks:
        cp = ContextParallel(None, mask)
        out = compiled(cp, q, k, v)
        torch.testing.assert_close(out, layer(cp, q, k, v))
        out.sum().backward()
        counts.append(frames)
    torch._dynamo.reset()
    assert counts[0] == counts[-1] == 2


def within(rank: int, world_size: int, mask: Mask) -> list[float]:
    """Relative errors of outputs under the mask, a window, and the mask again, on one layout."""
    cp = ContextParallel(dist.group.WORLD, mask)
    windowed = cp.within((3, 0))
    assert windowed is cp.within((3, 7))  # a causal mask has nothing to the right
    assert windowed is not cp
    assert cp.within(None) is cp
    inputs = attention_inputs(7, 1, mask.seq_len, 4, 4, 8, 8)
    found = []
    for context in (cp, windowed, windowed.within(None)):
        assert context.layout == cp.layout
        chosen, own = context.schedule(4, 4, 8), cp.schedule(4, 4, 8)
        assert (chosen.exchange, chosen.route) == (own.exchange, own.route) == ("a2a", "ring")
        out = context.attention(*(context.shard(x, 1) for x in inputs[:3]))
        expected = dense_gradients(inputs, context.mask)["out"]
        found.append(relative_error(out, expected, context.positions, 1))
    return found


def test_another_window_keeps_the_layout_and_the_exchange() -> None:
    mask = Mask.documents([50, 14])
    alone = mask.within((3, 0))
    layouts = [SequenceLayout.make(each, 4, "auto") for each in (mask, alone)]
    assert layouts[0] != layouts[1], "by itself the window would lie otherwise"
    assert Schedule.build(alone, layouts[1], "auto", "auto", 4, 4, head_dim=8).exchange == "p2p"
    for found in run_ranks(within, 4, mask):
        assert max(found) < 1e-12
