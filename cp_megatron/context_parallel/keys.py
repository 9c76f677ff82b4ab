"""Keys and values as tensors and as messages.

Shapes: B batch, K keys of a shard or an arrival, G key/value heads, D head dim, E value head dim.
A message is [tokens, B, G * (D + E)]: keys and values of a token side by side, tokens outermost, so
that a run of tokens is one contiguous piece of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.plan.tiles import Span


@dataclass(frozen=True)
class KeyValues:
    """Keys [B, K, G, D], values [B, K, G, E] and, once something was sent or received, both packed.

    ``packed`` is [K, B, G * (D + E)]; for an arrival keys and values are views of it.
    """

    k: Tensor
    v: Tensor
    packed: Tensor | None = None

    @classmethod
    def unpack(cls, packed: Tensor, like: KeyValues) -> KeyValues:
        """The views of a message; ``like`` gives the number of heads and their widths."""
        num_heads, dim = like.k.shape[2:]
        # [K, B, G * D + G * E] -> [B, K, G, D] and [B, K, G, E]
        k = rearrange(packed[..., : num_heads * dim], "k b (n d) -> b k n d", n=num_heads)
        v = rearrange(packed[..., num_heads * dim :], "k b (n e) -> b k n e", n=num_heads)
        return cls(k, v, packed)

    def pack(self) -> KeyValues:
        """With ``packed`` filled in."""
        if self.packed is not None:
            return self
        # [B, K, G, D] and [B, K, G, E] -> [K, B, G * (D + E)]
        k, v = (rearrange(x, "b k n d -> k b (n d)") for x in (self.k, self.v))
        return KeyValues(self.k, self.v, torch.cat([k, v], dim=-1))

    def empty(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised message of ``num_tokens``."""
        batch, _, num_heads, dim = self.k.shape
        width = num_heads * (dim + self.v.shape[-1])
        return torch.empty(num_tokens, batch, width, dtype=dtype, device=self.k.device)

    def heads(self, span: Span) -> KeyValues:
        """Some of the heads."""
        start, stop = span
        if stop - start == self.k.shape[2]:
            return self
        return KeyValues(self.k[:, :, start:stop], self.v[:, :, start:stop])

    def to(self, dtype: torch.dtype) -> KeyValues:
        """Keys and values as operands of the kernel."""
        return KeyValues(self.k.to(dtype), self.v.to(dtype))

    def add_(self, spans: Sequence[Span], packed: Tensor) -> None:
        """Adds a message to the tokens at ``spans``."""
        offset = 0
        for start, stop in spans:
            part = KeyValues.unpack(packed[offset : offset + stop - start], self)
            self.k[:, start:stop] += part.k
            self.v[:, start:stop] += part.v
            offset += stop - start


def take(packed: Tensor, spans: Sequence[Span]) -> Tensor:
    """Runs of tokens as one contiguous message; a single run without a copy."""
    if len(spans) == 1:
        return packed[spans[0][0] : spans[0][1]]
    return torch.cat([packed[start:stop] for start, stop in spans])
