"""Messages in parts: the ring's results stay what they are, and the plan's bytes are sent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from tests.context_parallel.test_attention import MASKS
from tests.context_parallel.test_exchanges import Case, check
from tests.ranks import run_ranks

PARTED = ("causal", "documents", "documents_full", "documents_window", "window_both")
OPTIONS: dict[str, dict[str, Any]] = {
    "ring": {"exchange": "p2p", "route": "ring"},
    "direct": {"exchange": "p2p", "route": "direct"},
    "a2a+p2p": {"exchange": "a2a+p2p", "hierarchical_sizes": (2, 2)},
}


@pytest.mark.parametrize(
    ("exchange", "world_size"),
    [("ring", 2), ("ring", 3), ("ring", 4), ("direct", 3), ("direct", 4), ("a2a+p2p", 4)],
)
def test_equals_dense_attention_in_parts(exchange: str, world_size: int) -> None:
    cases = []
    for mask in PARTED:
        for heads, parts in (((4, 4), 2), ((6, 6), 3), ((8, 4), 2)):
            options = {"message_parts": parts, "kernel": "cpu", **OPTIONS[exchange]}
            if exchange != "ring":
                options["layout"] = "contiguous"
            if exchange == "a2a+p2p":
                options["message_parts"] = min(parts, heads[1] // 2)
            cases.append(Case(MASKS[mask], heads, (8, 24), torch.float64, options))
    check(cases, world_size)


def test_parts_need_not_be_equal() -> None:
    """Five heads in two, three and four parts: the middle part is both early and late."""
    for parts in (2, 3, 4):
        options = {"message_parts": parts, "exchange": "p2p"}
        check([Case(MASKS["causal"], (10, 5), (8, 8), torch.float64, options)], 3)


def everything(
    rank: int, world_size: int, mask: Mask, parts: int, dtype: torch.dtype
) -> list[Tensor]:
    """Results and gradients of an attention with dropout, sinks and a gradient of the lse."""
    cp = ContextParallel(dist.group.WORLD, mask, exchange="p2p", message_parts=parts)
    generator = torch.Generator().manual_seed(3)
    shapes = (8, 8), (4, 8), (4, 8), (8, 8)
    whole = [torch.randn(1, mask.seq_len, *shape, generator=generator) for shape in shapes]
    q, k, v, dout = (cp.shard(x.to(dtype), 1) for x in whole)
    sinks = torch.linspace(-1, 1, 8, dtype=dtype)
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    out, lse = cp.attention(q, k, v, sinks=sinks, dropout=Dropout(0.3, seed=11), return_lse=True)
    grads = torch.autograd.grad((out * dout).sum() + lse.square().sum(), leaves)
    return [out.detach(), lse.detach(), *grads]


def test_parts_change_nothing_of_dropout_sinks_and_lse() -> None:
    mask = MASKS["documents_window"]
    one = run_ranks(everything, 4, mask, 1, torch.float64)
    for parts in (2, 4):
        for expected, found in zip(one, run_ranks(everything, 4, mask, parts, torch.float64)):
            for x, y in zip(expected, found, strict=True):
                assert (x - y).norm() <= 1e-12 * x.norm()


def test_the_same_bits_again() -> None:
    first, second = (run_ranks(everything, 4, Mask.causal(64), 4, torch.float32) for _ in range(2))
    for x, y in zip(first, second):
        assert all(map(torch.equal, x, y))


def traffic(rank: int, world_size: int, mask: Mask, options: dict[str, Any]) -> list[Any]:
    """(peer, elements) of all messages that one rank receives, forward and backward."""
    seen: list[tuple[int, int]] = []
    original = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        for operation in operations:
            if operation.op is dist.irecv:
                seen.append((operation.group_peer, operation.tensor.numel()))
        return original(operations)

    dist.batch_isend_irecv = counting
    try:
        cp = ContextParallel(dist.group.WORLD, mask, **options)
        q, k, v = (
            torch.randn(1, mask.seq_len // world_size, heads, 4).requires_grad_()
            for heads in (6, 3, 3)
        )
        cp.attention(q, k, v).sum().backward()
    finally:
        dist.batch_isend_irecv = original
    return seen


@pytest.mark.parametrize("route", ["ring", "direct"])
def test_messages_on_the_wire_equal_the_plan(route: str) -> None:
    mask, options = MASKS["causal"], {**OPTIONS[route], "message_parts": 2}
    schedule = Schedule.build(
        mask, SequenceLayout.make(mask, 4, "auto"), num_heads=6, num_kv_heads=3, **options
    )
    assert schedule.parts(0) == ((0, 1), (1, 3))
    for rank, received in enumerate(run_ranks(traffic, 4, mask, options)):
        rounds = schedule.rounds(rank)
        keys = [m for round_ in rounds if (m := round_.receive_keys)]
        grads = [
            message
            for round_ in rounds
            for message in (round_.receive_passed, round_.receive_returned)
            if message
        ]
        expected = [
            (message.peer, message.num_tokens * (stop - start) * 8)
            for message in (*keys, *keys, *grads)
            for start, stop in schedule.parts(rank)
        ]
        assert Counter(received) == Counter(expected)


def refused(rank: int, world_size: int, kv_heads: int, options: dict[str, Any]) -> str:
    cp = ContextParallel(dist.group.WORLD, Mask.causal(32), **options)
    q, k = (torch.zeros(1, 16, heads, 8) for heads in (4, kv_heads))
    try:
        cp.attention(q, k, k)
    except ConfigError as error:
        return str(error)
    return ""


def test_parts_without_heads_or_messages_are_refused() -> None:
    for kv_heads, options, rule in (
        (2, {"message_parts": 3}, "at most the key/value heads of a rank, 2"),
        (4, {"message_parts": 2, "exchange": "a2a"}, "no effect with --cp-comm-type a2a"),
        (4, {"message_parts": 2, "exchange": "all_gather"}, "no effect"),
        (4, {"message_parts": 3, "exchange": "a2a+p2p", "hierarchical_sizes": (2, 1)}, "rank, 2"),
    ):
        assert all(rule in text for text in run_ranks(refused, 2, kv_heads, options)), rule
    assert run_ranks(refused, 2, 4, {"message_parts": 4}) == ["", ""]
