"""What a kernel is: one tile forward and one tile backward, nothing of ranks or schedules.

Shapes: B batch, Q queries, K keys, H query heads, G key/value heads (H a multiple of G; query
head h reads key/value head h // (H / G)), D head dim, E value head dim.

    q [B, Q, H, D]   k [B, K, G, D]   v [B, K, G, E]   out [B, Q, H, E]   lse [B, H, Q]

``out`` is softmax(scale q k^T) v over this tile's keys alone and ``lse`` the log of that softmax's
denominator, natural logarithm, so that results over different keys can be merged. Given the
*merged* out and lse of a row instead, ``backward`` returns this tile's exact share of the
gradients (Dao et al. 2022, FlashAttention, section 3.1): tiles need nothing else of each other.

Last dims have stride 1, lengths are positive, and every row of a tile has a key: the plan makes it
so, because kernels differ or fail elsewhere. What a backend can not do (windows, dropout, a
deterministic backward, a head dim) is said in ``select.py`` and never asked of it.

With ``dropout`` the weights in ``out`` are dropped and rescaled, those in ``lse`` are not, so that
tiles still merge: see ``dropout.py``. Kernels that can not drop assert that it is None.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.dropout import TileDropout
from cp_megatron.plan.tiles import Band


class Kernel(Protocol):
    """One backend."""

    def compute_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type operands must be given in when activations are ``dtype``."""
        ...

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        band: Band,
        scale: float,
        dropout: TileDropout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """out [B, Q, H, E] and lse [B, H, Q] (float32, float64 for float64) of one tile."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        band: Band,
        scale: float,
        dropout: TileDropout | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv of one tile from the rows' merged out and lse; shapes as q, k, v."""
        ...


def same_width(*tensors: Tensor, multiple: int = 1) -> tuple[Tensor, ...]:
    """Pads the last dim with zeros to the widest, rounded up to a multiple of ``multiple``.

    For ops that know one head dim only, or certain ones. Zeros after q and k change no score;
    zeros after v, out and dout change no column that is used.
    """
    width = -(-max(x.shape[-1] for x in tensors) // multiple) * multiple
    return tuple(F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors)


def cut(x: Tensor, width: int) -> Tensor:
    """The first ``width`` columns of the last dim: what ``same_width`` added is taken away."""
    return x if x.shape[-1] == width else x[..., :width]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type partial results are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def allowed(band: Band, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """bool [Q, K]: the band spelt out."""
    row = torch.arange(num_queries, device=device)[:, None]
    column = torch.arange(num_keys, device=device)[None, :]
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if band.left is not None:
        mask &= column >= row - band.left
    if band.right is not None:
        mask &= column <= row + band.right
    return mask
