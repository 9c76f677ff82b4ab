"""The MLP in tiles along the sequence: its wide tensors exist for a few tokens at a time.

Every token goes through norm and MLP by itself, so their rows can be cut anywhere (the idea of
ALST's tiled MLP, Bekman et al. 2025, arXiv:2506.13996):

    rows of the residual stream   | t0 | t1 | t2 | t3 |
                                    |                      one after the other, with sequence
                                    v                      parallelism gathering t0's rows only
               norm -> gate, up [tile, f/tp] -> down
                                    |
    what is added to it           | t0 | t1 | t2 | t3 |

Autograd sees one function. In backward each tile is differentiated by itself, and the gradients of
the weights are added up over the tiles, in float32 (float64 for float64), before anybody else sees
them: FSDP reduces them once, so ranks may have different numbers of tiles.

Shapes: b batch, r rows of the residual stream on this rank, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from cp_megatron.tensor_parallel import accumulation_dtype

TileFunction = Callable[[Tensor, Sequence[Tensor], bool], Tensor]
"""Rows [b, t, h], the weights, and whether the values of the result are forgotten because it is
there for its gradient alone -> what is added to those rows, [b, t, h]."""


def in_tiles(
    function: TileFunction,
    x: Tensor,
    weights: Sequence[Tensor],
    *,
    rows: int,
    recompute: bool,
    forgotten: bool,
) -> Tensor:
    """``function`` on the rows of ``x``, a tile at a time.

    Args:
        function: computes every row by itself; run again in backward with ``recompute``.
        x: [b, r, h].
        weights: plain tensors that ``function`` reads.
        rows: of a tile.
        recompute: keep ``x`` alone for backward; else what autograd keeps of every tile.
        forgotten: nobody reads the result, because this is a recomputation of which it is the end:
            nothing is computed until backward asks for it.

    Returns:
        [b, r, h]; with ``forgotten`` its values are arbitrary.
    """
    assert recompute or not forgotten
    call = _Call(function=function, rows=rows, recompute=recompute, forgotten=forgotten)
    result: Tensor = _InTiles.apply(call, torch.is_grad_enabled(), x, *weights)
    return result


@dataclass(frozen=True, kw_only=True)
class _Call:
    function: TileFunction
    rows: int
    recompute: bool
    forgotten: bool

    def spans(self, num_rows: int) -> list[slice]:
        starts = range(0, num_rows, self.rows)
        return [slice(start, min(start + self.rows, num_rows)) for start in starts]


class _InTiles(torch.autograd.Function):
    """Gradient of x tile by tile; gradients of the weights summed over the tiles."""

    @staticmethod
    def forward(ctx: Any, call: _Call, wanted: bool, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.call, ctx.tiles = call, []
        ctx.save_for_backward(x, *weights)
        out = torch.empty_like(x)
        if call.forgotten:
            return out
        keep = wanted and not call.recompute
        shared = _leaves(weights) if keep else weights
        for span in call.spans(x.shape[1]):
            if keep:
                tile = _Tile.compute(call.function, x[:, span], shared, out[:, span])
                ctx.tiles.append(tile)
            else:
                out[:, span] = call.function(x[:, span], shared, False)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call, tiles = ctx.call, ctx.tiles
        x, *weights = ctx.saved_tensors
        shared = _leaves(weights)
        dx = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * len(weights)
        for number, span in enumerate(call.spans(x.shape[1])):
            tile = tiles[number] if tiles else _Tile.compute(call.function, x[:, span], shared)
            dx[:, span], *dweights = tile.gradients(grads[0][:, span])
            found = iter(dweights)
            for place, weight in enumerate(weights):
                if weight.requires_grad:
                    sums[place] = _add(sums[place], next(found))
            if tiles:
                tiles[number] = None  # what it kept is free now
        ctx.tiles = []
        rounded = (
            None if total is None else total.to(weight.dtype)
            for total, weight in zip(sums, weights)
        )
        return None, None, dx, *rounded


@dataclass(frozen=True)
class _Tile:
    """A tile that was computed: where its result left autograd, and what it depends on."""

    end: GradientEdge
    inputs: tuple[Tensor, ...]

    @classmethod
    def compute(
        cls,
        function: TileFunction,
        x: Tensor,
        weights: Sequence[Tensor],
        out: Tensor | None = None,
    ) -> _Tile:
        """Runs the function as autograd sees it; the result goes to ``out`` and is not kept."""
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            result = function(x, weights, out is None)
        if out is not None:
            out.copy_(result.detach())
        return cls(get_gradient_edge(result), (x, *(w for w in weights if w.requires_grad)))

    def gradients(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Of x and of the weights that have one."""
        return torch.autograd.grad(self.end, self.inputs, grad)


def _leaves(weights: Sequence[Tensor]) -> list[Tensor]:
    return [weight.detach().requires_grad_(weight.requires_grad) for weight in weights]


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part.to(accumulation_dtype(part.dtype)) if total is None else total.add_(part)
