"""The memory of messages: bounded on any number of ranks, reused, and never returned to callers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.buffer_sizes import AttentionSizes, BufferSizes
from tests.allocations import counting_memory
from tests.ranks import run_ranks

SHARD, HEADS, DIM = 128, 4, 16
TOKEN = 2 * HEADS * DIM * 4  # bytes of a token's keys and values
ROUTES = ("ring", "direct")
EXCHANGES: dict[str, dict[str, Any]] = {
    "ring": {"exchange": "p2p", "route": "ring"},
    "ring in parts": {"exchange": "p2p", "route": "ring", "message_parts": 2},
    "direct": {"exchange": "p2p", "route": "direct"},
    "all_gather": {"exchange": "all_gather"},
    "a2a": {"exchange": "a2a"},
    "a2a+p2p": {"exchange": "a2a+p2p", "hierarchical_sizes": (2, 2)},
}
MASKS = {  # by number of ranks
    "full": lambda size: (Mask.full(SHARD * size), "contiguous"),
    "causal": lambda size: (Mask.causal(SHARD * size), "zigzag"),
}


def inputs(seed: int, shard: int, dtype: torch.dtype, dim: int = DIM) -> list[Tensor]:
    """q, k, v and dout of a shard."""
    generator = torch.Generator().manual_seed(seed)
    shape = 1, shard, HEADS, dim
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(4)]


def one_pass(cp: ContextParallel, x: list[Tensor]) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [y.clone().requires_grad_() for y in x[:3]]
    out = cp.attention(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, x[3])


# ---- size ----------------------------------------------------------------------------------------


class Bytes(NamedTuple):
    """Transient peaks of the first and the second pass of one rank, and the memory that is kept."""

    forward: int
    backward: int
    forward_again: int
    backward_again: int
    kept_forward: int
    kept: int


def transient(rank: int, world_size: int, mask: Mask, layout: str, route: str) -> Bytes:
    """The memory that forward and backward allocate in addition to their results."""
    options = {"kernel": "cpu", "exchange": "p2p", "route": route, "check_ranks": False}
    cp = ContextParallel(dist.group.WORLD, mask, layout, **options)
    *qkv, dout = inputs(rank, SHARD, torch.float32)
    peaks, kept = [], []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in qkv]
        with counting_memory() as forward:
            out = cp.attention(*leaves)
        kept.append(cp.buffers.held_bytes)
        with counting_memory() as backward:
            torch.autograd.grad(out, leaves, dout)
        peaks += [forward.peak - out.nbytes, backward.peak - sum(x.nbytes for x in qkv)]
    assert cp.buffers.peak_bytes == cp.buffers.held_bytes
    return Bytes(*peaks, kept[0], cp.buffers.held_bytes)


def worst(mask: str, route: str, size: int) -> Bytes:
    """The maximum over all ranks."""
    return Bytes(*map(max, zip(*run_ranks(transient, size, *MASKS[mask](size), route))))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mask", MASKS)
def test_memory_of_a_pass_does_not_grow_with_the_ranks(mask: str, route: str) -> None:
    two, four, eight = (worst(mask, route, size) for size in (2, 4, 8))
    # Messages lie in memory that exists already, and nothing else may depend on the ranks.
    for more in (four, eight):
        assert more.forward_again <= 1.05 * two.forward_again
        assert more.backward_again <= 1.05 * two.backward_again
    # With that memory. Two ranks never forward keys; from four ranks on all buffers are in use.
    assert eight.forward <= 1.05 * four.forward
    assert eight.backward <= 1.05 * four.backward
    if mask == "full" and route == "ring":
        assert eight.forward <= 1.05 * two.forward
    keys = 2 if route == "ring" else 3
    for size, found in ((2, two), (4, four), (8, eight)):
        assert found.kept_forward <= keys * SHARD * TOKEN, size
        assert found.kept <= (keys + 5) * SHARD * TOKEN, size


def kept(
    rank: int, world_size: int, masks: list[Mask], options: dict[str, Any], dim: int = DIM
) -> list[int]:
    """Bytes that are kept for messages after each mask."""
    cp = ContextParallel(dist.group.WORLD, masks[0], kernel="cpu", **options)
    found = []
    for mask in masks:
        one_pass(cp.with_mask(mask), inputs(rank, mask.seq_len // world_size, torch.float32, dim))
        found.append(cp.buffers.held_bytes)
    return found


def predicted(schedules: list[Schedule], rank: int, dim: int) -> int:
    """Bytes of the buffers that the plan describes."""
    sizes = BufferSizes()
    for schedule in schedules:
        tokens = schedule.layout.shard_len
        x = AttentionSizes(
            batch=1, num_tokens=tokens, kv_heads=HEADS, head_dim=dim, element=4, exact=4
        )
        sizes.add(schedule, rank, x, backward=False)
        sizes.add(schedule, rank, x, backward=True)
    return sizes.num_bytes


@pytest.mark.parametrize(
    "exchange",
    [
        pytest.param(x, marks=pytest.mark.slow if x in ("direct", "a2a+p2p") else ())
        for x in EXCHANGES
    ],
)
def test_the_memory_that_is_kept_is_what_the_plan_predicts(exchange: str) -> None:
    """The memory follows from the largest message of all masks, and is known before they run."""
    masks = [Mask.documents([3 * n, 96 - 3 * n]) for n in range(1, 16)] + [Mask.causal(96)]
    options = EXCHANGES[exchange]
    schedules = [
        Schedule.build(mask, SequenceLayout.make(mask, 4), num_heads=HEADS, **options)
        for mask in masks
    ]
    for rank, held in enumerate(run_ranks(kept, 4, masks + masks, options)):
        assert held[-1] == held[len(masks) - 1]
        assert held[-1] == predicted(schedules, rank, DIM) > 0


def test_all_gather_holds_a_portion_of_the_heads_and_the_next() -> None:
    """Heads are wide enough that each is gathered by itself."""
    mask, dim = Mask.causal(1024), 512
    options = {"exchange": "all_gather", "layout": "zigzag"}
    schedule = Schedule.build(mask, SequenceLayout.make(mask, 4, "zigzag"), "all_gather")
    portion = mask.seq_len * 2 * dim * 4
    for rank, (held,) in enumerate(run_ranks(kept, 4, [mask], options, dim)):
        assert held == predicted([schedule], rank, dim)
        # Two gathered, keys picked, their gradients, one reduced; two given, one returned.
        assert 3 * portion < held <= 5 * portion + 3 * portion // 4


# ---- reuse ---------------------------------------------------------------------------------------


@contextmanager
def messages() -> Iterator[list[Tensor]]:
    """All tensors that are sent or received into; keeping them keeps others off their memory."""
    original = dist.batch_isend_irecv
    seen: list[Tensor] = []

    def record(operations: list[dist.P2POp]) -> Any:
        seen.extend(operation.tensor for operation in operations)
        return original(operations)

    dist.batch_isend_irecv = record
    try:
        yield seen
    finally:
        dist.batch_isend_irecv = original


def places(tensors: list[Tensor]) -> set[int]:
    return {x.untyped_storage().data_ptr() for x in tensors}


def held_buffers(cp: ContextParallel) -> list[Tensor]:
    """All memory that is kept."""
    return [
        buffer
        for group in cp.buffers._free.values()
        for workspace in group
        for buffer in workspace._buffers.values()
    ]


def reuse(rank: int, world_size: int, route: str) -> None:
    """A second pass, and another layer's, use the memory of the first pass."""
    mask = Mask.documents([100, 28])
    cp = ContextParallel(dist.group.WORLD, mask, "zigzag", exchange="p2p", route=route)
    x = inputs(rank, 128 // world_size, torch.float32)
    with messages() as first:
        one_pass(cp, x)
    held = cp.buffers.held_bytes
    assert places(first) & places(held_buffers(cp))
    for layer in (cp, cp.with_mask(mask), cp.within((9, 0))):
        assert layer.buffers is cp.buffers
        with messages() as again:
            one_pass(layer, x)
        assert again
        assert places(again) <= places(first)
    assert cp.buffers.held_bytes == held
    # New buffers would be elsewhere.
    with messages() as other:
        one_pass(ContextParallel(cp.group, mask, "zigzag", exchange="p2p", route=route), x)
    assert not places(other) & places(first)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_messages_use_the_memory_of_earlier_messages(world_size: int, route: str) -> None:
    run_ranks(reuse, world_size, route)


def layers_of(cp: ContextParallel, fresh: bool) -> list[ContextParallel]:
    """Layers and batches with other masks that share the buffers of ``cp``, or have their own."""
    other = Mask.documents([5, 50, 9])
    found = [cp, cp.within((7, 0)), cp.with_mask(other, cp.layout), cp.with_mask(Mask.full(32)), cp]
    if fresh:
        for layer in (*found, cp):
            layer.buffers = Buffers()
    return found


def shared(
    rank: int, world_size: int, options: dict[str, Any], dtype: torch.dtype
) -> list[list[Tensor]]:
    """Results of layers that run one after the other, backward in reverse, shared and alone."""
    results = []
    for fresh in (False, True):
        cp = ContextParallel(dist.group.WORLD, Mask.causal(64), "zigzag", kernel="cpu", **options)
        runs = []
        for number, layer in enumerate(layers_of(cp, fresh)):
            if fresh and layer is cp:  # it occurs twice
                layer = cp.with_mask(cp.mask, cp.layout)
                layer.buffers = Buffers()
            tokens = layer.mask.seq_len // world_size
            *qkv, dout = inputs(10 * rank + number, tokens, dtype)
            leaves = [x.requires_grad_() for x in qkv]
            runs.append((layer.attention(*leaves), leaves, dout))
        found = []
        for out, leaves, dout in reversed(runs):
            found += [out.detach(), *torch.autograd.grad(out, leaves, dout)]
        results.append(found)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_sharing_memory_changes_no_bit(exchange: str, dtype: torch.dtype) -> None:
    for together, alone in run_ranks(shared, 4, EXCHANGES[exchange], dtype):
        assert len(together) == len(alone) == 20
        for x, y in zip(together, alone):
            assert torch.equal(x, y)
            assert x.count_nonzero()


def results_apart(rank: int, world_size: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Neither results nor tensors that autograd keeps lie in the memory of messages."""
    cp = ContextParallel(dist.group.WORLD, Mask.causal(64), "zigzag", kernel="cpu", **options)
    *qkv, dout = inputs(rank, 16, dtype)
    leaves = [x.requires_grad_() for x in qkv]
    out = cp.attention(*leaves)
    tensors = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    saved = [x for x in tensors if x is not None]
    grads = torch.autograd.grad(out, leaves, dout)
    kept = [out, *saved, *grads]
    before = [x.clone() for x in kept]
    assert held_buffers(cp)
    assert not places(kept) & places(held_buffers(cp))
    for buffer in held_buffers(cp):
        buffer.fill_(255)
    one_pass(cp, inputs(rank + 50, 16, dtype))
    assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_results_do_not_lie_in_the_memory_of_messages(exchange: str, dtype: torch.dtype) -> None:
    run_ranks(results_apart, 4, EXCHANGES[exchange], dtype)


# ---- the pool ------------------------------------------------------------------------------------

CPU = torch.device("cpu")


def test_a_buffer_is_replaced_if_it_is_too_small_and_kept_otherwise() -> None:
    buffers = Buffers()
    with counting_memory() as count:
        for tokens in (10, 4, 20, 20, 7):
            with buffers.lend(CPU) as memory:
                buffer = memory.take("keys", (tokens, 2, 3), torch.float32)
                assert buffer.shape == (tokens, 2, 3)
                assert buffer.is_contiguous()
                del buffer
    assert count.allocations == (240, 480)
    assert count.peak == 480, "the smaller one was given back first"
    assert buffers.held_bytes == buffers.peak_bytes == 480
    with buffers.lend(CPU) as memory:
        half = memory.take("keys", (480 // 2,), torch.bfloat16)
        other = memory.take("gradients", (3,), torch.float64)
        assert half.dtype == torch.bfloat16
        assert not places([half]) & places([other])
    assert buffers.held_bytes == 480 + 24


def test_passes_at_the_same_time_have_memory_of_their_own() -> None:
    buffers = Buffers()
    with buffers.lend(CPU) as one, buffers.lend(CPU) as two:
        assert one is not two
        one.take("keys", (8,), torch.float32)
        two.take("keys", (8,), torch.float32)
        assert buffers.held_bytes == 64
    with buffers.lend(CPU) as three, buffers.lend(CPU) as four:
        assert {id(three), id(four)} == {id(one), id(two)}


def test_memory_is_not_lent_again_after_an_error() -> None:
    """Messages may still be in flight in it."""
    buffers = Buffers()

    def fails() -> None:
        with buffers.lend(CPU) as memory:
            memory.take("keys", (8,), torch.float32)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert buffers.held_bytes == 0
    assert buffers.peak_bytes == 32


def test_memory_of_inference_mode_serves_training() -> None:
    """Checks the buffer itself, because torch may allow writes to a view of it anyway."""
    with torch.inference_mode(), Buffers().lend(CPU) as memory:
        memory.take("keys", (8,), torch.float32)
    (held,) = memory._buffers.values()
    held.add_(1)
    assert not held.is_inference()
