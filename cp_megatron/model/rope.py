"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-rotation as in Hugging Face.

Channel i of a head is rotated with channel i + d/2 by the angle position * base^(-2i/d). Positions
come from the caller: under context parallelism a rank's tokens are not a contiguous run, and in
packed rows they restart at every document.

Shapes: b batch, s sequence of one context parallel rank, n heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosine and sine of every token's angles, [s, d/2], float32 (float64 for a float64 model)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def make(cls, positions: Tensor, *, head_dim: int, base: float, dtype: torch.dtype) -> Rotation:
        """The rotation of the tokens at ``positions`` (int64 [s]).

        Args:
            dtype: of the activations. Angles are float64 whatever it is: in float32 an angle at
                position 10^6 is off by 0.03.
        """
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
        frequencies = base ** (-exponents / head_dim)  # [d/2]
        angles = positions.to(torch.float64).unsqueeze(-1) * frequencies  # [s, d/2]
        table = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(cos=angles.cos().to(table), sin=angles.sin().to(table))

    def apply(self, x: Tensor) -> Tensor:
        """Rotate queries or keys, [b, s, n, d] -> the same shape and dtype."""
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)  # [s, 1, d/2]
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)
