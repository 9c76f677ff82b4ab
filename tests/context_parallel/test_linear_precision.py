"""Chains of 128 pieces in float32 lose no more than one process does; a bfloat16 wire would."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from cp_megatron.context_parallel import ContextParallel, state_exchange
from cp_megatron.plan import Mask, SequenceLayout
from tests.context_parallel.recurrences import KINDS, inputs_of
from tests.oracles import relative_error
from tests.ranks import run_ranks

PIECES, LENGTH, HEADS, DIM = 128, 16, 2, 32
TOKENS = PIECES * LENGTH
NAMES = ("out", "q", "k", "v", "g", "beta")


def inputs(alike: bool) -> tuple[list[Tensor], Tensor]:
    """A memory that hardly decays; ``alike`` keys are far from orthogonal. Exact in float32."""
    generator = torch.Generator().manual_seed(5)
    shape = 1, TOKENS, HEADS
    q, k, v, dout = (torch.randn(*shape, DIM, generator=generator) for _ in range(4))
    k = normalize(k + 2.0 * alike, dim=-1)
    g, beta = (torch.rand(shape, generator=generator) for _ in range(2))
    return [x.double() for x in (q, k, v, -1e-4 * g, beta)], dout.double()


def results(cp: ContextParallel, alike: bool, dtype: torch.dtype) -> list[Tensor]:
    """This rank's out and gradients."""
    whole, dout = inputs(alike)
    own = [cp.shard(x, 1).to(dtype).requires_grad_() for x in whole]
    out = cp.linear_attention(*own)
    return [out.detach(), *torch.autograd.grad(out, own, cp.shard(dout, 1).to(dtype))]


def errors(rank: int, world_size: int, alike: bool, wire: torch.dtype) -> list[dict[str, float]]:
    """Relative errors of float32 on one process, and of this rank, which holds every fourth piece.

    What travels is rounded to ``wire``.
    """
    mask = Mask.causal(TOKENS)
    alone = ContextParallel(None, mask)
    exact = results(alone, alike, torch.float64)
    starts = range(0, TOKENS, LENGTH)
    dealt = tuple(tuple((s, s + LENGTH) for s in starts[r::world_size]) for r in range(world_size))
    cp = ContextParallel(dist.group.WORLD, mask, SequenceLayout(dealt, "contiguous"))
    send = state_exchange.all_to_all

    def rounding(group: object, sent: Tensor, *rest: object) -> None:
        sent.copy_(sent.to(wire))
        send(group, sent, *rest)  # type: ignore[arg-type]

    with mock.patch.object(state_exchange, "all_to_all", rounding):
        ours = results(cp, alike, torch.float32)
    one = results(alone, alike, torch.float32)
    places = alone.positions
    return [
        {name: relative_error(x.double(), y, at) for name, x, y in zip(NAMES, found, exact)}
        for found, at in ((one, places), (ours, cp.positions))
    ]


@pytest.mark.parametrize("alike", [False, True], ids=["random keys", "alike keys"])
def test_a_chain_of_128_pieces_is_as_exact_as_one_process(alike: bool) -> None:
    for one, ours in run_ranks(errors, 4, alike, torch.float32):
        assert max(one.values()) < 1e-4
        for name in NAMES:
            assert ours[name] < 2 * one[name], (name, one, ours)


def test_a_bfloat16_wire_would_be_noticed() -> None:
    for one, ours in run_ranks(errors, 4, False, torch.bfloat16):
        for name in NAMES:
            assert ours[name] > 20 * one[name], (name, one, ours)


@pytest.mark.parametrize("kind", KINDS)
def test_short_memories_cost_their_neighbours_no_digits(kind: str) -> None:
    """Documents share a block with others that decay by e^-80 a token."""
    lengths = (40, 24) * 4
    given = inputs_of(kind, 1, sum(lengths), heads=(2, 4), dims=(8, 8))
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    for start, length in list(zip(starts, lengths))[::2]:
        given[3][:, start : start + length] = -80.0
    whole = [None if x is None else x.float().requires_grad_() for x in given]
    out = ContextParallel(None, Mask.documents(lengths)).linear_attention(*whole)
    out.backward(torch.ones_like(out))
    for start, length in list(zip(starts, lengths))[1::2]:
        part = slice(start, start + length)
        alone = [None if x is None else x.detach()[:, part].requires_grad_() for x in whole]
        expected = ContextParallel(None, Mask.causal(length)).linear_attention(*alone)
        expected.backward(torch.ones_like(expected))
        assert (out[:, part] - expected).norm() < 1e-6 * expected.norm()
        for x, y in zip(whole, alone):
            if x is not None and y is not None:
                assert (x.grad[:, part] - y.grad).norm() < 2e-6 * y.grad.norm()
