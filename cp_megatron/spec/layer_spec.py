"""The layer: norm, mixer, norm, MLP."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from cp_megatron.config import ModelConfig
from cp_megatron.spec.dense_mlp import MLPSpec
from cp_megatron.spec.experts import ExpertMixtureSpec
from cp_megatron.spec.latent import LatentAttentionSpec
from cp_megatron.spec.linear_attention import LinearAttentionSpec
from cp_megatron.spec.mixer import AttentionSpec
from cp_megatron.spec.parameter import BlockSpec
from cp_megatron.spec.pieces import NormSpec
from cp_megatron.spec.sizes import ActivationSizes


@dataclass(frozen=True, kw_only=True)
class LayerSpec(BlockSpec):
    """One layer: a mixer, then an MLP, each of which adds to the residual stream x.

    A block adds dropout(multiplier * post_norm(block(norm(x)))).

    Attributes:
        attention, recurrence: the mixer is one of them, and the other is None.
        mlp: dense, or a mixture of experts.
        attention_norm, mlp_norm: normalize what a block reads; None: it reads the stream itself.
        attention_post_norm, mlp_post_norm: normalize what a block adds; None: it is added as it is.
        is_parallel: the MLP reads ``attention_norm`` of the x that attention reads, and has no norm
            of its own.
        multiplier: the factor of what a block adds.
    """

    attention_norm: NormSpec | None
    attention: AttentionSpec | LatentAttentionSpec | None
    recurrence: LinearAttentionSpec | None
    attention_post_norm: NormSpec | None
    mlp_norm: NormSpec | None
    mlp: MLPSpec | ExpertMixtureSpec
    mlp_post_norm: NormSpec | None
    is_parallel: bool = False
    multiplier: float = 1.0

    @classmethod
    def of(cls, model: ModelConfig, *, layer: int) -> LayerSpec:
        """A layer of the model, numbered from 0."""
        norm, where = NormSpec.of(model), model.norm_placement
        before, after = norm if where != "post" else None, norm if where != "pre" else None
        attends = not model.is_linear(layer)
        return cls(
            attention_norm=before,
            attention=attention_of(model, layer=layer) if attends else None,
            recurrence=None if attends else LinearAttentionSpec.of(model),
            attention_post_norm=after,
            mlp_norm=None if model.parallel_residual else before,
            mlp=ExpertMixtureSpec.of(model) if model.has_experts(layer) else MLPSpec.of(model),
            mlp_post_norm=after,
            is_parallel=model.parallel_residual,
            multiplier=model.residual_multiplier,
        )

    @property
    def mixer(self) -> AttentionSpec | LatentAttentionSpec | LinearAttentionSpec:
        """The block in which tokens see one another."""
        mixer = self.attention or self.recurrence
        assert mixer is not None
        return mixer

    def kept_bytes(
        self, sizes: ActivationSizes, granularity: str, *, tiled: bool, keeps_attention: bool
    ) -> Counter[str]:
        """Bytes that backward needs, by the name of the module that keeps them.

        Args:
            sizes: the sizes of activations.
            granularity: what is recomputed, as in ``MemoryConfig``; it decides about the name
                ``inputs``, the inputs of recomputed blocks.
            tiled: the MLP runs in tiles, and keeps its input.
            keeps_attention: full recomputation keeps the results of attention.
        """
        width = self.mlp.hidden
        stream = sizes.stream_bytes(width)
        if granularity == "full":
            mixed = 0 if self.recurrence is None else self.recurrence.kept_messages(sizes)
            if keeps_attention and self.attention is not None:
                mixed = self.attention.result_bytes(replace(sizes, result_copies=1))
            return Counter(inputs=stream, attention=mixed, mlp=self._choice_bytes(sizes))
        kept = Counter(attention=self.mixer.kept_results(sizes))
        for name in ("attention_post_norm", "mlp_post_norm"):
            kept[name] = _norm_bytes(getattr(self, name), sizes)
        if granularity == "selective":
            kept["inputs"] = (1 if self.is_parallel else 2) * stream
            kept["mlp"] = self._choice_bytes(sizes)
            return kept
        kept["attention_norm"] = _norm_bytes(self.attention_norm, sizes)
        kept["attention"] += self.mixer.kept_operands(sizes)
        kept["mlp_norm"] = _norm_bytes(self.mlp_norm, sizes)
        kept["mlp"] = self.mlp.kept_bytes(sizes)
        read = self.mlp_norm
        if self.is_parallel and (read := self.attention_norm):
            # Both blocks run it, and the input that both runs keep is one tensor.
            again = _norm_bytes(read, sizes) - (stream if read.keeps_input(sizes) else 0)
            kept["attention_norm"] += again
        # A norm that keeps its input keeps the input of the tiles. Without a norm, the tiles of
        # several rows are copied, because they are not contiguous.
        copies = not read.keeps_input(sizes) if read else sizes.batch > 1
        if tiled and copies:
            kept["mlp"] += stream
        return kept

    def _choice_bytes(self, sizes: ActivationSizes) -> int:
        return self.mlp.choice_bytes(sizes) if isinstance(self.mlp, ExpertMixtureSpec) else 0


def attention_of(model: ModelConfig, *, layer: int) -> AttentionSpec | LatentAttentionSpec:
    """The attention of a layer that attends, numbered from 0."""
    kind = LatentAttentionSpec if model.multi_latent_attention else AttentionSpec
    return kind.of(model, layer=layer)


def _norm_bytes(norm: NormSpec | None, sizes: ActivationSizes) -> int:
    return 0 if norm is None else norm.kept_bytes(sizes.stream_tokens, sizes)
