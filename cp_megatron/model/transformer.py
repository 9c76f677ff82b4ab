"""The transformer: the embedding, the layers that ``ModelSpec`` describes, and the head.

Shapes: b batch, s sequence of one context parallel rank, h hidden, v padded vocabulary. The
residual stream is [b, s, h]; with sequence parallelism [b, s/tp, h].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cp_megatron.comm.host_copies import to_device
from cp_megatron.comm.rng import attention_dropout_seed, hidden_dropout_seed
from cp_megatron.config.schema import MemoryConfig, ModelConfig
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.errors import ConfigError
from cp_megatron.expert_parallel import ExpertParallel
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.stream_dropout import StreamDropout
from cp_megatron.model.expert_mixture import Mixed
from cp_megatron.model.layer import TransformerLayer
from cp_megatron.model.layer_memory import LayerMemory
from cp_megatron.model.norm import Norm
from cp_megatron.model.offload import LayerOffload
from cp_megatron.model.rope import Rotation
from cp_megatron.model.row_counts import TokenRows
from cp_megatron.plan.stages import Chunk
from cp_megatron.spec import ExpertMixtureSpec, ModelSpec, RotarySpec
from cp_megatron.tensor_parallel import (
    LossRule,
    SpecifiedModule,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
)

_Rotations = WeakKeyDictionary[ContextParallel, dict[tuple[object, ...], list[Rotation | None]]]


class LearnedPositions(SpecifiedModule):
    """A learned vector per position, added to the residual stream."""

    def forward(self, positions: Tensor) -> Tensor:
        """int64 [s] (or [s/tp]) -> [s, h]."""
        return F.embedding(positions, self.local("weight"))


class ExpertReport(NamedTuple):
    """What this rank's experts did in one pass.

    Attributes:
        terms: [2], what the imbalance and the z-loss add to the loss, summed over the layers of the
            pass and this rank's counted tokens; with a gradient.
        counts: int64 [layers with experts, E], how many tokens chose each expert; 0 in layers of
            the model that do not belong to the pass.
    """

    terms: Tensor
    counts: Tensor


class Transformer(nn.Module):
    """The layers of a model, or the chunks of them that one pipeline stage has.

    It is built with global shapes (usually under ``torch.device("meta")``); parameter names depend
    neither on the grid nor on the chunks. If embedding and head share their weight and are on
    different stages, both hold it, and the sum of their gradients is left to the caller.

    Args:
        config: the model.
        seq_length: tokens of a whole row, the default number of learned positions.
        vocab_size: number of ids in the data; padded to ``config.make_vocab_size_divisible_by``.
        tp: the group that shares every weight; None is one rank.
        sequence_parallel: split the residual stream over the tp group as well.
        memory: what is kept for backward, where, and how much of a sequence is computed at once;
            by default everything is kept.
        experts: the groups of mixtures of experts; by default one rank.
        chunks: those of this rank's stage, in order; by default one with the whole model.

    Attributes:
        spec: the description of the whole model, from which its modules are built.
        copies_embedding: an earlier stage has the embedding's weight as well.

    Raises:
        ConfigError: tp ranks cannot share a parameter, or tokens of experts are not divided over
            tp.
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
        experts: ExpertParallel | None = None,
        chunks: Sequence[Chunk] | None = None,
    ) -> None:
        super().__init__()
        self.chunks = tuple(chunks or [Chunk(range(config.num_layers), True, True)])
        memory = memory or MemoryConfig()
        self.config = config
        self.tp = TensorParallel(group=tp, sequence_parallel=sequence_parallel)
        self.spec = spec = ModelSpec.of(config, vocab_size=vocab_size, seq_length=seq_length)
        _check(spec, self.tp)
        is_first = any(chunk.has_embedding for chunk in self.chunks)
        is_last = any(chunk.has_head for chunk in self.chunks)
        self.copies_embedding = is_last and spec.head.tied and not is_first

        self.embedding: VocabParallelEmbedding | None = None
        if is_first or self.copies_embedding:
            self.embedding = VocabParallelEmbedding(spec.embedding, tp=self.tp)
        table = spec.positions if is_first else None
        self.positions = None if table is None else LearnedPositions(table, tp=self.tp)
        self.offload: LayerOffload | None = None
        if memory.cpu_offloading:  # a layer's input and, if they are kept, attention's out and lse
            self.offload = LayerOffload(per_layer=3 if memory.recompute_keeps_attention else 1)
        # Keyed by the number in the whole model, so that the names on a stage are the model's.
        self.layers = nn.ModuleDict()
        for i in chain.from_iterable(chunk.layers for chunk in self.chunks):
            attends = spec.layers[i].attention is not None
            strategy = LayerMemory.of(memory, i, attends=attends, tp=self.tp, offload=self.offload)
            layer = TransformerLayer(spec.layers[i], memory=strategy, experts=experts)
            self.layers[str(i)] = layer
        self._kept_rotations: _Rotations = WeakKeyDictionary()
        self.norm = Norm(spec.norm, tp=self.tp) if is_last else None
        self.head = VocabParallelHead(spec.head, tp=self.tp) if is_last else None

    def forward(
        self,
        x: Tensor,
        *,
        cp: ContextParallel,
        attention_dropout: Dropout | None = None,
        hidden_dropout: Dropout | None = None,
        labels: Tensor | None = None,
        rule: LossRule | None = None,
        rows: TokenRows | None = None,
        chunk: int = 0,
    ) -> Tensor | tuple[Tensor | ExpertReport, ...]:
        """Tokens -> logits or losses, or from a chunk without the head the residual stream.

        Args:
            x: int64 tokens [b, s] of this rank's shard; for a chunk without the embedding, the
                residual stream that the chunk before returned.
            cp: the context parallelism of this batch: which positions the tokens have, and the
                attention across ranks. If only some layers have a window, its mask has none.
            attention_dropout: with the run's seed and the number of this rank's first query head;
                every layer draws a mask of its own. Needed to train if the model has dropout of
                attention weights.
            hidden_dropout: with the run's seed; every place draws a mask of its own. Needed to
                train if the model has dropout of the residual stream.
            labels: int64 [b, s], -100 marks a token without a label. With labels the head returns
                losses, and the logits of all tokens never exist.
            rule: how the losses are computed; None is the plain rule.
            rows: the rows of ``x``, with labels in a model with experts.
            chunk: the number of the chunk.

        Returns:
            Without labels, logits [b, s, v/tp] in the compute dtype, -inf for the vocabulary's
            padding; with labels, the sum to train and the tokens' losses [b, s], as in
            ``vocab_parallel_fused_loss``, and with ``rows`` what the experts did, whose terms are
            not in that sum: it is divided by the number of labels, they by that of the counted
            tokens. From a chunk without the head, the residual stream, and with ``rows`` what the
            experts did.
        """
        part = self.chunks[chunk]
        self._check_dropout(attention_dropout, hidden_dropout)
        stream = None if hidden_dropout is None else self._stream_dropout(hidden_dropout, cp, x)
        if part.has_embedding:
            x = self._embed(x, cp, stream)
        rotations = self._rotations(cp, x)
        contexts = self.layer_contexts(cp)
        own = None if rows is None else self._own(rows)
        mixed = list[Mixed]()
        for number in part.layers:
            dropout = None if attention_dropout is None else _of_layer(attention_dropout, number)
            hidden = None if stream is None else stream.in_layer(number)
            layer = self.layers[str(number)]
            out = layer(x, rotations[number], contexts[number], dropout, own, hidden)
            x = out.stream if isinstance(out, Mixed) else out
            mixed += [out] if isinstance(out, Mixed) else []
        report = () if rows is None else (self._report(mixed, part, x.device),)
        if not part.has_head:
            return (x, *report) if report else x
        assert self.head is not None
        assert self.norm is not None
        weight = None
        if self.spec.head.tied:
            assert self.embedding is not None
            weight = self.embedding.weight
        # Hooks of the modules gather their weights, so the loss is computed in the head's forward.
        if labels is None:
            return self.head(self.norm(x), weight)
        return (*self.head(self.norm(x), weight, labels, rule), *report)

    def _report(self, mixed: Sequence[Mixed], part: Chunk, device: torch.device) -> ExpertReport:
        """Adds up what the experts of a chunk did."""
        terms = torch.zeros(2, device=device)
        found = [layer.terms for layer in mixed if layer.terms is not None]
        if found:
            terms = torch.stack(found).sum(0)
        layers = self.config.expert_layers
        shape = len(layers), self.config.num_experts or 0
        counts = torch.zeros(shape, dtype=torch.int64, device=device)
        own = [number for number, layer in enumerate(layers) if layer in part.layers]
        if own:  # they are neighbours
            chosen = [layer.counts for layer in mixed if layer.counts is not None]
            counts[own[0] : own[-1] + 1] = torch.stack(chosen)
        return ExpertReport(terms, counts)

    def _check_dropout(self, *given: Dropout | None) -> None:
        wanted = self.config.attention_dropout, self.config.hidden_dropout
        for probability, dropout in zip(wanted, given, strict=True):
            expected = probability if self.training else 0.0
            assert expected == (dropout.probability if dropout else 0.0)

    def _stream_dropout(self, dropout: Dropout, cp: ContextParallel, x: Tensor) -> StreamDropout:
        """That of the embedding of ``x``, for the tokens of this rank's residual stream."""
        dropout = replace(dropout, seed=hidden_dropout_seed(seed=dropout.seed))
        positions = self.tp.own_rows(to_device(cp.positions, x.device))
        return StreamDropout.of(dropout, positions, x.shape[0])

    def _own(self, rows: TokenRows) -> TokenRows:
        """The rows of the tokens of this rank's residual stream, [b, s] -> [b * r]."""
        numbers = rows.numbers
        if self.tp.splits_sequence:
            numbers = numbers.chunk(self.tp.size, 1)[self.tp.rank]
        return replace(rows, numbers=numbers.flatten())

    def prepare(self, cp: ContextParallel) -> float:
        """Lets ``cp`` plan all layers ahead of time; another thread may do so.

        Returns:
            the attended pairs of a query and a key of the whole row; the mean of the layers that
            attend.
        """
        _ = cp.document_positions  # computed here once; ``cp`` keeps them
        contexts, pairs = self.layer_contexts(cp), Counter[ContextParallel]()
        for number, layer in self.layers.items():
            assert isinstance(layer, TransformerLayer)
            layer.mixer.prepare(contexts[int(number)])
        for context, spec in zip(contexts, self.spec.layers, strict=True):
            pairs[context] += spec.attention is not None
        total = sum(context.mask.pairs() * layers for context, layers in pairs.items())
        return total / max(1, pairs.total())

    def layer_contexts(self, cp: ContextParallel) -> list[ContextParallel]:
        """The context that each layer of the whole model attends with.

        If layers have different windows, these are contexts on the layout of ``cp`` with the
        layers' windows; otherwise ``cp`` itself, whose mask has the window.
        """
        windows = [layer.mixer.window for layer in self.spec.layers]
        if len(set(windows)) == 1:
            return [cp] * len(windows)
        return [cp.within(window) for window in windows]

    def _positions(self, cp: ContextParallel, device: torch.device) -> Tensor:
        """The positions of this rank's tokens in their documents, int64 [s] on the device."""
        return to_device(cp.document_positions, device)

    def _rotations(self, cp: ContextParallel, x: Tensor) -> list[Rotation | None]:
        """The rotation of each layer of the whole model; layers that rotate alike share one.

        They depend on ``cp`` and on the type and device of the residual stream, and are kept for
        the next pass under the same ``cp``.
        """
        kept = self._kept_rotations.setdefault(cp, {})
        # What is made in inference mode cannot be used for training.
        key = x.dtype, x.device, torch.is_inference_mode_enabled()
        if key not in kept:
            kept[key] = self._make_rotations(self._positions(cp, x.device), cp, x.dtype)
        return kept[key]

    def _make_rotations(
        self, positions: Tensor, cp: ContextParallel, dtype: torch.dtype
    ) -> list[Rotation | None]:
        longest, made = max(cp.mask.lengths), dict[RotarySpec | None, Rotation]()
        wanted = [layer.mixer.rotary for layer in self.spec.layers]
        for rotary in set(wanted) - {None}:
            assert rotary is not None
            made[rotary] = Rotation.of(positions, self.config, rotary, longest=longest, dtype=dtype)
        return [made.get(rotary) for rotary in wanted]

    def _embed(self, tokens: Tensor, cp: ContextParallel, dropout: StreamDropout | None) -> Tensor:
        """[b, s] -> residual stream."""
        assert self.embedding is not None
        if self.tp.splits_sequence:
            assert tokens.shape[1] % self.tp.size == 0, "sequence parallelism needs s % tp == 0"
        x = self.embedding(tokens)
        if self.positions is not None:
            positions = self._positions(cp, tokens.device)
            x = x + self.positions(self.tp.own_rows(positions))
        return x if dropout is None else dropout(x)


def _of_layer(dropout: Dropout, layer: int) -> Dropout:
    """The dropout of a layer's attention weights."""
    return replace(dropout, seed=attention_dropout_seed(seed=dropout.seed, layer=layer))


def _check(spec: ModelSpec, tp: TensorParallel) -> None:
    """Refuses what the modules cannot compute; ``Transformer`` says what."""
    spec.check_split("tp", tp.size)
    has_experts = any(isinstance(layer.mlp, ExpertMixtureSpec) for layer in spec.layers)
    if has_experts and tp.size > 1 and not tp.sequence_parallel:
        rule = "experts with tensor parallelism need the sequence divided over its ranks"
        raise ConfigError("--sequence-parallel", False, rule, "True")
