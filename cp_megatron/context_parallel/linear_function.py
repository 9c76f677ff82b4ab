"""A linear recurrence over a sharded sequence as one autograd function.

``plan/states.py`` explains what crosses ranks, ``kernels/linear_reference.py`` the recurrence.
Forward scans the blocks of each piece from an empty state, exchanges what the pieces do to a
state, and scans again from the states that enter. Backward does the same with gradients, from the
last block to the first, and then differentiates every block by itself. Only the inputs, the states
that enter pieces and the transitions of this rank's share of the heads are kept.

Shapes: B batch, S tokens of the shard, G key heads, H value heads, D key dim, E value dim, n
blocks, C tokens of a block, p pieces of this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.context_parallel.attention_function import KeptAttention
from cp_megatron.context_parallel.buffers import Buffers
from cp_megatron.context_parallel.received import Received
from cp_megatron.context_parallel.state_exchange import StateExchange
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.linear_reference import (
    BlockInputs,
    BlockMaps,
    BlockMasks,
    apply_transition,
    step,
    summarize,
)
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.state_blocks import StateBlocks
from cp_megatron.plan.states import StatePlan

BLOCK = 64
"""Tokens of a block. Work within a block grows with its length, work on states shrinks with it."""


class LinearPlan:
    """The part of one rank in a ``StatePlan``, and the group that it exchanges messages with."""

    def __init__(
        self,
        mask: Mask,
        layout: SequenceLayout,
        num_heads: int,
        rank: int,
        group: dist.ProcessGroup | None,
        buffers: Buffers,
        sums: LinkSums,
    ) -> None:
        plan = StatePlan.of(mask, layout, num_heads)
        own = [(number, piece) for number, piece in enumerate(plan.pieces) if piece.rank == rank]
        self.plan, self.rank, self.group, self.buffers, self.sums = plan, rank, group, buffers, sums
        self.blocks = StateBlocks.of(mask, [piece for _, piece in own], BLOCK)
        self._on: dict[torch.device, _Places] = {}
        place = {number: i for i, (number, _) in enumerate(own)}
        # Which of this rank's pieces, in the order in which its messages have them.
        self.entering, self.leaving, self.through = (
            [place[number] for number in numbers[rank]]
            for numbers in (plan.entering, plan.leaving, plan.through)
        )

    def on(self, device: torch.device) -> _Places:
        """Returns the masks and indices of the blocks on a device, copied there once."""
        if device not in self._on:
            x = self.blocks

            def moved(array: npt.NDArray[Any]) -> Tensor:
                return torch.from_numpy(array).to(device)

            self._on[device] = _Places(
                place=moved(x.place),
                masks=BlockMasks(*map(moved, (x.reads, x.enters, x.leaves, x.carries))),
                first=moved(x.first),
                last=moved(x.last),
                forward=[(moved(level), moved(level - 1)) for level in x.forward],
                backward=[(moved(level), moved(level + 1)) for level in x.backward],
            )
        return self._on[device]


@dataclass(frozen=True, kw_only=True)
class _Places:
    """The arrays of ``StateBlocks`` on a device.

    Attributes:
        place, first, last: as there.
        masks: the masks that the kernel takes.
        forward, backward: the blocks of each level, and for each the block that its state or its
            gradient comes from.
    """

    place: Tensor
    masks: BlockMasks
    first: Tensor
    last: Tensor
    forward: list[tuple[Tensor, Tensor]]
    backward: list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Call:
    """One pass over the blocks of a plan; ``at`` has its masks and indices on the device."""

    plan: LinearPlan
    at: _Places
    scale: float

    def blocks(self, x: Tensor) -> Tensor:
        """Cuts tokens [B, S, heads, ..] into blocks [B, n, heads, C, ..] in the type of sums."""
        sizes = self.plan.blocks.enters.shape
        exact = x.to(accumulation_dtype(x.dtype))
        blocks = exact.new_zeros((x.shape[0], math.prod(sizes), *x.shape[2:]))
        blocks[:, self.at.place] = exact
        # [B, n * C, heads, ..] -> [B, n, heads, C, ..]
        return blocks.unflatten(1, sizes).transpose(2, 3).contiguous()

    def inputs(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None
    ) -> BlockInputs:
        """Arranges the tokens of this rank as the kernel takes them."""
        rate = None if beta is None else self.blocks(beta)
        return BlockInputs(self.blocks(q), self.blocks(k), self.blocks(v), self.blocks(g), rate)

    def tokens(self, blocks: Tensor) -> Tensor:
        """Puts blocks [B, n, heads, C, ..] back in the order of tokens, [B, S, heads, ..]."""
        return blocks.transpose(2, 3).flatten(1, 2)[:, self.at.place]

    def scan(self, x: BlockMaps, entering: Tensor) -> Tensor:
        """Computes the state that enters every block, [B, n, H, D, E].

        Args:
            x: the affine maps of the blocks.
            entering: the states that enter pieces, [B, p, H, D, E].
        """
        states = torch.zeros_like(x.increment)
        states[:, self.at.first] = entering
        for level, before in self.at.forward:
            moved = apply_transition(x.transition[:, before], states[:, before])
            states[:, level] = moved + x.increment[:, before]
        return states

    def scan_back(self, transition: Tensor, own: Tensor, leaving: Tensor) -> Tensor:
        """Computes the gradient of the state that leaves every block, [B, n, H, D, E].

        Args:
            transition: of the blocks.
            own: the gradients of the states that enter blocks, through the blocks' own outputs.
            leaving: the gradients of the states that leave pieces, [B, p, H, D, E].
        """
        grads = torch.zeros_like(own)
        grads[:, self.at.last] = leaving
        for level, after in self.at.backward:
            moved = apply_transition(transition[:, after], grads[:, after], transposed=True)
            grads[:, level] = moved + own[:, after]
        return grads

    def piece_transitions(self, transition: Tensor) -> Tensor:
        """Multiplies the transitions of each through piece: [B, n, H, ..] -> [B, t, H, ..]."""
        plan, found = self.plan.blocks, []
        for piece in self.plan.through:
            product = transition[:, plan.first[piece]]
            for block in range(plan.first[piece] + 1, plan.last[piece] + 1):
                product = apply_transition(transition[:, block], product)
            found.append(product)
        if not found:
            return transition[:, :0]
        return torch.stack(found, dim=1)


class _LinearAttention(torch.autograd.Function):
    """Saves q, k, v, g, beta, the states that enter pieces, and the chained transitions.

    All sums are float32 (float64 for float64). Gradients are complete on this rank: what a token
    adds to outputs of other ranks arrives as the gradient of the state that leaves its piece.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        kept: KeptAttention | Received | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
    ) -> Tensor:
        """Returns [B, S, H, E] in v's type; the inputs are those of ``linear_attention``."""
        ctx.call = call
        given = (q, k, v, g, beta)
        if isinstance(kept, KeptAttention) and kept.filled:
            saved, result = kept.again(*given)
            ctx.save_for_backward(*saved)
            return result
        with torch.autocast(q.device.type, enabled=False):
            x = call.inputs(*given)
            summary = summarize(x, call.at.masks, call.scale)
            received = kept if isinstance(kept, Received) else Received()
            entering, chained = received.once(lambda: _enter(call, summary))
            states = call.scan(summary, entering)
            result = call.tokens(summary.local + summary.reads @ states).to(v.dtype)
        saved = (*given, entering, chained)
        ctx.save_for_backward(*saved)
        if isinstance(kept, KeptAttention):
            kept.keep(len(given), saved, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        *given, entering, chained = ctx.saved_tensors
        call: _Call = ctx.call
        with torch.autocast(dout.device.type, enabled=False):
            x = call.inputs(*given)
            dblocks = call.blocks(dout)
            summary = summarize(x, call.at.masks, call.scale)
            states = call.scan(summary, entering)
            own = summary.reads.mT @ dblocks
            leaving = _leave(call, summary.transition, own, chained)
            dstates = call.scan_back(summary.transition, own, leaving)
            del summary, own
            inputs = [y.requires_grad_() for y in x if y is not None]
            with torch.enable_grad():
                results = step(x, call.at.masks, call.scale, states)
            grads = torch.autograd.grad(results, inputs, (dblocks, dstates))
        back = [call.tokens(grad).to(y.dtype) for grad, y in zip(grads, given)]
        return None, None, *back, *[None] * (len(given) - len(back))


def _enter(call: _Call, x: BlockMaps) -> tuple[Tensor, Tensor]:
    """Returns the states that enter pieces, [B, p, H, D, E], and the chained transitions."""
    plan, at = call.plan, call.at
    empty = torch.zeros_like(x.increment[:, at.first])
    if not plan.plan.chains:
        return empty, x.transition[:, :0]
    states = call.scan(x, empty)
    last = at.last[plan.leaving]
    increments = apply_transition(x.transition[:, last], states[:, last])
    transitions = call.piece_transitions(x.transition)
    with plan.buffers.lend(states.device) as memory:
        exchange = StateExchange(plan.plan, plan.rank, plan.group, memory, plan.sums)
        entering, chained = exchange.entering_states(increments + x.increment[:, last], transitions)
    empty[:, plan.entering] = entering
    return empty, chained


def _leave(call: _Call, transition: Tensor, own: Tensor, chained: Tensor) -> Tensor:
    """Returns the gradients of the states that leave pieces, [B, p, H, D, E]."""
    plan, at = call.plan, call.at
    empty = torch.zeros_like(own[:, at.last])
    if not plan.plan.chains:
        return empty
    grads = call.scan_back(transition, own, empty)
    first = at.first[plan.entering]
    inward = apply_transition(transition[:, first], grads[:, first], transposed=True)
    with plan.buffers.lend(own.device) as memory:
        exchange = StateExchange(plan.plan, plan.rank, plan.group, memory, plan.sums)
        leaving = exchange.leaving_gradients(inward + own[:, first], chained)
    empty[:, plan.leaving] = leaving
    return empty


def planned_linear_attention(
    plan: LinearPlan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    scale: float,
    kept: KeptAttention | Received | None = None,
) -> Tensor:
    """Applies the autograd function; arguments and result are those of ``linear_attention``."""
    call = _Call(plan, plan.on(q.device), scale)
    out: Tensor = _LinearAttention.apply(call, kept, q, k, v, g, beta)
    return out
