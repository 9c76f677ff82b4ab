"""Linear recurrences token by token: the oracle, which shares no code with the engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KINDS = ("gated delta net", "kda", "gla", "ssd")


def inputs_of(
    kind: str, batch: int, tokens: int, *, heads: tuple[int, int], dims: tuple[int, int]
) -> list[Tensor | None]:
    """q, k, v, g and beta (or None) in float64, whole rows. Memories last 10 to 1,000 tokens."""
    generator = torch.Generator().manual_seed(1)
    (groups, num_heads), (dim, value_dim) = heads, dims

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, tokens, *shape, generator=generator, dtype=torch.float64)

    q, k = normal(groups, dim), torch.nn.functional.normalize(normal(groups, dim), dim=-1)
    channels = (dim,) if kind in ("kda", "gla") else ()
    uniform = torch.rand(
        batch, tokens, num_heads, *channels, generator=generator, dtype=torch.float64
    )
    g = -(0.001 + 0.099 * uniform)
    beta = normal(num_heads).sigmoid() * 1.9 if kind in ("gated delta net", "kda") else None
    return [q, k, normal(num_heads, value_dim), g, beta]


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, lengths: Sequence[int]
) -> Tensor:
    """out [B, S, H, E] of packed documents."""
    repeats = v.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5
    q, k = (x.repeat_interleave(repeats, dim=2) for x in (q, k))
    decay = g.exp() if g.ndim == 4 else g.exp()[..., None]
    found, token = [], 0
    for length in lengths:
        state = v.new_zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]))
        for _ in range(length):
            state = state * decay[:, token, :, :, None]
            value = v[:, token]
            if beta is not None:
                seen = torch.einsum("bhde,bhd->bhe", state, k[:, token])
                value = (value - seen) * beta[:, token, :, None]
            state = state + torch.einsum("bhd,bhe->bhde", k[:, token], value)
            found.append(torch.einsum("bhde,bhd->bhe", state, q[:, token]) * scale)
            token += 1
    return torch.stack(found, dim=1)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int]) -> Tensor:
    """A causal convolution of every document by torch's own, x [B, S, c], weight [c, W]."""
    width = weight.shape[1]
    parts = []
    for document in x.split(list(lengths), dim=1):
        padded = torch.nn.functional.pad(document.transpose(1, 2), (width - 1, 0))
        y = torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[2])
        parts.append(y.transpose(1, 2))
    return torch.cat(parts, dim=1)
