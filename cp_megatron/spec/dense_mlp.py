"""The dense MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cp_megatron.config import ModelConfig
from cp_megatron.spec.parameter import BlockSpec
from cp_megatron.spec.pieces import LinearSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class MLPSpec(BlockSpec):
    """The feed-forward block: down(act(up(x))), or with a gate down(act(gate(x)) * up(x)).

    Attributes:
        gate, up: [h] -> [width of the MLP]; ``gate`` is None in an MLP without one.
        down: [width of the MLP] -> [h].
        activation: the function act; ``gelu`` is the approximation with tanh, ``quick_gelu`` is
            x sigmoid(1.702 x).
        clamp: the bound of both factors of a gated MLP, from above and, for ``up``, also from
            below; None: there is none.
        offset: is added to what ``up`` computes in a gated MLP.
    """

    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec
    activation: Literal["gelu", "silu", "quick_gelu"]
    clamp: float | None = None
    offset: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, *, width: int | None = None) -> MLPSpec:
        """The dense MLP of every layer, or one of another width."""
        hidden, bias, width = model.hidden_size, model.has_mlp_bias, width or model.ffn_size
        up = LinearSpec(inputs=hidden, outputs=width, bias=bias)
        return cls(
            gate=up if model.is_gated else None,
            up=up,
            down=LinearSpec(inputs=width, outputs=hidden, bias=bias, split="row"),
            activation=activation_of(model),
            clamp=model.activation_func_clamp_value,
            offset=model.glu_linear_offset,
        )

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.up.inputs

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the normalized stream and of the wide tensors."""
        wide = 2 if self.gate is None else 3  # up and what ``down`` reads, and the gate if any
        width = self.up.outputs // sizes.tp * sizes.element
        return sizes.stream_bytes(self.up.inputs) + sizes.tokens * wide * width


def activation_of(model: ModelConfig) -> Literal["gelu", "silu", "quick_gelu"]:
    """The function of the gate, or of an MLP without one."""
    if model.quick_geglu:
        return "quick_gelu"
    return "silu" if model.swiglu else "gelu"
