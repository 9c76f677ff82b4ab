"""The feed-forward block: two or three linears around an activation.

It sends no messages itself; the layer calls ``tp.enter`` and ``tp.leave``.

Shapes: b batch, s sequence of one context parallel rank, h hidden, f ffn.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.spec import MLPSpec
from cp_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear, TensorParallel


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)) (Shazeer 2020, 2002.05202).

    GELU is the tanh form of Hendrycks and Gimpel (arXiv:1606.08415), as in GPT-2.
    """

    def __init__(self, spec: MLPSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.gate = None if spec.gate is None else ColumnParallelLinear(spec.gate, tp=tp)
        self.up = ColumnParallelLinear(spec.up, tp=tp)
        self.down = RowParallelLinear(spec.down, tp=tp)
        self.activation = (
            F.silu if spec.activation == "silu" else partial(F.gelu, approximate="tanh")
        )

    def forward(self, x: Tensor, gradient_only: bool = False) -> Tensor:
        """[b, s, h] -> this rank's summand [b, s, h] of what is added to the residual stream.

        ``gradient_only`` is described in ``RowParallelLinear``.
        """
        wide = self.up(x)  # [b, s, f/tp]
        wide = self.activation(wide) if self.gate is None else self.activation(self.gate(x)) * wide
        return self.down(wide, gradient_only)
