"""The feed-forward block: two or three linears around an activation. Receives no group.

Shapes: b batch, s sequence of one context parallel rank, h hidden, f ffn.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cp_megatron.config.schema import ModelConfig
from cp_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear


class MLP(nn.Module):
    """down(gelu(up(x))), or with a gate down(silu(gate(x)) * up(x)) (Shazeer 2020, 2002.05202).

    GELU is the tanh form of Hendrycks and Gimpel (arXiv:1606.08415), as in GPT-2.
    """

    def __init__(self, config: ModelConfig, *, down: RowParallelLinear) -> None:
        super().__init__()
        sizes = config.hidden_size, config.ffn_size
        bias = not config.disable_bias_linear
        self.gate = ColumnParallelLinear(*sizes, bias=bias) if config.swiglu else None
        self.up = ColumnParallelLinear(*sizes, bias=bias)
        self.down = down

    def locals(self) -> dict[str, Tensor]:
        """The parameters' parts that this tp rank computes with, named as here."""
        linears = {"gate": self.gate, "up": self.up, "down": self.down}
        return {
            f"{name}.{own}": value
            for name, linear in linears.items()
            if linear is not None
            for own, value in linear.locals().items()
        }

    def forward(self, x: Tensor, forgotten: bool = False) -> Tensor:
        """[b, s, h], entered into tensor parallelism -> residual stream.

        ``forgotten``: as in ``RowParallelLinear``.
        """
        wide = self.up(x)  # [b, s, f/tp]
        if self.gate is None:
            wide = F.gelu(wide, approximate="tanh")
        else:
            wide = F.silu(self.gate(x)) * wide
        return self.down(wide, forgotten=forgotten)
