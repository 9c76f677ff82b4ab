"""A digest of a batch's rows, by which ranks that must share them find out that they do not.

Shapes: B batch, S tokens of the whole row.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cp_megatron.comm.rng import hash_text

# Odd 64-bit constants of the SplitMix64 generator, as signed integers.
_PLACE, _FIRST, _SECOND = (
    constant - 2**64 for constant in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


@torch.no_grad()
def digest_rows(rows: Mapping[str, Tensor]) -> Tensor:
    """Returns int64 [], on the tensors' device and without waiting for it.

    It depends on the names, the shapes, the values and their places. The type of integers and the
    order of the names do not matter. Floats are compared by their bits, and all bits of one token
    by their sum, so that a row of embeddings needs no copy of its size.

    Args:
        rows: [B, S], or [B, S, ...] with several values for a token; one at least.
    """
    # The device, if any is on one: its digests must not be waited for on the host.
    device = max((x.device for x in rows.values()), key=lambda device: device.type != "cpu")
    total = torch.zeros((), dtype=torch.int64, device=device)
    for name, x in rows.items():
        salt = hash_text(f"{name} {tuple(x.shape)}")
        total += _mix(_mix(_words(x)).sum().to(device) + salt)
    return total


def _words(x: Tensor) -> Tensor:
    """int64 [n]: the values, each made different from the same value at another place."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.is_floating_point():
        sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        x = x.contiguous().view(sizes[x.element_size()])
        x = x.flatten(2).sum(2, dtype=torch.int64) if x.ndim > 2 else x
    values = x.reshape(-1).long()
    return values * _FIRST + torch.arange(1, values.numel() + 1, device=x.device) * _PLACE


def _mix(x: Tensor) -> Tensor:
    """Spreads each bit over the word; integer arithmetic wraps around."""
    x = (x ^ (x >> 30)) * _FIRST
    x = (x ^ (x >> 27)) * _SECOND
    return x ^ (x >> 31)
