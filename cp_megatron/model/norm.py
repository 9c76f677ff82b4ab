"""Normalization: torch's own functions on the tokens that a rank holds.

Every token is normalized by itself, so these modules know nothing of ranks.

Shapes: .. tokens, h hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cp_megatron.spec import NormSpec
from cp_megatron.tensor_parallel import SpecifiedModule, TensorParallel


class LayerNorm(SpecifiedModule):
    """(x - mean) / sqrt(variance + epsilon) * weight + bias (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, spec: NormSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.epsilon = spec.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        weight, bias = self.local("weight"), self.local("bias")
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)


class RMSNorm(SpecifiedModule):
    """x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, spec: NormSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.epsilon = spec.epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        weight = self.local("weight")
        return F.rms_norm(x, weight.shape, weight, self.epsilon)


def make_norm(spec: NormSpec, *, tp: TensorParallel) -> LayerNorm | RMSNorm:
    """The module of a norm's description."""
    return (RMSNorm if spec.kind == "RMSNorm" else LayerNorm)(spec, tp=tp)
