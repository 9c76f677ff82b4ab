"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Pair i of the channels of a head is rotated by the angle position * base^(-2i/d). A pair is
channels i and i + d/2, as in Hugging Face, or channels 2i and 2i + 1. If a head has more than d
channels, the others stay as they are. Positions come from the caller: under context parallelism
the tokens of a rank are not a contiguous run, and in packed rows positions restart at every
document.

Shapes: b batch, s sequence of one context parallel rank, n heads, d rotated channels of a head,
D all channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cp_megatron.comm.host_copies import to_device
from cp_megatron.config.schema import ModelConfig
from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.rotary import rotate
from cp_megatron.kernels.rotated_channels import RotatedChannels
from cp_megatron.model.rope_scaling import rope_frequencies
from cp_megatron.spec import RotarySpec


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """The rotation of every token.

    Attributes:
        cos, sin: cosine and sine of the angles times the attention factor of ``rope_frequencies``,
            [s, d/2], float32 (float64 for a float64 model).
        interleaved: whether channels 2i and 2i + 1 are a pair, as in ``RotarySpec``.
        query_factor: [s], the factor of each token's queries that follows from
            ``RotarySpec.temperature``, in the type of the activations; None is no factor.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool
    query_factor: Tensor | None

    @classmethod
    def of(
        cls,
        positions: Tensor,
        config: ModelConfig,
        rotary: RotarySpec,
        *,
        longest: int,
        dtype: torch.dtype,
    ) -> Rotation:
        """The rotation of the tokens at ``positions`` (int64 [s]).

        Args:
            positions: index of every token in its document.
            config, rotary: the model and the rotation of the layer; they give the frequencies.
            longest: length of the longest document of the whole row, not of this rank's part.
            dtype: type of the activations. Angles are always float64: in float32 an angle at
                position 10^6 is off by 0.03.
        """
        inverse, attention_factor = rope_frequencies(config, rotary, longest)
        inverse = to_device(inverse, positions.device)
        angles = positions.to(torch.float64).unsqueeze(-1) * inverse  # [s, d/2]
        table = accumulation_dtype(dtype)
        cos, sin = angles.cos(), angles.sin()
        if attention_factor != 1.0:
            cos, sin = cos * attention_factor, sin * attention_factor
        factor = None
        if rotary.temperature is not None:
            beta, length = rotary.temperature
            factor = (1 + beta * (1 + positions // length).to(torch.float64).log()).to(dtype)
        return cls(
            cos=cos.to(table),
            sin=sin.to(table),
            interleaved=rotary.interleaved,
            query_factor=factor,
        )

    def queries(self, q: Tensor, start: int = 0) -> Tensor:
        """Rotates d channels from ``start`` on, and applies the factor of queries to all.

        [b, s, n, D] -> the same shape and dtype. The result can be differentiated once.
        """
        return self._rotate(q, self.query_factor, start)

    def keys(self, k: Tensor) -> Tensor:
        """Rotates keys, [b, s, n, D] -> the same shape and dtype."""
        return self._rotate(k, None, 0)

    def _rotate(self, x: Tensor, factor: Tensor | None, start: int) -> Tensor:
        channels = RotatedChannels(start=start, interleaved=self.interleaved)
        rotated: Tensor = _Rotate.apply(x, self.cos, self.sin, factor, channels)
        return rotated


class _Rotate(torch.autograd.Function):
    """Backward is the rotation by the negative angles, so no activation is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        factor: Tensor | None,
        channels: RotatedChannels,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, factor)
        ctx.channels = channels
        return rotate(x, cos, sin, factor, channels)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, factor = ctx.saved_tensors
        channels = replace(ctx.channels, inverse=True)
        return rotate(grads[0], cos, sin, factor, channels), None, None, None, None
