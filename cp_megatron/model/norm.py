"""Normalization: torch's own functions on whatever part of the sequence a rank holds.

Every token is normalized by itself, so these modules know nothing of ranks. The one thing they
are told is whether other ranks see other tokens with the same weight, which makes the gradient
computed here a summand.

Shapes: .. tokens, h hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from cp_megatron.config.schema import ModelConfig
from cp_megatron.tensor_parallel import Init, ParameterSpec, SpecifiedModule


class LayerNorm(SpecifiedModule):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, hidden_size: int, *, epsilon: float, partial_gradient: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.specs = {
            "weight": _spec("ones", partial_gradient),
            "bias": _spec("zeros", partial_gradient),
        }

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        weight, bias = self.local("weight"), self.local("bias")
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class RMSNorm(SpecifiedModule):
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, hidden_size: int, *, epsilon: float, partial_gradient: bool) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.specs = {"weight": _spec("ones", partial_gradient)}

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        weight = self.local("weight")
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def _spec(init: Init, partial: bool) -> ParameterSpec:
    return ParameterSpec(placement=Replicate(), init=init, partial=partial)


def make_norm(
    config: ModelConfig, *, partial_gradient: bool, width: int | None = None
) -> LayerNorm | RMSNorm:
    """The normalization that ``config`` names.

    Args:
        partial_gradient: other ranks of the tp axis normalize other tokens (sequence parallelism)
            or other heads.
        width: what is normalized, by default the residual stream.
    """
    kind = RMSNorm if config.normalization == "RMSNorm" else LayerNorm
    return kind(
        width or config.hidden_size, epsilon=config.norm_epsilon, partial_gradient=partial_gradient
    )
