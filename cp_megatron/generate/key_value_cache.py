"""Keeps what earlier tokens left as the context of the next ones: keys and values, and states.

The model is called as in training, with a ``CachedRow`` in place of a ``ContextParallel``: it gives
the positions of the new tokens, and its attention also reads the keys of earlier tokens.

    pass      tokens       positions    queries x keys
    prompt    a b c d      0 1 2 3      4 x 4, causal
    next      e            4            1 x 5
    next      f            5            1 x 6

Keys are stored after rotation. Rope types whose frequencies depend on the length of the row
(``dynamic``, ``longrope``) rotate a new token by the length so far and leave earlier keys as they
are. The cache of transformers does the same. A forward pass over the whole row differs when the row
is longer than the original positions.

A recurrence leaves a state instead (``state_cache.py``), from which no token can be removed.

Shapes: B = batch, S = new tokens, T = all tokens so far, C = capacity, H = query heads,
G = key/value heads, D = head dim, E = value dim.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.context_parallel.latent_expansion import expand_heads
from cp_megatron.generate.state_cache import StateCache
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.linear_interface import LinearInputs
from cp_megatron.plan import Mask, SequenceLayout

FIRST_CAPACITY = 256
"""The number of tokens that a new cache can hold; the capacity doubles when it is full."""


class KeyValueCache:
    """What every layer keeps for one batch of rows.

    Attributes:
        length: the number of tokens that every layer holds.
        states: those of recurrences.
    """

    def __init__(self) -> None:
        self.length = 0
        self.states = StateCache()
        self._layers: list[tuple[Tensor, Tensor]] = []

    def cut(self, length: int) -> int:
        """Removes all tokens except the first ``length``, or all tokens if there are states.

        Returns:
            the number of tokens that are left.
        """
        assert 0 <= length <= self.length
        if self.states and length < self.length:
            length, self.states = 0, StateCache()
        self.length = length
        return length

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a layer's new keys and values. The caller increases ``length`` after all layers.

        Args:
            layer: the index of the layer in the order in which the model calls them.
            k, v: [B, S, G, D] and [B, S, G, E].

        Returns:
            views of all keys and values of the layer, [B, G, T, D] and [B, G, T, E].
        """
        total = self.length + k.shape[1]
        new = [rearrange(x, "b s g d -> b g s d") for x in (k, v)]
        if layer == len(self._layers):
            self._layers.append((new[0][:, :, :0], new[1][:, :, :0]))
        kept = self._layers[layer]
        if kept[0].shape[2] < total:
            kept = self._layers[layer] = _grown(kept[0], total), _grown(kept[1], total)
        for memory, part in zip(kept, new, strict=True):
            memory[:, :, self.length : total] = part
        return kept[0][:, :, :total], kept[1][:, :, :total]


def _grown(kept: Tensor, total: int) -> Tensor:
    """Copies [B, G, C, D] into a tensor whose capacity is at least ``total``."""
    capacity = FIRST_CAPACITY
    while capacity < total:
        capacity *= 2
    larger = kept.new_empty(*kept.shape[:2], capacity, kept.shape[3])
    larger[:, :, : kept.shape[2]] = kept
    return larger


class CachedRow(ContextParallel):
    """The context of one forward pass over the tokens that follow those in the cache.

    Args:
        cache: the cache of the same model and rows.
        num_new: the number of tokens of this pass, S.
        mask: the causal mask of the row, with the window of the model's attention. If a prompt is
            computed in parts, the row is the whole prompt, for rope types that depend on its
            length.
    """

    def __init__(self, cache: KeyValueCache, num_new: int, mask: Mask) -> None:
        super().__init__(None, mask)
        self.cache, self.num_new = cache, num_new
        # Shared by layers with another window: the attentions, convolutions and recurrences so far.
        self._layers, self._convolutions, self._recurrences = count(), count(), count()

    @property
    def document_positions(self) -> Tensor:  # type: ignore[override]
        """int64 [S]: the positions of the new tokens."""
        return torch.arange(self.cache.length, self.cache.length + self.num_new)

    def with_mask(
        self, mask: Mask, layout: SequenceLayout | None = None, *, compared: bool = False
    ) -> CachedRow:
        """Returns the context of the same tokens for layers with another window."""
        other = CachedRow(self.cache, self.num_new, mask)
        other._layers, other._convolutions = self._layers, self._convolutions
        other._recurrences = self._recurrences
        return other

    def attention(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        *,
        sinks: Tensor | None = None,
        softcap: float | None = None,
        **training: object,
    ) -> Tensor:
        """Computes attention of the new queries over old and new keys, and keeps the new ones.

        Args:
            q, k, v: [B, S, H, D], [B, S, G, D] and [B, S, G, E] of the new tokens.
            scale: multiplies the scores; by default D ** -0.5.
            sinks, softcap: as in ``ContextParallel.attention``.
            training: its other options, which belong to training; each must be None or False.

        Returns:
            [B, S, H, E].
        """
        assert not any(training.values()), "generation has no dropout and no recomputation"
        is_plain = sinks is None and softcap is None
        keys, values = self.cache.append(next(self._layers), k, v)
        left = self.mask.window[0]
        # No query reads keys before the first query's window.
        first = max(0, self.cache.length - left) if left >= 0 else 0
        keys, values = keys[:, :, first:], values[:, :, first:]
        if q.shape[1] == 1 and is_plain:
            # [B, 1, (G R), D] -> [B, G, R, D]: the query heads of one group become the rows
            rows = rearrange(q, "b 1 (g r) d -> b g r d", g=k.shape[2])
            out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
            return rearrange(out, "b g r d -> b 1 (g r) d")
        groups = q.shape[2] // k.shape[2]
        rows = rearrange(q, "b s h d -> b h s d")
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        mask = self._dense_mask(first, keys.shape[2], q.device)
        if is_plain:
            out = F.scaled_dot_product_attention(rows, keys, values, mask, scale=scale)
        else:
            factor = q.shape[3] ** -0.5 if scale is None else scale
            out = _dense_attention(rows * factor, keys, values, mask, sinks, softcap)
        return rearrange(out, "b h s d -> b s h d")

    def latent_attention(  # type: ignore[override]
        self,
        q: Tensor,
        latent: Tensor,
        rotary_key: Tensor,
        weight: Tensor,
        scale: float | None = None,
        **training: Any,
    ) -> Tensor:
        """Expands the new keys and values, and calls ``attention``, which keeps them expanded.

        Args:
            q, latent, rotary_key, weight: as in ``ContextParallel.latent_attention``, of the new
                tokens.
            scale, training: as in ``attention``.

        Returns:
            [B, S, H, E].
        """
        heads, plain_dim = q.shape[2], q.shape[3] - rotary_key.shape[2]
        k, v = expand_heads(latent, rotary_key, weight, heads, plain_dim)
        return self.attention(q, k, v, scale, **training)

    def short_conv(  # type: ignore[override]
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, **training: object
    ) -> Tensor:
        """Computes ``RecurrentSequence.short_conv`` of the new tokens."""
        assert not any(training.values()), "generation has no recomputation"
        return self.cache.states.convolve(next(self._convolutions), x, weight, bias)

    def linear_attention(  # type: ignore[override]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None = None,
        *,
        scale: float | None = None,
        **training: object,
    ) -> Tensor:
        """Computes ``RecurrentSequence.linear_attention`` of the new tokens."""
        assert not any(training.values()), "generation has no recomputation"
        scale = q.shape[3] ** -0.5 if scale is None else scale
        x = LinearInputs(q, k, v, g, beta, scale)
        return self.cache.states.recur(next(self._recurrences), x)

    def _dense_mask(self, first: int, num_keys: int, device: torch.device) -> Tensor:
        """bool [S, keys]: which keys a new token attends; key 0 has the position ``first``."""
        query = self.document_positions.to(device)[:, None]
        key = torch.arange(first, first + num_keys, device=device)[None, :]
        allowed = key <= query
        left = self.mask.window[0]
        return allowed & (key >= query - left) if left >= 0 else allowed


def _dense_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    softcap: float | None,
) -> Tensor:
    """Computes attention by its formula, in float32 (float64 for float64).

    Args:
        q: [B, H, S, D], multiplied by the factor of the scores.
        keys, values: [B, H, T, D] and [B, H, T, E].
        mask: bool [S, T], True where a query attends a key.
        sinks: [H], one more score per head, without a value; None: there are none.
        softcap: the bound of the scores; None leaves them as they are.

    Returns:
        [B, H, S, E] in the type of the values.
    """
    exact = accumulation_dtype(q.dtype)
    scores = q.to(exact) @ keys.to(exact).mT  # [B, H, S, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(exact)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., : keys.shape[2]]
    return (weights @ values.to(exact)).to(values.dtype)
