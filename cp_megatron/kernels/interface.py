"""The interface of kernels: one tile forward or backward, without ranks or schedules.

Shapes: B = batch, Q = queries, K = keys, H = query heads, G = key/value heads (H is a multiple of
G; query head h reads key/value head h // (H / G)), D = head dim, E = value head dim.

    q [B, Q, H, D]   k [B, K, G, D]   v [B, K, G, E]   out [B, Q, H, E]   lse [B, H, Q]

``out`` is softmax(scale q k^T) v over the keys of this tile, and ``lse`` is the natural logarithm
of the softmax's denominator, so that results over different keys can be merged. Given the *merged*
out and lse of a row, ``backward`` returns this tile's exact share of the gradients (Dao et al.
2022, FlashAttention, section 3.1). Tiles need nothing else from each other.

The plan guarantees that lengths are positive and that every row of a tile has a key, because
kernels differ or fail otherwise. Last dims have stride 1. ``select.py`` states what a backend
cannot do (windows, dropout, a softcap, a deterministic backward, a head dim), and it is never asked
to.

A kernel gets a softcap when it is made: the scores are then softcap * tanh(scale q k^T / softcap).
Kernels have no argument for attention dropout. The only kernel that can drop, ``reference``,
returns another kernel for each tile that drops; see ``dropout.py``.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.dropout import TileDropout
from cp_megatron.kernels.segments import Segments
from cp_megatron.plan.tiling import Band


class BackwardInputs(NamedTuple):
    """The inputs of backward: dout [B, Q, H, E], and forward's operands and merged results."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor

    def part(
        self, rows: slice, columns: slice, heads: slice = slice(None), kv_heads: slice = slice(None)
    ) -> BackwardInputs:
        """Selects rows, columns and heads."""
        return BackwardInputs(
            self.dout[:, rows, heads],
            self.q[:, rows, heads],
            self.k[:, columns, kv_heads],
            self.v[:, columns, kv_heads],
            self.out[:, rows, heads],
            self.lse[:, heads, rows],
        )

    def same_width(self, multiple: int = 1) -> BackwardInputs:
        """Applies ``same_width`` to all tensors but the lse."""
        q, k, v, dout, out = same_width(*self[1:4], self.dout, self.out, multiple=multiple)
        return BackwardInputs(dout, q, k, v, out, self.lse)

    def cut(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Removes from gradients what ``same_width`` added to these inputs."""
        dim, v_dim = self.q.shape[-1], self.v.shape[-1]
        return cut(dq, dim), cut(dk, dim), cut(dv, v_dim)


class Kernel(Protocol):
    """An attention backend that computes one tile.

    Attributes:
        joins: whether it is a ``JoiningKernel``, which gets several tiles in one call. Other
            kernels get one tile after the other.
    """

    @property
    def joins(self) -> bool: ...

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type that operands must have if activations are ``dtype``."""
        ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns out [B, Q, H, E] and lse [B, H, Q] (float32, float64 for float64) of a tile."""
        ...

    def backward(
        self, x: BackwardInputs, band: Band, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv of a tile, given the rows' merged out and lse; shapes as q, k, v."""
        ...


class JoiningKernel(Kernel, Protocol):
    """A backend that computes the tiles of a run in one call.

    Rows and columns are those of the whole run, Q and K in number; each row attends the columns of
    its own tile. Results and gradients are laid out as ``forward`` and ``backward`` return them.
    """

    def forward_many(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Returns out [B, Q, H, E] and lse [B, H, Q] of all tiles."""
        ...

    def backward_many(
        self, x: BackwardInputs, segments: Segments, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dq, dk, dv of all tiles, given the rows' merged out and lse."""
        ...


class DroppingKernel(Kernel, Protocol):
    """A backend with attention dropout."""

    def dropping(self, dropout: TileDropout) -> Kernel:
        """Returns the kernel of one tile. It drops and rescales weights in out, not in lse."""
        ...


def same_width(*tensors: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
    """Pads the last dim with zeros to the widest, rounded up to a multiple of ``multiple``.

    Some ops require equal head dims, or certain ones. Zeros after q and k change no score, and
    zeros after v, out and dout change no column that is used.
    """
    width = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)


def cut(x: Tensor, width: int) -> Tensor:
    """Returns the first ``width`` columns of the last dim, without what ``same_width`` added."""
    return x if x.shape[-1] == width else x[..., :width]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of partial results: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allowed(band: Band, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool [Q, K]: the band written out."""
    row = torch.arange(num_queries, device=device)[:, None]
    column = torch.arange(num_keys, device=device)[None, :]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if band.left is not None:
        mask &= column >= row - band.left
    if band.right is not None:
        mask &= column <= row + band.right
    return mask
