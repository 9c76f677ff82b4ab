"""Dropout of the residual stream whose mask depends only on tokens, not on where they are computed.

Shapes: b batch, r rows of the residual stream on this rank, h hidden.

As in attention dropout (``dropout.py``), a number is dropped by a hash of what it is,

    drop = hash(seed, row of the run, position in the row, place in the model, channel)
           < (p - 1/2) 2^64, as a signed number

so every grid and every size of a micro batch drops the same numbers. Backward draws the mask again,
and a recomputation needs no state of a generator. What is kept is the hash of the first three,
8 bytes per token for all places together. It starts the token's own streams of splitmix64:

    token = mix(mix(mix(seed) + row) + position)
    u     = mix(mix(token + place) + (channel + 1) GAMMA)        its upper 31 bits are used
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cp_megatron.kernels.dropout import GAMMA, Dropout, RowHashes, mix_, scramble_

_BITS = 31
_AT_ONCE = 1 << 16
"""Random numbers that are drawn at once, so that they stay in a CPU's cache."""

Drop = Callable[[Tensor, Tensor, int, float], Tensor]
"""x [n, h], contiguous, of any floating type; the start of each row's stream, int64 [n]; the hash
below which a number becomes 0; and the factor of the others -> the same shape and type."""


@dataclass(frozen=True, eq=False)
class StreamDropout:
    """The dropout at one place of the model, in one micro batch; call it with what it drops from.

    Args:
        dropout: the probability, and what the mask is drawn from.
        tokens: int64 [b, r], where the streams of this rank's tokens start.
        place: the number of the place in the model.
    """

    dropout: Dropout
    tokens: Tensor
    place: int = 0

    @classmethod
    def of(cls, dropout: Dropout, positions: Tensor, num_rows: int) -> StreamDropout:
        """The dropout of what the embedding returns.

        Args:
            dropout: the probability, the seed, and which rows of the run these are.
            positions: int64 [r], of this rank's residual stream in the whole row of tokens.
            num_rows: b.
        """
        rows = RowHashes.of(dropout, positions, num_rows)
        return cls(dropout, mix_(rows.hashes + rows.positions))

    def in_layer(self, layer: int) -> tuple[StreamDropout, StreamDropout]:
        """Those of what the mixer and the MLP of a layer add, numbered from 0 in the model."""
        return replace(self, place=2 * layer + 1), replace(self, place=2 * layer + 2)

    def __call__(self, x: Tensor) -> Tensor:
        """[b, r, h] -> the same with numbers set to 0, and the others divided by 1 - p."""
        dropped: Tensor = _Drop.apply(x, self)
        return dropped

    def drop(self, x: Tensor) -> Tensor:
        """``__call__`` without a gradient."""
        starts = mix_(self.tokens.flatten() + self.place)
        threshold = int(self.dropout.probability * (1 << _BITS)) * (1 << 64 - _BITS) - (1 << 63)
        run = _kernel(x.device.type, x.dtype)
        # [b, r, h] -> [b * r, h]
        return run(x.contiguous().flatten(0, 1), starts, threshold, self.dropout.scale).view_as(x)


class _Drop(torch.autograd.Function):
    """Backward draws the mask of forward again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: StreamDropout) -> Tensor:
        ctx.dropout = dropout
        return dropout.drop(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.dropout.drop(grads[0]), None


@cache
def _kernel(device_type: str, dtype: torch.dtype) -> Drop:
    has_triton = device_type == "cuda" and importlib.util.find_spec("triton") is not None
    if not has_triton or dtype == torch.float64:  # Triton rounds the factor to float32
        return drop_eager
    # The package is optional.
    from cp_megatron.kernels.stream_dropout_triton import drop_triton

    return drop_triton


def drop_eager(x: Tensor, starts: Tensor, threshold: int, scale: float) -> Tensor:
    """``Drop`` in eager PyTorch."""
    out, width = x * scale, x.shape[1]
    channels = torch.arange(1, width + 1, device=x.device) * GAMMA
    at_once = max(1, _AT_ONCE // width)
    drawn, spare = starts.new_empty(2, min(at_once, len(x)), width)
    for some, start in zip(out.split(at_once), starts.split(at_once), strict=True):
        n = len(some)
        torch.add(start[:, None], channels, out=drawn[:n])
        some.masked_fill_(scramble_(drawn[:n], spare[:n]) < threshold, 0)
    return out
