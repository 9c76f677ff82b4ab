"""Keys and values that were computed before, as the context of the tokens that come next.

The model is called as in training, with a ``CachedRow`` in the place of a ``ContextParallel``: it
says which positions the new tokens have, and its attention sees the keys of the old ones too.

    step      tokens       positions    queries x keys
    prompt    a b c d      0 1 2 3      4 x 4, causal
    next      e            4            1 x 5
    next      f            5            1 x 6

Keys are kept as they were rotated. Rope types whose frequencies depend on the length of the row
(``dynamic``, ``longrope``) rotate a new token by the length so far, and the keys before it stay as
they are: what transformers does with its cache, and not what a forward pass over the whole row
gives once the row is longer than the original positions.

Shapes: B batch, S new tokens, T all tokens so far, C room, H query heads, G key/value heads,
D head dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.mask import Window

FIRST_ROOM = 256
"""Tokens that a cache has room for at first; it doubles when it is full."""


class KeyValueCache:
    """The keys and values of every layer for one batch of rows, on one rank.

    Attributes:
        length: tokens that are in every layer.
    """

    def __init__(self) -> None:
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor]] = []

    def cut(self, length: int) -> None:
        """Forgets all tokens but the first ``length``."""
        assert 0 <= length <= self.length
        self.length = length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a layer's new keys and values; ``length`` is moved on by the caller, at the end.

        Args:
            layer: counted from 0 in the order the model calls them.
            k, v: [B, S, G, D] and [B, S, G, E].

        Returns:
            all of the layer's, [B, G, T, D] and [B, G, T, E], views.
        """
        total = self.length + k.shape[1]
        new = [rearrange(x, "b s g d -> b g s d") for x in (k, v)]
        if layer == len(self._layers):
            self._layers.append((_room(new[0], 0), _room(new[1], 0)))
        kept = self._layers[layer]
        if kept[0].shape[2] < total:
            kept = _grown(kept[0], total), _grown(kept[1], total)
            self._layers[layer] = kept
        for room, part in zip(kept, new, strict=True):
            room[:, :, self.length : total] = part
        return kept[0][:, :, :total], kept[1][:, :, :total]


def _room(like: Tensor, at_least: int) -> Tensor:
    """An empty [B, G, C, D]."""
    batch, heads, _, width = like.shape
    size = FIRST_ROOM
    while size < at_least:
        size *= 2
    return like.new_empty(batch, heads, size, width)


def _grown(kept: Tensor, total: int) -> Tensor:
    larger = _room(kept, total)
    larger[:, :, : kept.shape[2]] = kept
    return larger


@dataclass
class _Calls:
    """How many layers have attended in this forward pass."""

    count: int = 0


class CachedRow(ContextParallel):
    """The context of one forward pass over the tokens after those in the cache. One rank.

    Args:
        cache: of the same model and rows.
        num_new: tokens of this pass, S.
        row_len: tokens of the whole row as rope types with a memory for it see it; by default what
            the cache and this pass hold. A prompt that is computed in parts is told its end.
        window: of the model.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        num_new: int,
        *,
        row_len: int | None = None,
        window: Window | None = None,
    ) -> None:
        self.cache, self.num_new = cache, num_new
        total = cache.length + num_new
        super().__init__(None, Mask.causal(row_len or total, window))
        self._calls = _Calls()

    @property
    def document_positions(self) -> Tensor:  # type: ignore[override]
        """int64 [S]: the new tokens' positions."""
        return torch.arange(self.cache.length, self.cache.length + self.num_new)

    def with_mask(self, mask: Mask, layout: SequenceLayout | None = None) -> CachedRow:
        """The same tokens for layers with another window."""
        other = CachedRow(self.cache, self.num_new, row_len=self.mask.seq_len, window=mask.window)
        other._calls = self._calls
        return other

    def attention(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        dropout: Dropout | None = None,
        kept: KeptAttention | None = None,
    ) -> Tensor:
        """Attention of the new queries over old and new keys, which are kept.

        Args:
            q, k, v: [B, S, H, D], [B, S, G, D] and [B, S, G, E] of the new tokens.
            scale: multiplies the scores, by default D ** -0.5.
            dropout, kept: must be None, nothing is trained here.

        Returns:
            [B, S, H, E].
        """
        assert dropout is None, "generation drops nothing"
        assert kept is None, "generation recomputes nothing"
        keys, values = self.cache.append(self._calls.count, k, v)
        self._calls.count += 1
        first = 0
        left = self.mask.window[0]
        if left >= 0:  # keys before the first query's window are read by none
            first = max(0, self.cache.length - left)
            keys, values = keys[:, :, first:], values[:, :, first:]
        if q.shape[1] == 1:
            # [B, 1, (G R), D] -> [B, G, R, D]: a token's heads of one group are rows of one tile
            rows = rearrange(q, "b 1 (g r) d -> b g r d", g=k.shape[2])
            out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
            return rearrange(out, "b g r d -> b 1 (g r) d")
        groups = q.shape[2] // k.shape[2]
        rows = rearrange(q, "b s h d -> b h s d")
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        seen = self._seen(first, keys.shape[2], q.device)
        out = F.scaled_dot_product_attention(rows, keys, values, seen, scale=scale)
        return rearrange(out, "b h s d -> b s h d")

    def _seen(self, first: int, num_keys: int, device: torch.device) -> Tensor:
        """bool [S, keys]: which key each new token attends; key 0 has the position ``first``."""
        query = self.document_positions.to(device)[:, None]
        key = torch.arange(first, first + num_keys, device=device)[None, :]
        seen = key <= query
        left = self.mask.window[0]
        return seen & (key >= query - left) if left >= 0 else seen
