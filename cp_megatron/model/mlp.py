"""The feed-forward block: two or three linears around an activation.

It sends no messages itself; the layer calls ``tp.enter`` and ``tp.leave``.

Shapes: b batch, s sequence of one context parallel rank, h hidden, f ffn.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.spec import MLPSpec
from cp_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel


class MLP(nn.Module):
    """down(gelu(up(x))), or with a gate down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202).

    GELU is the tanh form of Hendrycks and Gimpel (arXiv:1606.08415), as in GPT-2.
    """

    def __init__(self, spec: MLPSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.gate = None if spec.gate is None else ColumnParallelLinear(spec.gate, tp=tp)
        self.up = ColumnParallelLinear(spec.up, tp=tp)
        self.down = RowParallelLinear(spec.down, tp=tp)

    def forward(self, x: Tensor, gradient_only: bool = False) -> Tensor:
        """[b, s, h] -> this rank's summand [b, s, h] of what is added to the residual stream.

        ``gradient_only`` is described in ``RowParallelLinear``.
        """
        wide = self.up(x)  # [b, s, f/tp]
        if self.gate is None:
            wide = F.gelu(wide, approximate="tanh")
        else:
            wide = F.silu(self.gate(x)) * wide
        return self.down(wide, gradient_only)
