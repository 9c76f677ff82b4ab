"""The pieces that blocks are made of: linear layers, norms, and the ends of the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self

from cp_megatron.config import ModelConfig, tokens_with_logits
from cp_megatron.spec.parameter import Activations, BlockSpec, Init, ParameterSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class LinearSpec(BlockSpec):
    """A linear layer that tensor parallelism splits (Shoeybi et al. 2019, arXiv:1909.08053).

    Attributes:
        inputs, outputs: number of features.
        bias: whether it has one.
        split: ``column`` splits the outputs; ``row`` splits the inputs: each rank computes a
            partial sum. Row layers write to the residual stream. ``none`` splits nothing.
        units, shares_units: as in ``ParameterSpec``.
    """

    inputs: int
    outputs: int
    bias: bool
    split: Literal["column", "row", "none"] = "column"
    units: int | None = None
    shares_units: bool = False

    def own_parameters(self) -> Iterator[ParameterSpec]:
        shape, dims = (self.outputs, self.inputs), {"column": 0, "row": 1}
        spec = partial(ParameterSpec, units=self.units, shares_units=self.shares_units)
        init: Init = "scaled_normal" if self.split == "row" else "normal"
        split = {"tp": dims[self.split]} if self.split in dims else {}
        yield spec(name="weight", shape=shape, init=init, split=split)
        if self.bias:
            split = {"tp": 0} if self.split == "column" else {}
            yield spec(name="bias", shape=shape[:1], init="zeros", split=split)

    def matmul_parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class NormSpec(BlockSpec):
    """A normalization of vectors.

    Attributes:
        width: length of a vector.
        kind: ``LayerNorm`` or ``RMSNorm``.
        epsilon: the number that is added to the variance.
        bias: whether it adds a bias; only LayerNorm can.
        one_plus: whether the factor is 1 + weight instead of the weight.
        used_on: what is normalized, the residual stream or heads; see ``ParameterSpec``.
    """

    width: int
    kind: str
    epsilon: float
    bias: bool = False
    one_plus: bool = False
    used_on: Activations = "residual"

    @classmethod
    def of(
        cls, model: ModelConfig, *, width: int | None = None, used_on: Activations = "residual"
    ) -> Self:
        """The norm of the residual stream, or of vectors of another width."""
        with_bias = ("all", "residual") if used_on == "residual" else ("all",)
        return cls(
            width=width or model.hidden_size,
            kind=model.normalization,
            epsilon=model.norm_epsilon,
            bias=model.normalization == "LayerNorm" and model.norm_bias in with_bias,
            one_plus=model.apply_layernorm_1p,
            used_on=used_on,
        )

    def own_parameters(self) -> Iterator[ParameterSpec]:
        spec = self._parameter()
        yield spec(name="weight", init="zeros" if self.one_plus else "ones")
        if self.bias:
            yield spec(name="bias", init="zeros")

    def _parameter(self) -> partial[ParameterSpec]:
        return partial(ParameterSpec, shape=(self.width,), used_on=self.used_on)

    def kept_bytes(self, vectors: int, sizes: ActivationSizes) -> int:
        """Bytes that backward needs of ``vectors`` normalized vectors."""
        is_layer_norm, is_mixed = self.kind == "LayerNorm", self._is_mixed(sizes)
        # The factor 1 + weight, and the bias in the type of the sums.
        copies = self.one_plus + (is_mixed and self.bias)
        shared = copies * self.width * sizes.exact
        element = sizes.exact if is_mixed else sizes.element
        if not is_layer_norm:
            return vectors * (self.width * element + sizes.exact) + shared
        statistic = sizes.exact if sizes.on_cuda else element
        return vectors * (self.width * element + 2 * statistic) + shared

    def keeps_input(self, sizes: ActivationSizes) -> bool:
        """Whether it keeps its input itself, not a copy in the type of the sums."""
        return not self._is_mixed(sizes)

    def _is_mixed(self, sizes: ActivationSizes) -> bool:
        """Whether a LayerNorm computes 1 + weight in another type than the activations have."""
        return self.kind == "LayerNorm" and self.one_plus and sizes.element != sizes.exact


@dataclass(frozen=True, kw_only=True)
class HeadNormSpec(NormSpec):
    """A normalization of the query or key heads of a token.

    Attributes:
        heads: number of heads of the model.
        scope: ``head`` normalizes every head with one weight [d], ``each_head`` with a weight
            [heads, d], and ``all_heads`` normalizes a token's heads as one vector, [heads * d].
    """

    heads: int
    scope: str

    @classmethod
    def of_heads(cls, model: ModelConfig, heads: int) -> HeadNormSpec:
        """The norm of ``heads`` heads."""
        norm = vars(NormSpec.of(model, width=model.head_dim, used_on="heads"))
        return cls(**norm, heads=heads, scope=model.qk_norm_scope)

    def _parameter(self) -> partial[ParameterSpec]:
        if self.scope == "head":
            return super()._parameter()
        whole = self.scope == "all_heads"
        shape = (self.heads * self.width,) if whole else (self.heads, self.width)
        split = {"tp": 0}
        spec = partial(ParameterSpec, used_on=self.used_on, units=self.heads, shares_units=True)
        return partial(spec, shape=shape, split=split)

    def kept_by_heads(self, heads: int, sizes: ActivationSizes) -> int:
        """Bytes that backward needs for ``heads`` heads of every token."""
        if self.scope == "head":
            return self.kept_bytes(sizes.tokens * heads, sizes)
        # The heads themselves, and each vector's statistics in the type of the sums.
        vectors = 1 if self.scope == "all_heads" else heads
        statistics = vectors * (2 if self.kind == "LayerNorm" else 1) * sizes.exact
        return sizes.tokens * (heads * self.width * sizes.element + statistics)


@dataclass(frozen=True, kw_only=True)
class EmbeddingSpec(BlockSpec):
    """The table of token embeddings, whose rows are split.

    Attributes:
        vocab_size: number of ids.
        padded_vocab: number of rows, padding included.
        width: of the residual stream.
        multiplier: the factor of the embedded vectors, or of the logits in ``HeadSpec``.
    """

    vocab_size: int
    padded_vocab: int
    width: int
    multiplier: float = 1.0

    def own_parameters(self) -> Iterator[ParameterSpec]:
        shape, rows = (self.padded_vocab, self.width), self.vocab_size
        yield ParameterSpec(name="weight", shape=shape, init="normal", split={"tp": 0}, rows=rows)

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the ids; with tensor parallelism also of a mask of those on other ranks."""
        return sizes.tokens * (8 if sizes.tp == 1 else 9)


@dataclass(frozen=True, kw_only=True)
class PositionsSpec(BlockSpec):
    """A table of learned position embeddings, ``rows`` x ``width``."""

    rows: int
    width: int

    def own_parameters(self) -> Iterator[ParameterSpec]:
        yield ParameterSpec(name="weight", shape=(self.rows, self.width), init="normal")

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the positions, which all rows of the batch share."""
        return 8 * sizes.row_tokens


@dataclass(frozen=True, kw_only=True)
class HeadSpec(EmbeddingSpec):
    """The output layer, which multiplies with a table of its own or with the embedding's.

    Attributes:
        tied: whether it uses the embedding's table instead of a weight of its own.
        softcap: the bound c of the logits, which makes c tanh(x / c) of the logit x; None: the
            logits are unbounded.
    """

    tied: bool
    softcap: float | None = None

    def own_parameters(self) -> Iterator[ParameterSpec]:
        if not self.tied:
            yield from super().own_parameters()

    def matmul_parameters(self) -> int:
        return self.padded_vocab * self.width

    def kept_bytes(self, sizes: ActivationSizes) -> int:
        """Bytes of the gradients that the fused loss computes in forward, and of the losses."""
        weight = self.padded_vocab // sizes.tp * self.width
        return sizes.stream_bytes(self.width) + (weight + sizes.tokens + 1) * sizes.exact

    def logits_bytes(self, sizes: ActivationSizes, chunk_size: int | None) -> int:
        """Bytes of the logits of one chunk.

        The products with the weight exist in the compute type. On the CPU, where no kernel fuses
        what is done with them, they also exist in the type of sums if that differs, and with a
        softcap once more.

        Args:
            sizes: the sizes of activations.
            chunk_size: tokens of a chunk; None: see ``tokens_with_logits``.
        """
        columns = self.padded_vocab // sizes.tp
        shared = sizes.tp if sizes.splits_sequence else 1
        tokens = tokens_with_logits(chunk_size, columns, on_cuda=sizes.on_cuda)
        asked = tokens // (sizes.batch * shared)
        rows = min(sizes.row_tokens // shared, max(1, asked))
        copies = sizes.element
        if not sizes.on_cuda:
            copies += sizes.exact * (sizes.exact != sizes.element)
            copies += sizes.exact * (self.softcap is not None)
        return sizes.batch * rows * shared * columns * copies
