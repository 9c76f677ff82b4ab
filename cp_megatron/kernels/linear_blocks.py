"""The tokens of a rank in blocks, computed by ``linear_reference.py``: a kernel on any device.

Heads are computed in tiles, so that temporary tensors stay small (``plan/linear_tiles.py``). Only
the output and the matrices that multiply entering states exist for all heads at once. Backward
rebuilds the blocks, scans states forwards and gradients of states backwards without autograd, and
then differentiates all blocks of a tile at once by autograd.

Shapes: as in ``linear_interface.py``; n blocks, C tokens of a block, p pieces, m blocks that read
the state that enters their piece, h heads of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.linear_interface import LinearInputs, LinearSummary, apply_transition
from cp_megatron.kernels.linear_reference import BlockInputs, BlockMasks, SolvedBlocks
from cp_megatron.plan.linear_tiles import head_tiles
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.state_blocks import StateBlocks
from cp_megatron.plan.states import Piece

BLOCK = 64
"""Tokens of a block. Work within a block grows with its length, work on states shrinks with it."""

Blocks = slice | Tensor
"""Blocks that are computed at once; a slice if it is one, which saves a copy."""


class _Tile(NamedTuple):
    heads: slice  # of H
    kv_heads: slice  # of G
    inputs: BlockInputs


class LinearBlocks:
    """A ``LinearKernel``.

    Args:
        mask: the documents.
        pieces: those of this rank, in order.
        device: where the tokens are.
    """

    def __init__(self, mask: Mask, pieces: Sequence[Piece], device: torch.device) -> None:
        x = StateBlocks.of(mask, pieces, BLOCK)
        self._shape, self._device = x.enters.shape, device
        self._place = self._moved(x.place)
        self._masks = BlockMasks(
            *(torch.from_numpy(y).to(device) for y in (x.reads, x.enters, x.leaves, x.carries))
        )
        flags = [np.asarray(flag, dtype=np.bool_) for flag in list(zip(*pieces))[4:7]]
        enters, leaves, through = flags
        self._first, self._last = self._moved(x.first[enters]), self._moved(x.last[leaves])
        self._forward = [(self._blocks(b), self._blocks(b - 1)) for b in x.forward]
        self._backward = [(self._blocks(b), self._blocks(b + 1)) for b in x.backward]
        # Of the blocks that read an entering state: the piece among those that a state enters, how
        # many come before in that piece, and the last block of each through piece.
        self._entry = self._moved(x.entry)
        self._entry_piece = self._moved((np.cumsum(enters) - 1)[x.piece[x.entry]])
        depth = x.entry - x.first[x.piece[x.entry]]
        by_depth = np.split(np.argsort(depth, kind="stable"), np.cumsum(np.bincount(depth))[:-1])
        self._depths = [(self._blocks(b), self._blocks(b - 1)) for b in by_depth[1:]]
        self._entry_first = self._moved(np.flatnonzero(depth == 0))
        self._entry_last = self._moved(np.searchsorted(x.entry, x.last[through]))
        block = np.searchsorted(x.entry, x.place // BLOCK)
        found = np.append(x.entry, -1)[block] == x.place // BLOCK
        self._entry_tokens = self._moved(np.flatnonzero(found))
        self._entry_place = self._moved((block * BLOCK + x.place % BLOCK)[found])

    def _moved(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _blocks(self, array: IntArray) -> Blocks:
        """Returns an index of these blocks."""
        if len(array) == 1:
            return slice(int(array[0]), int(array[0]) + 1)
        return self._moved(array)

    # ---- the four calls --------------------------------------------------------------------------

    def summarize(self, x: LinearInputs) -> LinearSummary:
        """Computes the affine maps of the pieces and the output from empty states."""
        out = torch.empty_like(x.v, dtype=accumulation_dtype(x.v.dtype))
        increments, transitions, reads = [], [], []
        for tile in self._tiles(x):
            maps = SolvedBlocks.of(tile.inputs, self._masks, x.scale).maps()
            states = self._scan(maps.transition, maps.increment)
            out[:, :, tile.heads] = self._tokens(maps.local.add_(maps.reads @ states))
            last = self._last
            leaving = apply_transition(maps.transition[:, last], states[:, last])
            increments.append(leaving.add_(maps.increment[:, last]))
            del states
            transition = maps.transition[:, self._entry]
            prefix = self._prefixes(transition)
            # S enters a piece, and the product of the transitions before it, times S, a block.
            read = maps.reads[:, self._entry]
            factors = transition.shape[-1] == 1
            reads.append(read * prefix.mT if factors else read @ prefix)
            ends = self._entry_last
            transitions.append(_product(transition[:, ends], prefix[:, ends]))
        parts = out, *reads
        return LinearSummary(torch.cat(increments, 2), torch.cat(transitions, 2), parts)

    def apply(self, x: LinearInputs, summary: LinearSummary, entering: Tensor | None) -> Tensor:
        """Adds to the output from empty states what is read of the states that enter."""
        start, (out, *all_reads) = 0, summary.parts
        for reads in all_reads if entering is not None else ():
            assert entering is not None
            heads = slice(start, start + reads.shape[2])
            start = heads.stop
            read = reads @ entering[:, self._entry_piece, heads]
            # [B, m, h, C, E] -> [B, m * C, h, E]
            tokens = read.transpose(2, 3).flatten(1, 2)[:, self._entry_place]
            out[:, :, heads].index_add_(1, self._entry_tokens, tokens)
        return out.to(x.v.dtype)

    def adjoint(self, x: LinearInputs, dout: Tensor) -> Tensor:
        """Follows the blocks that read an entering state from the last to the first."""
        found, entry = [], self._entry
        masks = BlockMasks(*(mask[entry] for mask in self._masks))
        for tile in self._tiles(x):
            inputs = BlockInputs(*(None if y is None else y[:, entry] for y in tile.inputs))  # type: ignore[arg-type]
            # Neither maps nor reads depend on values.
            solved = SolvedBlocks.of(inputs._replace(v=inputs.v[..., :0]), masks, x.scale)
            dblocks = self._in_blocks(dout[:, :, tile.heads])[:, entry]
            grads, transition = solved.reads().mT @ dblocks, solved.transition()
            for after, block in reversed(self._depths):
                moved = apply_transition(transition[:, block], grads[:, after], transposed=True)
                grads[:, block] += moved
            found.append(grads[:, self._entry_first])
        return torch.cat(found, 2)

    def backward(
        self, x: LinearInputs, dout: Tensor, entering: Tensor | None, leaving: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Scans states and their gradients, then differentiates the blocks."""
        given = [y for y in x[:5] if y is not None]
        # Tiles may share a key head.
        exact = accumulation_dtype(x.q.dtype)
        grads = [torch.zeros_like(y, dtype=exact) for y in given[:2]]
        grads += [torch.empty_like(y) for y in given[2:]]
        for tile in self._tiles(x):
            inputs = [y.requires_grad_() for y in tile.inputs if y is not None]
            with torch.enable_grad():
                solved = SolvedBlocks.of(tile.inputs, self._masks, x.scale)
            dblocks = self._in_blocks(dout[:, :, tile.heads])
            parts = [None if y is None else y[:, :, tile.heads] for y in (entering, leaving)]
            states, dstates = self._scans(solved, dblocks, *parts)
            with torch.enable_grad():
                results = solved.step(states)
            of_blocks = torch.autograd.grad(results, inputs, (dblocks, dstates))
            del solved, results, states, dstates
            for i, grad in enumerate(of_blocks):
                if i < 2:
                    grads[i][:, :, tile.kv_heads] += self._tokens(grad)
                else:
                    grads[i][:, :, tile.heads] = self._tokens(grad)
        return tuple(grad.to(y.dtype) for grad, y in zip(grads, given))

    # ---- tokens and blocks -----------------------------------------------------------------------

    def _tiles(self, x: LinearInputs) -> Iterator[_Tile]:
        """Cuts the inputs into blocks, some heads at a time."""
        (heads, value_dim), (groups, key_dim) = x.v.shape[2:], x.k.shape[2:]
        tokens, per_channel = x.v.shape[0] * math.prod(self._shape), x.g.ndim == 4
        element = accumulation_dtype(x.v.dtype).itemsize
        sizes = heads, groups, key_dim, value_dim
        for span, kv_span in head_tiles(*sizes, tokens, element, BLOCK, per_channel=per_channel):
            own, shared = slice(*span), slice(*kv_span)
            q, k = (self._in_blocks(y[:, :, shared]) for y in (x.q, x.k))
            v, g = (self._in_blocks(y[:, :, own]) for y in (x.v, x.g))
            beta = None if x.beta is None else self._in_blocks(x.beta[:, :, own])
            yield _Tile(own, shared, BlockInputs(q, k, v, g, beta))

    def _in_blocks(self, x: Tensor) -> Tensor:
        """Cuts tokens [B, S, heads, ..] into blocks [B, n, heads, C, ..] in the type of sums."""
        blocks = x.new_zeros(
            (x.shape[0], math.prod(self._shape), *x.shape[2:]), dtype=accumulation_dtype(x.dtype)
        )
        blocks[:, self._place] = x.to(blocks.dtype)
        # [B, n * C, heads, ..] -> [B, n, heads, C, ..]
        return blocks.unflatten(1, self._shape).transpose(2, 3).contiguous()

    def _tokens(self, blocks: Tensor) -> Tensor:
        """Puts blocks [B, n, heads, C, ..] back in the order of tokens, [B, S, heads, ..]."""
        return blocks.transpose(2, 3).flatten(1, 2)[:, self._place]

    # ---- scans -----------------------------------------------------------------------------------

    def _scans(
        self, solved: SolvedBlocks, dblocks: Tensor, entering: Tensor | None, leaving: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Computes the state that enters every block, and the gradient of the one that leaves."""
        transition = solved.transition()
        states = self._scan(transition, solved.increment(), entering)
        return states, self._scan_back(transition, solved.reads().mT @ dblocks, leaving)

    def _scan(
        self, transition: Tensor, increment: Tensor, entering: Tensor | None = None
    ) -> Tensor:
        """Computes the state that enters every block, [B, n, h, D, E].

        Args:
            transition, increment: the affine maps of the blocks.
            entering: the states that enter pieces, [B, i, h, D, E]; None for empty ones.
        """
        states = torch.zeros_like(increment)
        if entering is not None:
            states[:, self._first] = entering
        for level, before in self._forward:
            moved = apply_transition(transition[:, before], states[:, before])
            states[:, level] = moved.add_(increment[:, before])
        return states

    def _scan_back(self, transition: Tensor, own: Tensor, leaving: Tensor | None) -> Tensor:
        """Computes the gradient of the state that leaves every block, [B, n, h, D, E].

        Args:
            transition: of the blocks.
            own: the gradients of the states that enter blocks, through the blocks' own outputs.
            leaving: the gradients of the states that leave pieces, [B, o, h, D, E]; None for 0.
        """
        grads = torch.zeros_like(own)
        if leaving is not None:
            grads[:, self._last] = leaving
        for level, after in self._backward:
            moved = apply_transition(transition[:, after], grads[:, after], transposed=True)
            grads[:, level] = moved.add_(own[:, after])
        return grads

    def _prefixes(self, transition: Tensor) -> Tensor:
        """Multiplies the transitions of a piece before each of its blocks, [B, m, h, ..]."""
        prefix = torch.empty_like(transition)
        first = self._entry_first
        if transition.shape[-1] == 1:
            prefix[:, first] = 1.0
        else:
            prefix[:, first] = torch.eye(
                transition.shape[-1], dtype=prefix.dtype, device=prefix.device
            )
        for level, before in self._depths:
            prefix[:, level] = _product(transition[:, before], prefix[:, before])
        return prefix


def _product(second: Tensor, first: Tensor) -> Tensor:
    """Multiplies transitions. What is about to underflow becomes 0.

    Products decay towards 0, and processors take many times as long for denormal numbers.
    """
    smallest = 1e8 * torch.finfo(first.dtype).tiny
    return F.hardshrink(apply_transition(second, first), smallest)
