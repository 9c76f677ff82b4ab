"""The transformer: pre-norm blocks, GPT style or Llama style by configuration alone.

Every function here computes with the tokens one rank holds. What crosses ranks is visible:
``tp.enter`` / ``tp.leave`` around each block (tensor and sequence parallelism) and
``cp.attention`` (context parallelism); everything else is local.

Shapes: b batch, s sequence of one context parallel rank, h hidden, v padded vocabulary. The
residual stream is [b, s, h]; with sequence parallelism [b, s/tp, h].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Replicate
from torch.func import functional_call

from cp_megatron.comm.rng import attention_dropout_seed
from cp_megatron.config.schema import MemoryConfig, ModelConfig, Recompute
from cp_megatron.context_parallel import ContextParallel, KeptAttention
from cp_megatron.errors import ConfigError
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.model.attention import SelfAttention
from cp_megatron.model.mlp import MLP
from cp_megatron.model.norm import make_norm
from cp_megatron.model.offload import LayerOffload
from cp_megatron.model.recompute import Pass, recomputed
from cp_megatron.model.rope import Rotation
from cp_megatron.model.tiles import in_tiles
from cp_megatron.tensor_parallel import (
    LossRule,
    ParameterSpec,
    RowParallelLinear,
    SpecifiedModule,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    entered,
)


class LearnedPositions(SpecifiedModule):
    """A learned vector per position, added to the residual stream."""

    def __init__(self, rows: int, hidden_size: int, *, partial_gradient: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, hidden_size))
        self.specs = {
            "weight": ParameterSpec(placement=Replicate(), init="normal", partial=partial_gradient)
        }

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [s] (or [s/tp]) -> [s, h]."""
        return F.embedding(positions, self.local("weight"))


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); dropout on what is added.

    Args:
        config: the model.
        tp: the group that shares every weight.
        memory: what is kept of this layer; its granularity is this layer's own.
        offload: where full recomputation keeps the layer's input; None is where it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        tp: TensorParallel,
        memory: MemoryConfig,
        offload: LayerOffload | None = None,
    ) -> None:
        super().__init__()
        self.tp = tp
        self.recompute = memory.recompute_granularity
        self.tile_size = memory.mlp_tile_size
        self.offload = offload
        bias = not config.disable_bias_linear
        down = RowParallelLinear(config.ffn_size, config.hidden_size, bias=bias, tp=tp)
        self.attention_norm = make_norm(config, partial_gradient=tp.splits_sequence)
        self.attention = SelfAttention(config, tp=tp)
        self.mlp_norm = make_norm(config, partial_gradient=tp.splits_sequence)
        self.mlp = MLP(config, down=down)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, rotation: Rotation | None, cp: ContextParallel, dropout: Dropout | None
    ) -> Tensor:
        """Residual stream -> residual stream; ``dropout`` is of attention weights."""
        # Inside the module's forward, so that FSDP has gathered the weights when it runs again.
        if self._recomputes("full"):
            hooks = None if self.offload is None else self.offload.hooks()
            return recomputed(self._block, x, rotation, cp, dropout, hooks=hooks)
        return self._block(None, x, rotation, cp, dropout)

    def _block(
        self,
        which: Pass | None,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
    ) -> Tensor:
        if self._recomputes("selective"):
            attended = recomputed(self._attend, x, rotation, cp, dropout, KeptAttention())
        else:
            attended = self._attend(None, x, rotation, cp, dropout, None)
        x = x + self.dropout(self.attention.output(attended))
        return x + self.dropout(self._mlp(which, x))

    def _attend(
        self,
        _: Pass | None,
        x: Tensor,
        rotation: Rotation | None,
        cp: ContextParallel,
        dropout: Dropout | None,
        kept: KeptAttention | None,
    ) -> Tensor:
        """Residual stream -> [b, s, heads/tp, head dim]."""
        project = partial(self.attention.project, rotation=rotation)
        q, k, v = self._entered(project, self.attention_norm(x))
        return cp.attention(q, k, v, dropout=dropout, kept=kept)

    def _mlp(self, which: Pass | None, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream, whole or in tiles."""
        if self.tile_size is not None:
            return in_tiles(
                self._mlp_tile,
                x,
                (*self.mlp_norm.locals().values(), *self.mlp.locals().values()),
                rows=self.tp.rows(self.tile_size, x.shape[0]),
                recompute=self._recomputes("selective", "full"),
                forgotten=which is not None and which.again,
            )
        if self._recomputes("selective"):
            return recomputed(self._mlp_whole, x)
        return self._mlp_whole(None, x)

    def _mlp_whole(self, _: Pass | None, x: Tensor) -> Tensor:
        return self._entered(lambda whole: (self.mlp(whole),), self.mlp_norm(x))[0]

    def _entered(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor
    ) -> tuple[Tensor, ...]:
        """``function(tp.enter(x))``; what is recomputed anyway is gathered once for backward."""
        if self._recomputes("selective", "full"):
            return function(self.tp.enter(x))
        return entered(function, x, self.tp)

    def _recomputes(self, *levels: Recompute) -> bool:
        """Whether this layer is recomputed so; nothing is where nothing is differentiated."""
        return self.recompute in levels and torch.is_grad_enabled()

    def _mlp_tile(self, x: Tensor, weights: Sequence[Tensor], forgotten: bool) -> Tensor:
        """The same with given weights, those of the norm first."""
        given = iter(weights)
        x = _called(self.mlp_norm, given, x)
        return self._entered(lambda whole: (_called(self.mlp, given, whole, forgotten),), x)[0]


class Transformer(nn.Module):
    """Layers [first_layer, last_layer) of the model; the embedding and the head at its ends.

    Built with global shapes (usually under ``torch.device("meta")``); parameter names do not
    depend on the grid or on the range of layers.

    Args:
        config: the model.
        seq_length: tokens of a whole row, the default number of learned positions.
        vocab_size: ids the data can hold; padded to ``config.make_vocab_size_divisible_by``.
        tp: the group that shares every weight; None is one rank.
        sequence_parallel: split the residual stream over the tp group as well.
        memory: what is kept for backward, where, and how much of a sequence is in work at once; by
            default all is kept.
        first_layer, last_layer: the range; the embedding is there when it starts at 0 and the
            head when it ends at ``config.num_layers`` (None).

    Raises:
        ConfigError: heads, vocabulary or ffn do not divide over tp, learned positions are fewer
            than the sequence is long, or tied weights would be on two pipeline stages.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seq_length: int,
        vocab_size: int,
        tp: ProcessGroup | None,
        sequence_parallel: bool,
        memory: MemoryConfig | None = None,
        first_layer: int = 0,
        last_layer: int | None = None,
    ) -> None:
        super().__init__()
        last_layer = config.num_layers if last_layer is None else last_layer
        memory = memory or MemoryConfig()
        assert 0 <= first_layer < last_layer <= config.num_layers
        self.config = config
        self.tp = TensorParallel(group=tp, sequence_parallel=sequence_parallel)
        padded_vocab = config.padded_vocab_size(vocab_size)
        positions = config.max_position_embeddings or seq_length
        tied = not config.untie_embeddings_and_output_weights
        has_embedding, has_head = first_layer == 0, last_layer == config.num_layers
        _check(config, self.tp, seq_length, positions, padded_vocab)
        if tied and has_head and not has_embedding:
            raise ConfigError(
                "--untie-embeddings-and-output-weights",
                False,
                "the embedding and the output layer are on different pipeline stages",
                "True",
            )

        vocabulary = vocab_size, padded_vocab, config.hidden_size
        self.embedding = VocabParallelEmbedding(*vocabulary, tp=self.tp) if has_embedding else None
        self.positions = (
            LearnedPositions(
                positions, config.hidden_size, partial_gradient=self.tp.splits_sequence
            )
            if has_embedding and config.position_embedding_type == "learned_absolute"
            else None
        )
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.offload = LayerOffload() if memory.cpu_offloading else None
        # Keyed by the number in the whole model, so that a stage's names are the model's.
        self.layers = nn.ModuleDict(
            {
                str(i): TransformerLayer(
                    config, tp=self.tp, memory=_of_layer(memory, i), offload=self.offload
                )
                for i in range(first_layer, last_layer)
            }
        )
        self.norm = (
            make_norm(config, partial_gradient=self.tp.splits_sequence) if has_head else None
        )
        self.head = VocabParallelHead(*vocabulary, tied=tied, tp=self.tp) if has_head else None

    def forward(
        self,
        x: Tensor,
        *,
        cp: ContextParallel,
        attention_dropout: Dropout | None = None,
        labels: Tensor | None = None,
        rule: LossRule | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tokens -> logits or losses, or what the range of layers makes of them.

        Args:
            x: int64 tokens [b, s] of this rank's shard, or where there is no embedding the
                residual stream that the layer before returned.
            cp: the context parallelism of this batch: which positions the tokens have, and the
                attention across ranks. Where only some layers have the window, its mask has none.
            attention_dropout: with the run's seed and the number of this rank's first query head;
                every layer draws a mask of its own. Needed to train where the model has it.
            labels: int64 [b, s], -100 where there is none: the head gives losses, and the logits
                of all tokens never exist.
            rule: of those losses; None is the plain rule.

        Returns:
            Without labels logits [b, s, v/tp] in the compute dtype, -inf for the vocabulary's
            padding; with labels the sum to train and the tokens' losses [b, s], as
            ``vocab_parallel_fused_loss`` has them; where there is no head, the residual stream.
        """
        asked = self.config.attention_dropout if self.training else 0.0
        assert asked == (attention_dropout.probability if attention_dropout else 0.0)
        positions = cp.document_positions.to(x.device)  # [s]
        if self.embedding is not None:
            x = self._embed(x, positions)
        rotation = None
        if self.config.position_embedding_type == "rope":
            rotation = Rotation.of_model(
                positions, self.config, longest=max(cp.mask.lengths), dtype=x.dtype
            )
        for number, layer in self.layers.items():
            context = layer_context(cp, self.config, int(number))
            x = layer(x, rotation, context, _dropout_of_layer(attention_dropout, int(number)))
        if self.head is None or self.norm is None:
            return x
        tied = None if self.embedding is None or self.head.weight is not None else self.embedding
        weight = None if tied is None else tied.weight
        if labels is None:
            return self.head(self.norm(x), weight)
        return self.head.losses(self.norm(x), labels, rule or LossRule(), weight)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[b, s] -> residual stream."""
        assert self.embedding is not None
        if self.tp.splits_sequence:
            assert tokens.shape[1] % self.tp.size == 0, "sequence parallelism needs s % tp == 0"
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(self.tp.own_rows(positions))
        return self.dropout(x)


def layer_context(cp: ContextParallel, config: ModelConfig, layer: int) -> ContextParallel:
    """What a layer attends with: the batch's context, or one on the same layout with its window."""
    return cp if config.window_layers is None else cp.within(config.layer_window(layer))


def _of_layer(memory: MemoryConfig, layer: int) -> MemoryConfig:
    """What is kept of a layer: the first ``recompute_num_layers`` alone are recomputed."""
    if memory.recompute_num_layers is None or layer < memory.recompute_num_layers:
        return memory
    return replace(memory, recompute_granularity="none")


def _called(module: SpecifiedModule | MLP, weights: Iterator[Tensor], *args: object) -> Tensor:
    """The module's result with the next of ``weights`` in place of its parameters."""
    given = {name: next(weights) for name, _ in module.named_parameters()}
    result: Tensor = functional_call(module, given, args)
    return result


def _dropout_of_layer(dropout: Dropout | None, layer: int) -> Dropout | None:
    if dropout is None:
        return None
    return replace(dropout, seed=attention_dropout_seed(seed=dropout.seed, layer=layer))


def _check(
    config: ModelConfig, tp: TensorParallel, seq_length: int, positions: int, padded_vocab: int
) -> None:
    learned = config.position_embedding_type == "learned_absolute"
    if learned and positions < seq_length:
        raise ConfigError(
            "--max-position-embeddings",
            positions,
            f"must be at least the sequence length {seq_length}",
            str(seq_length),
        )
    if config.position_embedding_type == "rope" and config.head_dim % 2:
        raise ConfigError(
            "--kv-channels",
            config.head_dim,
            "must be even for rotary positions",
            str(config.head_dim + 1),
        )
    if padded_vocab % tp.size:
        raise ConfigError(
            "--make-vocab-size-divisible-by",
            config.make_vocab_size_divisible_by,
            f"the padded vocabulary {padded_vocab} must be divisible by the tensor parallel size "
            f"{tp.size}",
            str(math.lcm(config.make_vocab_size_divisible_by, tp.size)),
        )
    if config.ffn_size % tp.size:
        raise ConfigError(
            "--ffn-hidden-size",
            config.ffn_size,
            f"must be divisible by the tensor parallel size {tp.size}",
            str(-(-config.ffn_size // tp.size) * tp.size),
        )
