"""``Drop`` of ``stream_dropout.py`` as one Triton kernel: it reads and writes each number once.

Shapes: n tokens, h hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# How many numbers of a token one program draws at most.
_BLOCK = 2048


def drop_triton(x: Tensor, starts: Tensor, threshold: int, scale: float) -> Tensor:
    """``Drop`` on a GPU, for types up to float32."""
    num_tokens, width = x.shape
    out = torch.empty_like(x)
    block = min(_BLOCK, triton.next_power_of_2(width))
    # Triton launches on the current device, which may be another one than the tensors'.
    with torch.cuda.device_of(x):
        _drop[(num_tokens, triton.cdiv(width, block))](
            *(x, starts, out, width, threshold, scale), block=block
        )
    return out


@triton.jit
def _drop(
    x: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    threshold: tl.tensor,
    scale: tl.tensor,
    block: tl.constexpr,
) -> None:
    """Drops from one token's channels; the hash is that of ``dropout.py``."""
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < width
    u = tl.load(starts + token).to(tl.uint64)
    u = u + (channel + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    u = (u ^ (u >> 30)) * 0xBF58476D1CE4E5B9
    u = (u ^ (u >> 27)) * 0x94D049BB133111EB
    at = token * width + channel
    kept = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) * scale
    dropped = tl.where(u.to(tl.int64) < threshold, 0.0, kept)
    tl.store(out + at, dropped.to(out.dtype.element_ty), mask=inside)
