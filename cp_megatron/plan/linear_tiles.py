"""How many heads of a linear recurrence are computed at once, which bounds temporary memory.

The tensors of a tile are those of its blocks (``kernels/linear_reference.py``) and what autograd
keeps of them. Heads need nothing from each other, so tiles of heads are computed in turn.
"""

from __future__ import annotations

from cp_megatron.plan.tiling import Span

TILE_BYTES = 64 << 20
"""The temporary memory that a tile may take, if one head does not take more."""

SUB_BLOCK = 16
"""Tokens whose products with a decay per channel are computed pair by pair."""


def temporary_bytes(
    key_dim: int,
    value_dim: int,
    tokens: int,
    element_size: int,
    block: int,
    *,
    per_channel: bool,
) -> int:
    """Bytes that backward of one head takes at most, beyond inputs and gradients of all heads.

    Args:
        key_dim, value_dim: widths of the head.
        tokens: of all rows of the batch, with the padding of blocks.
        element_size: bytes of a number in the type of sums.
        block: tokens of a block.
        per_channel: whether each channel of the key has a decay of its own.
    """
    states = 5 * key_dim * (key_dim + value_dim) // block
    widths = 12 * key_dim + 8 * value_dim + 8 * block
    pairs = 4 * SUB_BLOCK * key_dim if per_channel else 0
    return tokens * element_size * (states + widths + pairs)


def head_tiles(
    num_heads: int,
    num_key_heads: int,
    key_dim: int,
    value_dim: int,
    tokens: int,
    element_size: int,
    block: int,
    *,
    per_channel: bool,
) -> list[tuple[Span, Span]]:
    """Cuts value heads into tiles of about ``TILE_BYTES``, and at least one head.

    The arguments are those of ``temporary_bytes``.

    Returns:
        For each tile, its value heads and the key heads that they read: whole groups of value heads
        with one key head, or a part of one group.
    """
    of_head = temporary_bytes(
        key_dim, value_dim, tokens, element_size, block, per_channel=per_channel
    )
    most, group = max(1, TILE_BYTES // of_head), num_heads // num_key_heads
    size = most // group * group or max(n for n in range(1, group) if n <= most and group % n == 0)
    starts = range(0, num_heads, size)
    spans = [(start, min(start + size, num_heads)) for start in starts]
    return [((start, stop), (start // group, -(-stop // group))) for start, stop in spans]
