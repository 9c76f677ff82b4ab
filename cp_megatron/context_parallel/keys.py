"""Keys and values as tensors and as messages.

Shapes: B = batch, K = keys of a shard or an arrival, G = key/value heads, D = head dim,
E = value head dim. A message is [tokens, B, G * (D + E)]: the keys and values of a token lie side
by side, and tokens come first so that a run of tokens is contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.plan.buffer_sizes import Buffer
from cp_megatron.plan.tiling import Span, pack


@dataclass(frozen=True)
class KeyValues:
    """Keys [B, K, G, D] and values [B, K, G, E].

    For an arrival they are views of the message ``packed``, [K, B, G * (D + E)].
    """

    k: Tensor
    v: Tensor
    packed: Tensor | None = None

    @classmethod
    def unpack(cls, packed: Tensor, like: KeyValues) -> KeyValues:
        """Views a message as keys and values with the heads and widths of ``like``."""
        return cls.view(packed, *like.k.shape[2:])

    @classmethod
    def view(cls, packed: Tensor, num_heads: int, dim: int) -> KeyValues:
        """Views a message as the keys and values of ``num_heads`` heads, keys of width ``dim``."""
        # [K, B, G * D + G * E] -> [B, K, G, D] and [B, K, G, E]
        k = rearrange(packed[..., : num_heads * dim], "k b (n d) -> b k n d", n=num_heads)
        v = rearrange(packed[..., num_heads * dim :], "k b (n e) -> b k n e", n=num_heads)
        return cls(k, v, packed)

    def pack(self, spans: Sequence[Span], packed: Tensor) -> Tensor:
        """Writes the tokens at ``spans`` into the message ``packed`` and returns it."""
        for start, stop, offset in pack(spans):
            # [B, K, G, D] and [B, K, G, E] -> [K, B, G * D] and [K, B, G * E]
            parts = (rearrange(x[:, start:stop], "b k n d -> k b (n d)") for x in (self.k, self.v))
            torch.cat(list(parts), -1, out=packed[offset : offset + stop - start])
        return packed

    def message_shape(self, num_tokens: int) -> tuple[int, int, int]:
        """The shape of a message of ``num_tokens``."""
        batch, _, num_heads, dim = self.k.shape
        return num_tokens, batch, num_heads * (dim + self.v.shape[-1])

    def take(self, memory: Workspace, buffer: Buffer, dtype: torch.dtype | None = None) -> Tensor:
        """Takes a buffer for a message; ``dtype`` is the type of the keys by default."""
        shape = self.message_shape(buffer.num_tokens)
        return memory.take(buffer.name, shape, dtype or self.k.dtype)

    def heads(self, span: Span) -> KeyValues:
        """Selects the heads of ``span``."""
        start, stop = span
        if stop - start == self.k.shape[2]:
            return self
        return KeyValues(self.k[:, :, start:stop], self.v[:, :, start:stop])

    def to(self, dtype: torch.dtype) -> KeyValues:
        """Converts keys and values to the operand type of the kernel."""
        return KeyValues(self.k.to(dtype), self.v.to(dtype))

    def add_(self, spans: Sequence[Span], packed: Tensor) -> None:
        """Adds a message to the tokens at ``spans``."""
        for start, stop, offset in pack(spans):
            message = packed[offset : offset + stop - start]
            if self.packed is not None:
                self.packed[start:stop].add_(message)
                continue
            part = KeyValues.unpack(message, self)
            self.k[:, start:stop].add_(part.k)
            self.v[:, start:stop].add_(part.v)


def contiguous_runs(
    packed: Tensor, spans: Sequence[Span], memory: Workspace, buffer: Buffer | None
) -> Tensor:
    """Returns runs of tokens as one contiguous message.

    A single run is a view of ``packed``; several runs are copied into ``buffer``.
    """
    if buffer is None:
        ((start, stop),) = spans
        return packed[start:stop]
    taken = memory.take(buffer.name, (buffer.num_tokens, *packed.shape[1:]), packed.dtype)
    return torch.cat([packed[start:stop] for start, stop in spans], out=taken)
