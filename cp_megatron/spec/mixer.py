"""The mixers: the block of a layer in which tokens see one another.

A mixer reads the normalized residual stream, and its output projection adds to the stream. A new
kind is another subclass of ``MixerSpec``. Latent attention is in ``latent.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from cp_megatron.config import ModelConfig
from cp_megatron.spec.parameter import BlockSpec, ParameterSpec
from cp_megatron.spec.pieces import HeadNormSpec, LinearSpec
from cp_megatron.spec.sizes import ActivationSizes


class LocalHeads(NamedTuple):
    """The heads that one rank's attention computes, and the widths of their keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int


@dataclass(frozen=True, kw_only=True)
class RotarySpec:
    """How a layer rotates queries and keys by their positions.

    Attributes:
        width: number of channels that are rotated.
        base: the base of the frequencies.
        is_scaled: whether the frequencies change as ``rope_type`` says.
        interleaved: whether channels 2i and 2i + 1 are a pair, instead of i and i + width / 2.
        temperature: beta and L of the factor 1 + beta ln(1 + floor(p / L)), by which the query at
            position p is multiplied (Llama 4); None: there is no factor.
    """

    width: int
    base: float
    is_scaled: bool
    interleaved: bool
    temperature: tuple[float, int] | None

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int) -> RotarySpec | None:
        """The rotation of a layer, numbered from 0."""
        if not model.layer_rotates(layer):
            return None
        local = model.window_rotary_base if model.layer_window(layer) else None
        beta, length = model.query_temperature_beta, model.original_length
        return cls(
            width=model.rotary_dim,
            base=local or model.rotary_base,
            is_scaled=local is None,
            interleaved=model.rotary_interleaved,
            temperature=(beta, length) if beta and length else None,
        )


@dataclass(frozen=True, kw_only=True)
class MixerSpec(BlockSpec):
    """The description that all kinds of attention share.

    Attributes:
        heads, kv_heads: number of query heads, and of key/value heads, on all ranks together.
        head_dim, v_head_dim: widths of a head's queries and keys, and of its values.
        window: (left, right) as in ``Mask``; None is unlimited.
        rotary: how queries and keys are rotated; None: they are not.
        scale: the factor of the scores.
        softcap: the bound c of the scores, which makes c tanh(x / c) of the score x; None: the
            scores are unbounded.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: tuple[int, int] | None
    rotary: RotarySpec | None
    scale: float
    softcap: float | None

    @staticmethod
    def shared_fields(model: ModelConfig, *, layer: int) -> dict[str, Any]:
        """The fields above, for a layer numbered from 0."""
        return {
            "heads": model.num_attention_heads,
            "kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "v_head_dim": model.value_dim,
            "window": model.layer_window(layer),
            "rotary": RotarySpec.of(model, layer=layer),
            "scale": model.score_scale,
            "softcap": model.attn_logit_softcapping,
        }

    def local_heads(self, tp: int) -> LocalHeads:
        """The heads that one of ``tp`` tensor parallel ranks computes.

        With fewer key/value heads than ranks each rank computes one, shared with its neighbours.
        """
        kv_heads = max(1, self.kv_heads // tp)
        return LocalHeads(self.heads // tp, kv_heads, self.head_dim, self.v_head_dim)

    def pair_channels(self) -> int:
        return self.heads * (self.head_dim + self.v_head_dim)

    def operand_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of q, k and v.

        If heads are exchanged for tokens, these are 0: the exchanged q, k and v are kept instead,
        which ``kept_results`` counts.
        """
        heads, kv_heads, width, v_width = self.local_heads(sizes.tp)
        channels = (heads + kv_heads) * width + kv_heads * v_width
        return sizes.tokens * channels * sizes.element if sizes.head_exchange is None else 0

    def kept_results(self, sizes: ActivationSizes) -> int:
        """Bytes that selective recomputation keeps."""
        return self.result_bytes(sizes)

    def result_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the result and its log-sum-exp.

        If heads are exchanged for tokens, also the exchanged q, k, v and out, because they cannot
        be computed again without messages.
        """
        heads, _, width, v_width = self.local_heads(sizes.tp)
        exchange, result = sizes.head_exchange, v_width * sizes.element
        if exchange is None:
            return sizes.tokens * heads * (sizes.result_copies * result + sizes.exact)
        q0, q1 = exchange.query_heads[exchange.index]
        k0, k1 = exchange.kv_heads[exchange.index]
        channels = ((q1 - q0) + (k1 - k0)) * (width + v_width)  # q and out, k and v
        exchanged = channels * sizes.element + (q1 - q0) * sizes.exact
        return sizes.tokens * (heads * result + len(exchange.peers) * exchanged)

    def rotation_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the cosines and sines, and of the factors of queries.

        All layers with the same rotation share them.
        """
        if self.rotary is None:
            return 0
        factor = 0 if self.rotary.temperature is None else sizes.element
        return sizes.row_tokens * (self.rotary.width * sizes.exact + factor)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(MixerSpec):
    """Softmax attention with grouped heads.

    Attributes:
        query, key, value, out: the projections; ``out`` adds to the residual stream.
        gate: computes the gate of what ``out`` reads; None: there is none.
        query_norm, key_norm: normalize the query and key heads before they are rotated; None: there
            are no such norms.
        sinks: how the softmax is extended, as ``softmax_type`` of the configuration; ``learnable``
            adds the parameter ``sinks``, a logit per query head.
    """

    query: LinearSpec
    key: LinearSpec
    value: LinearSpec
    gate: LinearSpec | None
    out: LinearSpec
    query_norm: HeadNormSpec | None
    key_norm: HeadNormSpec | None
    sinks: str

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int = 0) -> AttentionSpec:
        """The attention of a layer, numbered from 0."""
        shared = cls.shared_fields(model, layer=layer)
        heads, kv_heads = model.num_attention_heads, model.num_kv_heads
        project = partial(LinearSpec, inputs=model.hidden_size, bias=model.has_qkv_bias)
        keys = partial(project, units=kv_heads, shares_units=True)
        gate = project(outputs=heads * model.value_dim, units=heads)
        norm = partial(HeadNormSpec.of_heads, model) if model.qk_layernorm else None
        return cls(
            query=project(outputs=heads * model.head_dim, units=heads),
            key=keys(outputs=kv_heads * model.head_dim),
            value=keys(outputs=kv_heads * model.value_dim),
            gate=gate if model.attention_output_gate else None,
            out=LinearSpec(
                inputs=heads * model.value_dim,
                outputs=model.hidden_size,
                bias=model.has_attention_output_bias,
                split="row",
                units=heads,
            ),
            query_norm=norm(heads) if norm else None,
            key_norm=norm(kv_heads) if norm else None,
            sinks=model.softmax_type,
            **shared,
        )

    def own_parameters(self) -> Iterator[ParameterSpec]:
        if self.sinks == "learnable":
            shape, split = (self.heads,), {"tp": 0}
            yield ParameterSpec(name="sinks", shape=shape, init="normal", split=split)

    def kept_operands(self, sizes: ActivationSizes) -> int:
        """Bytes of attention's inputs that backward needs and that recomputation frees.

        These are the normalized stream, what the norms of heads keep, q, k and v, and the sigmoid
        of the gate.
        """
        kept = sizes.stream_bytes(self.query.inputs) + self.operand_bytes(sizes)
        kept += self._gate_bytes(sizes)
        heads, kv_heads, *_ = self.local_heads(sizes.tp)
        for norm, count in ((self.query_norm, heads), (self.key_norm, kv_heads)):
            if norm is not None:
                kept += norm.kept_by_heads(count, sizes)
        return kept

    def kept_results(self, sizes: ActivationSizes) -> int:
        """Bytes of what attention keeps, and of its gated result, which ``out`` reads."""
        if self.gate is None:
            return self.result_bytes(sizes)
        return self.result_bytes(replace(sizes, result_copies=1)) + self._gate_bytes(sizes)

    def _gate_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of a tensor of the gate's shape; 0 without a gate."""
        width = 0 if self.gate is None else self.gate.outputs
        return sizes.tokens * width // sizes.tp * sizes.element
