"""The MLP and the layer: norm, mixer, norm, MLP."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cp_megatron.config import ModelConfig
from cp_megatron.spec.mixer import AttentionSpec
from cp_megatron.spec.parameter import BlockSpec
from cp_megatron.spec.pieces import LinearSpec, NormSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class MLPSpec(BlockSpec):
    """The feed-forward block: down(gelu(up(x))), or with a gate down(silu(gate(x)) * up(x))."""

    gate: LinearSpec | None
    up: LinearSpec
    down: LinearSpec

    @classmethod
    def of(cls, model: ModelConfig) -> MLPSpec:
        """The MLP of every layer."""
        hidden, width, bias = model.hidden_size, model.ffn_size, not model.disable_bias_linear
        up = LinearSpec(inputs=hidden, outputs=width, bias=bias)
        return cls(
            gate=up if model.swiglu else None,
            up=up,
            down=LinearSpec(inputs=width, outputs=hidden, bias=bias, split="row"),
        )

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the normalized stream and of the wide tensors."""
        wide = 2 if self.gate is None else 4  # up, activated, and with a gate also gate and product
        width = self.up.outputs // sizes.tp * sizes.element
        return sizes.stream_bytes(self.up.inputs) + sizes.tokens * wide * width


@dataclass(frozen=True, kw_only=True)
class LayerSpec(BlockSpec):
    """One layer: x + mixer(norm(x)), then x + mlp(norm(x)), with dropout on what is added."""

    attention_norm: NormSpec
    attention: AttentionSpec
    mlp_norm: NormSpec
    mlp: MLPSpec
    dropout: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int) -> LayerSpec:
        """A layer of the model, numbered from 0."""
        return cls(
            attention_norm=NormSpec.of(model),
            attention=AttentionSpec.of(model, layer=layer),
            mlp_norm=NormSpec.of(model),
            mlp=MLPSpec.of(model),
            dropout=model.hidden_dropout,
        )

    def kept_bytes(self, sizes: ActivationSizes, granularity: str, *, tiled: bool) -> Counter[str]:
        """Bytes that backward needs, by the name of the module that keeps them.

        Args:
            sizes: the sizes of activations.
            granularity: what is recomputed, as in ``MemoryConfig``; it decides about the name
                ``inputs``, the inputs of recomputed blocks.
            tiled: the MLP runs in tiles, and keeps its input.
        """
        stream = sizes.stream_bytes(self.attention_norm.width)
        if granularity == "full":
            return Counter(inputs=stream)
        kept = Counter(attention=self.attention.kept_results(sizes))
        if self.dropout:
            kept["dropout"] = 2 * sizes.dropout_bytes(self.attention_norm.width)
        if granularity == "selective":
            kept["inputs"] = 2 * stream
            return kept
        kept["attention_norm"] = self.attention_norm.kept_bytes(sizes.stream_tokens, sizes)
        kept["attention"] += self.attention.kept_operands(sizes)
        kept["mlp_norm"] = self.mlp_norm.kept_bytes(sizes.stream_tokens, sizes)
        kept["mlp"] = self.mlp.kept_bytes(sizes)
        if tiled and not self.mlp_norm.keeps_input(sizes):
            kept["mlp"] += stream
        return kept
