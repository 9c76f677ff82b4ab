"""Normalization of the tokens that a rank holds.

Every token is normalized by itself, so forward needs no communication.

Shapes: .. tokens, h hidden.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.rms_norm import add_rms_norm, rms_norm
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

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[.., h] -> [.., h].

        If ``added`` [.., h] is given, returns x + added and the norm of this sum. An RMSNorm
        computes both at once.
        """
        weight = self.local("weight")
        if self.one_plus:
            weight = 1 + weight.to(accumulation_dtype(weight.dtype))
        if self.kind == "RMSNorm":
            if added is None:
                return rms_norm(x, weight, self.epsilon)
            return add_rms_norm(x, added, weight, self.epsilon)
        total = x if added is None else x + added
        normalized = self._layer_norm(total, weight)
        return normalized if added is None else (total, normalized)

    def _layer_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        bias, dtype = self.local_bias(), x.dtype
        if self.one_plus:  # layer_norm takes one type for all
            x, bias = x.to(weight.dtype), None if bias is None else bias.to(weight.dtype)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon).to(dtype)
