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

from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.plan.tiles import Span


@dataclass(frozen=True)
class KeyValues:
    """Keys [B, K, G, D] and values [B, K, G, E].

    Of an arrival they are views of the message ``packed``, [K, B, G * (D + E)].
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

    def pack(self, spans: Sequence[Span], packed: Tensor) -> Tensor:
        """Writes the tokens at ``spans`` into the message ``packed`` and returns it."""
        target = KeyValues.unpack(packed, self)
        offset = 0
        for start, stop in spans:
            room = slice(offset, offset + stop - start)
            target.k[:, room] = self.k[:, start:stop]
            target.v[:, room] = self.v[:, start:stop]
            offset += stop - start
        return packed

    def message_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """Of a message of ``num_tokens``."""
        batch, _, num_heads, dim = self.k.shape
        return num_tokens, batch, num_heads * (dim + self.v.shape[-1])

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


def take(packed: Tensor, spans: Sequence[Span], memory: Workspace, room: str) -> Tensor:
    """Runs of tokens as one contiguous message: a single run without a copy, else in ``room``."""
    if len(spans) == 1:
        return packed[spans[0][0] : spans[0][1]]
    num_tokens = sum(stop - start for start, stop in spans)
    taken = memory.room(room, (num_tokens, *packed.shape[1:]), packed.dtype)
    return torch.cat([packed[start:stop] for start, stop in spans], out=taken)
