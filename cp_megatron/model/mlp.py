"""The feed-forward block: two or three linears around an activation.

It sends no messages and knows no group: the layer lets its input enter tensor parallelism, and its
output leave.

Shapes: b batch, s sequence of one context parallel rank, h hidden, f ffn.
"""

from __future__ import annotations

from torch import Tensor, nn

from cp_megatron.kernels.gated import GatedFunction, activate, gated
from cp_megatron.spec import MLPSpec
from cp_megatron.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    TensorParallel,
)


class MLP(nn.Module):
    """down(act(up(x))), or with a gate down(act(gate(x)) * up(x)); see ``kernels/gated.py``."""

    def __init__(self, spec: MLPSpec, *, tp: TensorParallel) -> None:
        super().__init__()
        self.gate = None if spec.gate is None else ColumnParallelLinear(spec.gate, tp=tp)
        self.up = ColumnParallelLinear(spec.up, tp=tp)
        self.down = RowParallelLinear(spec.down, tp=tp)
        self.function = GatedFunction(spec.activation, spec.clamp, spec.offset)

    @property
    def inputs(self) -> tuple[ColumnParallelLinear, ...]:
        """The layers that read the residual stream; ``products`` gives what they compute."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    def forward(self, *factors: Tensor, gradient_only: bool = False) -> Tensor:
        """The products of ``inputs``, [b, s, f/tp] each -> this rank's summand [b, s, h] of what is
        added to the residual stream.

        ``gradient_only`` is described in ``RowParallelLinear``.
        """
        return self.down(self.activated(*factors), gradient_only)

    def activated(self, *factors: Tensor) -> Tensor:
        """Applies the activation to the products of ``inputs`` -> what ``down`` reads."""
        if len(factors) == 1:
            return activate(factors[0], self.function.activation)
        gate, up = factors
        return gated(gate, up, self.function)
