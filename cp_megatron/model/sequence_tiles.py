"""The MLP in tiles along the sequence: its wide tensors exist for a few tokens at a time.

Norm and MLP compute every token by itself, so their rows can be cut anywhere (the idea of ALST's
tiled MLP, Bekman et al. 2025, arXiv:2506.13996):

    rows of the residual stream   | t0 | t1 | t2 | t3 |
                                    |                      one after the other; sequence
                                    v                      parallelism gathers the rows of t0 only
               norm -> gate, up [tile, f/tp] -> down
                                    |
    what is added to it           | t0 | t1 | t2 | t3 |

Autograd sees one function. Backward differentiates one tile at a time and adds up the gradients of
the weights over the tiles, in float32 (float64 for float64). FSDP reduces the sums once, so ranks
may have different numbers of tiles.

Shapes: b batch, r rows of the residual stream on this rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.tensor_parallel import LocalWeights

TileFunction = Callable[[Tensor, bool], Tensor]
"""Rows [b, t, h], and whether only gradients pass through the result, whose values are never read
-> what is added to those rows, [b, t, h]."""
_Tile = tuple[GradientEdge, tuple[Tensor, ...]]
"""A computed tile: the end of its graph, and the tensors that have gradients."""


def in_tiles(
    function: TileFunction,
    x: Tensor,
    weights: LocalWeights,
    *,
    rows: int,
    recompute: bool,
    gradient_only: bool,
) -> Tensor:
    """``function`` on the rows of ``x``, a tile at a time.

    Args:
        function: computes every row by itself; runs again in backward with ``recompute``.
        x: [b, r, h].
        weights: the weights that ``function`` reads.
        rows: rows of a tile.
        recompute: keep only ``x`` for backward, not what autograd keeps of every tile.
        gradient_only: the result is never read, because it is the end of a recomputation. Nothing
            is computed until backward needs it.

    Returns:
        [b, r, h]; with ``gradient_only`` its values are arbitrary.
    """
    assert recompute or not gradient_only
    call = _Call(function, weights, rows, recompute, gradient_only)
    result: Tensor = _InTiles.apply(call, torch.is_grad_enabled(), x, *weights.tensors())
    return result


@dataclass(frozen=True)
class _Call:
    function: TileFunction
    weights: LocalWeights
    rows: int
    recompute: bool
    gradient_only: bool

    def spans(self, num_rows: int) -> list[slice]:
        starts = range(0, num_rows, self.rows)
        return [slice(start, min(start + self.rows, num_rows)) for start in starts]

    def tile(self, x: Tensor, leaves: Sequence[Tensor], out: Tensor | None = None) -> _Tile:
        """Runs the function under autograd; its result is copied to ``out``, or never read."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = self.function(x, out is None)
        if out is not None:
            out.copy_(result.detach())
        return get_gradient_edge(result), (x, *(w for w in leaves if w.requires_grad))


class _InTiles(torch.autograd.Function):
    """Backward: the gradient of x tile by tile, those of the weights summed over the tiles."""

    @staticmethod
    def forward(ctx: Any, call: _Call, differentiates: bool, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.call, ctx.tiles = call, []
        ctx.save_for_backward(x, *weights)
        out = torch.empty_like(x)
        if call.gradient_only:
            return out
        keep = differentiates and not call.recompute
        leaves = _leaves(weights) if keep else weights
        with call.weights.replaced(leaves):
            for span in call.spans(x.shape[1]):
                if keep:
                    ctx.tiles.append(call.tile(x[:, span], leaves, out[:, span]))
                else:
                    out[:, span] = call.function(x[:, span], False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, tiles = ctx.call, ctx.tiles
        x, *weights = ctx.saved_tensors
        leaves = _leaves(weights)
        dx = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(weights)
        with call.weights.replaced(leaves):
            for number, span in enumerate(call.spans(x.shape[1])):
                end, inputs = tiles[number] if tiles else call.tile(x[:, span], leaves)
                dx[:, span], *dweights = torch.autograd.grad(end, inputs, grads[0][:, span])
                gradients = iter(dweights)
                for place, weight in enumerate(weights):
                    if weight.requires_grad:
                        sums[place] = _add(sums[place], next(gradients))
                if tiles:
                    tiles[number] = None  # frees what it kept
        ctx.tiles = []
        rounded = (dw if dw is None else dw.to(w.dtype) for dw, w in zip(sums, weights))
        return None, None, dx, *rounded


def _leaves(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.to(accumulation_dtype(part.dtype)) if total is None else total.add_(part)
