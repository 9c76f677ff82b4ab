"""Gated DeltaNet, a linear recurrence (Yang et al. 2024, arXiv:2412.06464), as in Qwen3-Next.

A token reads the residual stream x through six projections. Queries, keys and values pass a causal
convolution per channel and SiLU, and queries and keys have length 1::

    x -> query, key, value -> convolution -> SiLU -> q / |q|, k / |k|, v
    x -> rate              -> sigmoid -> beta, the learning rate of a head
    x -> decay_input -> -exp(A_log) softplus(. + dt_bias) -> g, the logarithm of its decay
    x -> gate              -> SiLU -> z

    recurrence(q, k, v, g, beta) -> norm -> . * z -> out

``kernels/linear_reference.py`` states the recurrence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from cp_megatron.config import ModelConfig
from cp_megatron.plan.states import StateSize
from cp_megatron.spec.parameter import BlockSpec, ParameterSpec
from cp_megatron.spec.pieces import LinearSpec, NormSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class ConvolutionSpec(BlockSpec):
    """A causal convolution per channel, without a bias.

    Attributes:
        channels: number of channels.
        width: number of tokens that it reads.
        units, shares_units: as in ``ParameterSpec``.
    """

    channels: int
    width: int
    units: int
    shares_units: bool

    def own_parameters(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec(
            name="weight",
            shape=(self.channels, 1, self.width),
            init="convolution",
            split={"tp": 0},
            units=self.units,
            shares_units=self.shares_units,
        )

    def matmul_parameters(self) -> int:
        return self.channels * self.width


@dataclass(frozen=True, kw_only=True)
class DecaySpec(BlockSpec):
    """The parameters of the decay of each head; the names are those of Mamba-2."""

    heads: int

    def own_parameters(self) -> Iterator[ParameterSpec]:
        spec = partial(ParameterSpec, shape=(self.heads,), split={"tp": 0}, units=self.heads)
        yield spec(name="A_log", init="decay")
        yield spec(name="dt_bias", init="ones")


@dataclass(frozen=True, kw_only=True)
class LinearAttentionSpec(BlockSpec):
    """A gated DeltaNet.

    Value head h reads query and key head h // (heads / key_heads).

    Attributes:
        heads, key_heads: number of value heads, and of query and key heads.
        head_dim, v_head_dim: widths of a key head and of a value head.
        query, key, value, gate, rate, decay_input: the projections drawn above.
        query_conv, key_conv, value_conv: the convolutions, which have one width.
        decay: makes g of what ``decay_input`` computes.
        norm: normalizes the result of each head, with one weight for all heads.
        out: adds to the residual stream.
        window, rotary: None. They are those of attention, which a recurrence does without.
    """

    window: ClassVar[None] = None
    rotary: ClassVar[None] = None

    heads: int
    key_heads: int
    head_dim: int
    v_head_dim: int
    query: LinearSpec
    key: LinearSpec
    value: LinearSpec
    gate: LinearSpec
    rate: LinearSpec
    decay_input: LinearSpec
    query_conv: ConvolutionSpec
    key_conv: ConvolutionSpec
    value_conv: ConvolutionSpec
    decay: DecaySpec
    norm: NormSpec
    out: LinearSpec

    @classmethod
    def of(cls, model: ModelConfig) -> LinearAttentionSpec:
        """The recurrence of every layer that has one."""
        heads, key_heads = model.linear_num_value_heads, model.linear_num_key_heads
        head_dim, v_head_dim = model.linear_key_head_dim, model.linear_value_head_dim
        project = partial(LinearSpec, inputs=model.hidden_size, bias=False)
        keys = project(outputs=key_heads * head_dim, units=key_heads, shares_units=True)
        values = project(outputs=heads * v_head_dim, units=heads)
        per_head = project(outputs=heads, units=heads)
        convolve = partial(ConvolutionSpec, width=model.linear_conv_kernel_dim)
        key_conv = convolve(channels=keys.outputs, units=key_heads, shares_units=True)
        return cls(
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            query=keys,
            key=keys,
            value=values,
            gate=values,
            rate=per_head,
            decay_input=per_head,
            query_conv=key_conv,
            key_conv=key_conv,
            value_conv=convolve(channels=values.outputs, units=heads, shares_units=False),
            decay=DecaySpec(heads=heads),
            norm=NormSpec(
                width=v_head_dim, kind="RMSNorm", epsilon=model.norm_epsilon, used_on="heads"
            ),
            out=LinearSpec(
                inputs=values.outputs,
                outputs=model.hidden_size,
                bias=False,
                split="row",
                units=heads,
            ),
        )

    def matmul_parameters(self) -> int:
        """Counts three products with the state of each head as well: what it predicts of the value,
        the outer product that is added to it, and the result."""
        state = self.head_dim * self.v_head_dim
        return super().matmul_parameters() + 3 * self.heads * state

    def local_heads(self, tp: int) -> tuple[int, int]:
        """The value heads and key heads that one of ``tp`` tensor parallel ranks computes."""
        return self.heads // tp, max(1, self.key_heads // tp)

    @property
    def state(self) -> StateSize:
        """Elements of a head's transition and of its state."""
        return StateSize.of(self.head_dim, self.v_head_dim, "matrix")

    def channels(self, tp: int) -> int:
        """Channels that one of ``tp`` tensor parallel ranks convolves."""
        heads, key_heads = self.local_heads(tp)
        return 2 * key_heads * self.head_dim + heads * self.v_head_dim

    def kept_messages(self, sizes: ActivationSizes) -> int:
        """Bytes that every recomputation keeps: the states that enter pieces, the transitions of
        the chains that this rank follows, and the halo of the convolution."""
        heads, states = self.local_heads(sizes.tp)[0], sizes.states
        chained = states.pieces * heads * self.state.state
        chained += states.transitions * states.heads * self.state.transition
        halo = states.halo * self.channels(sizes.tp) * sizes.element
        return sizes.batch * (chained * sizes.exact + halo)

    def kept_results(self, sizes: ActivationSizes) -> int:
        """Bytes that selective recomputation keeps too: the result of the recurrence, what ``out``
        reads, and what was received."""
        heads = self.local_heads(sizes.tp)[0]
        results = 2 * sizes.tokens * heads * self.v_head_dim * sizes.element
        return results + self.kept_messages(sizes)

    def kept_operands(self, sizes: ActivationSizes) -> int:
        """Bytes that backward needs and that recomputation frees.

        These are the normalized stream; what is convolved, its convolution and SiLU; what makes
        queries and keys unit vectors, and these vectors; what makes the decay; the rate; the gate,
        the normalized result, and what the norm keeps in place of the result.
        """
        (heads, key_heads), el, exact = self.local_heads(sizes.tp), sizes.element, sizes.exact
        values, keys = heads * self.v_head_dim, 2 * key_heads * self.head_dim
        mixed = 3 * self.channels(sizes.tp) * el
        # A norm of the CPU copies its input to the type of the sums.
        copied = 0 if sizes.on_cuda or el == exact else keys * exact
        units = keys * el + 2 * key_heads * exact + copied
        per_head = heads * (el + 3 * exact)
        gate = 2 * values * el
        # The joined weights of the convolutions, and the rates of the decay with both signs.
        weights = self.channels(sizes.tp) * self.query_conv.width * el + 2 * heads * exact
        norm = self.norm.kept_bytes(sizes.tokens * heads, sizes)
        kept = sizes.stream_bytes(self.query.inputs) + weights + norm
        return kept + sizes.tokens * (mixed + units + per_head + gate - values * el)
