"""One layer of the transformer: norm, mixer, residual, norm, MLP, residual.

A model may have norms after the blocks instead or as well, and both blocks may read the same norm::

    pre        x = x + f(norm(x))        for f in mixer, MLP
    post       x = x + norm(f(x))
    both       x = x + norm(f(norm(x)))
    parallel   x = x + mixer(n) + mlp(n)       with n = norm(x)

Every line computes with the tokens that one rank holds. What crosses ranks is visible: ``entered``
and ``tp.leave`` around each block (tensor and sequence parallelism) and, in the mixer,
``cp.attention`` or ``cp.linear_attention`` (context parallelism). A mixture of experts in place of
the MLP sends this rank's rows to their experts itself (``expert_mixture.py``). What is kept for
backward is decided by ``LayerMemory``, around the same functions.

Shapes: b batch, s sequence of one context parallel rank, h hidden. The residual stream is
[b, s, h]; with sequence parallelism [b, s/tp, h].
"""

from __future__ import annotations

from torch import Tensor, nn

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.expert_parallel import ExpertParallel
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.stream_dropout import StreamDropout
from cp_megatron.model.expert_mixture import ExpertMixture, Mixed
from cp_megatron.model.gated_delta_net import GatedDeltaNet
from cp_megatron.model.latent_attention import LatentAttention
from cp_megatron.model.layer_memory import KeptMixer, KeptRouting, LayerMemory, Pass
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import Norm
from cp_megatron.model.rope import Rotation
from cp_megatron.model.row_counts import TokenRows
from cp_megatron.model.self_attention import SelfAttention
from cp_megatron.spec import ExpertMixtureSpec, LatentAttentionSpec, LayerSpec, NormSpec
from cp_megatron.tensor_parallel import LocalWeights, products


class TransformerLayer(nn.Module):
    """Adds a mixer and the MLP to the residual stream, with dropout on what is added.

    Args:
        spec: the description.
        memory: what is kept for backward.
        experts: the groups of a mixture of experts.
    """

    def __init__(
        self, spec: LayerSpec, *, memory: LayerMemory, experts: ExpertParallel | None = None
    ) -> None:
        super().__init__()
        self.memory, self.tp = memory, memory.tp
        self.is_parallel, self.multiplier = spec.is_parallel, spec.multiplier
        self.attention_norm = self._norm(spec.attention_norm)
        self.attention: SelfAttention | LatentAttention | None = None
        if isinstance(spec.attention, LatentAttentionSpec):
            self.attention = LatentAttention(spec.attention, tp=self.tp)
        elif spec.attention is not None:
            self.attention = SelfAttention(spec.attention, tp=self.tp)
        recurrence = spec.recurrence
        self.recurrence = None if recurrence is None else GatedDeltaNet(recurrence, tp=self.tp)
        self.attention_post_norm = self._norm(spec.attention_post_norm)
        self.mlp_norm = self._norm(spec.mlp_norm)
        self.mlp: MLP | ExpertMixture
        if isinstance(spec.mlp, ExpertMixtureSpec):
            experts = experts or ExpertParallel()
            self.mlp = ExpertMixture(spec.mlp, memory=memory, parallel=experts)
        else:
            self.mlp = MLP(spec.mlp, tp=self.tp)
        self.mlp_post_norm = self._norm(spec.mlp_post_norm)
        read = self.attention_norm if self.is_parallel else self.mlp_norm
        self.mlp_weights = LocalWeights(*([] if read is None else [read]), self.mlp)

    @property
    def mixer(self) -> SelfAttention | LatentAttention | GatedDeltaNet:
        """The module in which tokens see one another."""
        mixer = self.recurrence if self.attention is None else self.attention
        assert mixer is not None
        return mixer

    def _norm(self, spec: NormSpec | None) -> Norm | None:
        return None if spec is None else Norm(spec, tp=self.tp)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        rows: TokenRows | None = None,
        hidden: tuple[StreamDropout, StreamDropout] | None = None,
    ) -> Tensor | Mixed:
        """Residual stream -> residual stream.

        Args:
            x: residual stream.
            rotation: of queries and keys.
            cp: the context parallelism of this layer.
            dropout: of the attention weights.
            rows: those of the tokens of ``x``, [b * r]. With them, a layer that has experts also
                returns what they add to the loss and how often each was chosen.
            hidden: the dropouts of what the mixer and the MLP add.
        """
        return self.memory.layer(self._layer, x, rotation, cp, dropout, rows, hidden)

    def _layer(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        rows: TokenRows | None,
        hidden: tuple[StreamDropout, StreamDropout] | None,
        layer_pass: Pass,
    ) -> Tensor | Mixed:
        of_mixer, of_mlp = hidden or (None, None)
        attended = self.memory.mixer(self._attend, layer_pass, x, rotation, cp, dropout)
        mixer = self.mixer
        added = self.tp.leave(mixer.output(attended), mixer.out.local_bias())
        if normalized := hidden is None and self._adds_and_normalizes():
            assert self.mlp_norm is not None
            stream, read = self.mlp_norm(x, added)
        else:
            stream = self._add(x, added, self.attention_post_norm, of_mixer)
            read = x if self.is_parallel else stream
        if isinstance(self.mlp, ExpertMixture):
            mix = self.mlp if normalized else self._mix
            added, *more = self.memory.mixture(mix, layer_pass, read, rows)
            stream = self._add(stream, added, self.mlp_post_norm, of_mlp)
            return stream if rows is None else Mixed(stream, *more)
        if normalized:
            added = self._feed_normalized(read, False)
        else:
            # A norm's gradient needs what it normalized, so a recomputation must run the MLP.
            last = layer_pass if self.mlp_post_norm is None else Pass()
            added = self.memory.mlp(self._feed_forward, read, self.mlp_weights, last)
        return self._add(stream, added, self.mlp_post_norm, of_mlp)

    def _add(
        self, x: Tensor, added: Tensor, norm: Norm | None, dropout: StreamDropout | None
    ) -> Tensor:
        """Adds what a block computed to the residual stream."""
        if norm is not None:
            added = norm(added)
        if self.multiplier != 1.0:
            added = added * self.multiplier
        return x + (added if dropout is None else dropout(added))

    def _adds_and_normalizes(self) -> bool:
        """Whether the MLP's norm reads the bare sum of the stream and what the mixer adds, and is
        not computed again without that sum."""
        bare = self.attention_post_norm is None and self.multiplier == 1.0
        return bare and self.mlp_norm is not None and self.memory.keeps_mlp

    def _attend(
        self,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptMixer | None,
    ) -> Tensor:
        """Residual stream -> [b, s, heads/tp, value head dim]."""
        h = x if self.attention_norm is None else self.attention_norm(x)
        heads = self.mixer.project(self.memory.entered(h), rotation)
        return self.mixer.attend(*heads, cp=cp, dropout=dropout, kept=kept)

    def _mix(self, x: Tensor, rows: TokenRows | None, kept: KeptRouting | None) -> Mixed:
        """Residual stream -> what the mixture of experts adds to it, and to the loss."""
        norm = self.attention_norm if self.is_parallel else self.mlp_norm
        mixed: Mixed = self.mlp(x if norm is None else norm(x), rows, kept)
        return mixed

    def _feed_forward(self, x: Tensor, gradient_only: bool) -> Tensor:
        """Residual stream -> what the MLP adds to it."""
        norm = self.attention_norm if self.is_parallel else self.mlp_norm
        # The rows of a tile are not contiguous, and every linear layer would copy them.
        return self._feed_normalized(x.contiguous() if norm is None else norm(x), gradient_only)

    def _feed_normalized(self, h: Tensor, gradient_only: bool) -> Tensor:
        """What the MLP reads -> what it adds to the residual stream."""
        assert isinstance(self.mlp, MLP)
        factors = products(self.memory.entered(h), *self.mlp.inputs)
        h = self.mlp(*factors, gradient_only=gradient_only)
        return self.tp.leave(h, self.mlp.down.local_bias(), gradient_only=gradient_only)
