"""Normalization: torch's own functions on the tokens that a rank holds.

Every token is normalized by itself, so forward needs no communication.

Shapes: .. tokens, h hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.spec import NormSpec
from cp_megatron.tensor_parallel import SpecifiedModule, TensorParallel


class Norm(SpecifiedModule):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang, Sennrich 2019, 1910.07467).

    LayerNorm    (x - mean) / sqrt(variance + epsilon) * weight + bias
    RMSNorm      x / sqrt(mean(x^2) + epsilon) * weight

    With ``one_plus`` the factor is 1 + weight, computed in float32 (float64 for float64): in
    bfloat16 the sum would lose most of a small weight.
    """

    def __init__(self, spec: NormSpec, *, tp: TensorParallel) -> None:
        super().__init__(spec, tp)
        self.kind, self.epsilon, self.one_plus = spec.kind, spec.epsilon, spec.one_plus

    def forward(self, x: Tensor) -> Tensor:
        """[.., h] -> [.., h]."""
        weight, bias, dtype = self.local("weight"), self.local_bias(), x.dtype
        if self.one_plus:
            weight = 1 + weight.to(accumulation_dtype(weight.dtype))
            # One type for all: layer_norm takes no other, and rms_norm fuses no other.
            x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        if self.kind == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, self.epsilon).to(dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon).to(dtype)
