"""Attention dropout whose mask depends only on the *pair* of tokens, not on where it is computed.

Shapes: B = batch, H = query heads, Q = queries, K = keys.

A fused kernel draws its mask from offsets inside the tile, so the same attention cut into other
tiles (by another layout, exchange or number of ranks) has another mask. Here the mask is a function
of the pair alone,

    keep = hash(seed, batch row, query head, query position, key position) >= p 2^53

so every grid drops the same pairs, in forward and in backward, and nothing is stored. What the
residual stream drops (``stream_dropout.py``) is drawn in the same way.

The hash is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
generators"). Each row (seed, batch row, head, query) is mixed into the start of its own stream, and
the position of the key selects a number of that stream:

    row = mix(mix(mix(mix(seed) + batch row) + head) + query)
    u   = mix(row + (key + 1) GAMMA)         uniform in 0 .. 2^64 - 1; its upper 53 bits are used
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cp_megatron.errors import ConfigError

# int64 products and sums wrap modulo 2^64; constants above 2^63 are written as their two's
# complement. GAMMA is 2^64 / golden ratio, the others are splitmix64's multipliers.
GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)
_BITS = 53


@dataclass(frozen=True)
class Dropout:
    """The dropout of one attention, or of the residual stream, in one micro batch.

    Args:
        probability: the probability with which a number is dropped, in [0, 1).
        seed: any integer, the same on all ranks; different for each layer's attention.
        batch0: the number of this rank's first batch row in the run.
        head0: the number of this rank's first query head among all query heads; the residual
            stream has none.
        row_length: the length of each row if several rows of the batch are laid end to end in one,
            so that the same is dropped as in separate rows; otherwise 0.

    Raises:
        ConfigError: the probability is outside [0, 1).
    """

    probability: float
    seed: int
    batch0: int = 0
    head0: int = 0
    row_length: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.probability < 1:
            rule = "must be at least 0 and below 1"
            raise ConfigError("probability of dropout", self.probability, rule, "0")

    @property
    def scale(self) -> float:
        """The factor of what is kept, which preserves the expectation."""
        return 1 / (1 - self.probability)


@dataclass(frozen=True, eq=False)
class TileDropout:
    """The dropout of one tile.

    Args:
        dropout: the dropout of the whole attention.
        q_positions: int64 [Q], positions of the tile's rows in the whole row of tokens, on the
            tensors' device.
        k_positions: int64 [K], positions of its columns.
        head0: the tile's first query head, counted from ``dropout.head0``.
    """

    dropout: Dropout
    q_positions: Tensor
    k_positions: Tensor
    head0: int = 0

    def weights(self, num_batch: int, num_heads: int, dtype: torch.dtype) -> Tensor:
        """Returns [B, H, Q, K] in ``dtype``: 0 if dropped, 1 / (1 - p) if kept."""
        drop = self.dropout
        shifted = replace(drop, head0=drop.head0 + self.head0)
        keep = keep_mask(shifted, self.q_positions, self.k_positions, num_batch, num_heads)
        return keep.to(dtype) * drop.scale


def keep_mask(
    dropout: Dropout, q_positions: Tensor, k_positions: Tensor, num_batch: int, num_heads: int
) -> Tensor:
    """Decides which pairs are kept.

    Args:
        dropout: the probability p, the seed, and the first batch row and head.
        q_positions, k_positions: int64 [Q] and [K], positions in the whole row of tokens.
        num_batch, num_heads: B and H.

    Returns:
        bool [B, H, Q, K] on the positions' device, True with probability 1 - p.
    """
    device = q_positions.device
    head = torch.arange(dropout.head0, dropout.head0 + num_heads, device=device)
    rows = RowHashes.of(dropout, q_positions, num_batch)
    row = mix_(rows.hashes[:, None] + head[:, None])
    row = mix_(row + rows.positions)[:, :, :, None]
    if dropout.row_length:
        k_positions = k_positions % dropout.row_length
    drawn = _shift(mix_(row + (k_positions + 1) * GAMMA), 64 - _BITS)
    return drawn >= int(dropout.probability * (1 << _BITS))


class RowHashes(NamedTuple):
    """The numbers of the rows of some tokens, hashed with the seed.

    Attributes:
        hashes: int64 [B, Q], or [B, 1] if all tokens of a line of the batch are of one row.
        positions: int64 [Q], the positions of the tokens in their rows.
    """

    hashes: Tensor
    positions: Tensor

    @classmethod
    def of(cls, dropout: Dropout, positions: Tensor, num_batch: int) -> RowHashes:
        """Those of the tokens at ``positions``, int64 [Q], of each of ``num_batch`` lines."""
        device = positions.device
        number = torch.arange(dropout.batch0, dropout.batch0 + num_batch, device=device)[:, None]
        if dropout.row_length:
            number = number + positions // dropout.row_length
            positions = positions % dropout.row_length
        # Seeds wrap to 64 bits, like all numbers here.
        seed = (dropout.seed + (1 << 63)) % (1 << 64) - (1 << 63)
        start = mix_(torch.full((1,), seed, dtype=torch.int64, device=device))
        return cls(mix_(start + number), positions)


def mix_(x: Tensor) -> Tensor:
    """The finalizer of splitmix64: each bit of the input changes about half of the output's.

    It changes ``x`` and returns it.
    """
    scramble_(x, torch.empty_like(x))
    return x.bitwise_xor_(_shift(x, 31))


def scramble_(x: Tensor, spare: Tensor) -> Tensor:
    """``mix_`` without its last step, which leaves the upper 31 bits as they are.

    Args:
        x: int64; it is changed, and returned.
        spare: memory of the shape of ``x``.
    """
    for bits, factor in ((30, _FIRST), (27, _SECOND)):
        x.bitwise_xor_(_shift(x, bits, spare)).mul_(factor)
    return x


def _shift(x: Tensor, bits: int, out: Tensor | None = None) -> Tensor:
    """A right shift that fills with zeros; torch's own fills with the sign."""
    return torch.bitwise_right_shift(x, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)
