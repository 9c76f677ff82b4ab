"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-rotation as in Hugging Face.

Channel i of a head is rotated with channel i + d/2 by the angle position * base^(-2i/d). Positions
come from the caller: under context parallelism the tokens of a rank are not a contiguous run, and
in packed rows positions restart at every document.

Shapes: b batch, s sequence of one context parallel rank, n heads, d head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_megatron.config.schema import ModelConfig
from cp_megatron.model.rope_scaling import rope_frequencies


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosine and sine of every token's angles, [s, d/2], float32 (float64 for a float64 model)."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(
        cls, positions: Tensor, config: ModelConfig, *, longest: int, dtype: torch.dtype
    ) -> Rotation:
        """The rotation of the tokens at ``positions`` (int64 [s]).

        Args:
            positions: index of every token in its document.
            config: gives the frequencies.
            longest: length of the longest document of the whole row, not of this rank's part.
            dtype: type of the activations. Angles are always float64: in float32 an angle at
                position 10^6 is off by 0.03.
        """
        inverse, attention_factor = rope_frequencies(config, longest)
        inverse = inverse.to(positions.device)
        angles = positions.to(torch.float64).unsqueeze(-1) * inverse  # [s, d/2]
        table = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = angles.cos(), angles.sin()
        if attention_factor != 1.0:
            cos, sin = cos * attention_factor, sin * attention_factor
        return cls(cos=cos.to(table), sin=sin.to(table))

    def apply(self, x: Tensor) -> Tensor:
        """Rotates queries or keys, [b, s, n, d] -> the same shape and dtype."""
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)  # [s, 1, d/2]
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return rotated.to(x.dtype)
