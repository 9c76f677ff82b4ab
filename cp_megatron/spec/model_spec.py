"""The whole model: its layers and its ends.

The modules are built from this description, parameters and FLOPs are counted from it, memory is
predicted from it, and checkpoints and Hugging Face tensors take their names from it. So none of
them can disagree with another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from cp_megatron.config import ModelConfig, ParallelConfig
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import STAGE
from cp_megatron.spec.experts import ExpertMixtureSpec
from cp_megatron.spec.layer_spec import LayerSpec, attention_of
from cp_megatron.spec.mixer import LocalHeads
from cp_megatron.spec.parameter import BlockSpec, ParameterSpec
from cp_megatron.spec.pieces import EmbeddingSpec, HeadSpec, NormSpec, PositionsSpec

_LAYERS = "layers."


@dataclass(frozen=True, kw_only=True)
class ModelSpec(BlockSpec):
    """A transformer.

    Attributes:
        positions: the table of learned positions, if there is one.
        norm: the norm after the last layer.
        dropout: the probability of the dropout after the embedding, and of what blocks add.
    """

    embedding: EmbeddingSpec
    positions: PositionsSpec | None
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    head: HeadSpec
    dropout: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig, *, vocab_size: int, seq_length: int) -> ModelSpec:
        """The model that the flags describe.

        Args:
            model: the flags.
            vocab_size: number of ids, with or without padding.
            seq_length: number of learned positions, unless the flags give it.
        """
        rows = model.max_position_embeddings or seq_length
        hidden, padded = model.hidden_size, model.padded_vocab_size(vocab_size)
        table = {"vocab_size": vocab_size, "padded_vocab": padded, "width": hidden}
        learned = model.position_embedding_type == "learned_absolute"
        return cls(
            embedding=EmbeddingSpec(**table, multiplier=model.embedding_multiplier),
            positions=PositionsSpec(rows=rows, width=hidden) if learned else None,
            layers=tuple(LayerSpec.of(model, layer=i) for i in range(model.num_layers)),
            norm=NormSpec.of(model),
            head=HeadSpec(
                **table,
                tied=not model.untie_embeddings_and_output_weights,
                multiplier=model.logit_multiplier,
                softcap=model.final_logit_softcapping,
            ),
            dropout=model.hidden_dropout,
        )

    def ends(self) -> Iterator[ParameterSpec]:
        """The parameters outside of the layers."""
        yield from replace(self, layers=()).parameters()

    def check_split(self, axis: str, size: int) -> None:
        """Checks that ``size`` ranks of ``axis`` can share every parameter.

        Raises:
            ConfigError: one of them cannot be divided.
        """
        for parameter in self.parameters():
            parameter.check_split(axis, size)

    def num_parameters(self) -> int:
        """Parameters of the whole model, each counted once."""
        return sum(parameter.numel * copies for parameter, copies in self._distinct())

    def num_active_parameters(self) -> int:
        """Those that compute a token: of experts, only as many as a token has."""
        mixtures = [x.mlp for x in self.layers if isinstance(x.mlp, ExpertMixtureSpec)]
        idle = 0
        for mixture in mixtures:
            count = mixture.experts.num_experts
            stored = sum(parameter.numel for parameter in mixture.experts.parameters())
            idle += stored // count * (count - mixture.experts.topk)
        return self.num_parameters() - idle

    def num_tensors(self) -> int:
        """Parameter tensors of the whole model."""
        return sum(copies for _, copies in self._distinct())

    def hidden_matrices(self) -> Iterator[tuple[ParameterSpec, int]]:
        """The matrices inside layers, which Muon updates, with the numbers of their copies."""
        for parameter, copies in self._distinct():
            if is_hidden_matrix(parameter.name, parameter.shape):
                yield parameter, copies

    def parameters_on_rank(
        self,
        grid: Grid,
        rank: int,
        parameters: Iterable[tuple[ParameterSpec, int]] | None = None,
    ) -> int:
        """Parameters that ``rank`` stores: its part over tp or ep, sharded over its replica.

        FSDP2 cuts dim 0 into pieces of equal, rounded-up size, so the last ranks may hold less.

        Args:
            grid, rank: the grid, and a rank of it.
            parameters: those to count, with the numbers of their copies; None counts all.
        """
        total, sizes = 0, grid.sizes | {"ep": grid.ep}
        for parameter, copies in self._distinct() if parameters is None else parameters:
            shards, shard = grid.shards, grid.shard(rank)
            if parameter.stacked:
                shards, shard = grid.size("edp"), grid.index("edp", rank)
            shape = list(parameter.local_shape(sizes))
            rows = shape.pop(parameter.shard_dim(shards))
            piece = -(-rows // shards)
            total += min(piece, max(0, rows - shard * piece)) * math.prod(shape) * copies
        return total

    def _distinct(self) -> Iterator[tuple[ParameterSpec, int]]:
        """Every parameter with the number of its copies; layers that are alike are listed once."""
        for parameter in self.ends():
            yield parameter, 1
        for layer, copies in Counter(self.layers).items():
            for parameter in layer.parameters():
                yield replace(parameter, name=f"{_LAYERS}{parameter.name}"), copies


def is_hidden_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is a matrix between two hidden layers.

    So the embedding, the positions and the output layer are none, nor are vectors, stacked ones
    included, and convolutions.

    Args:
        name: its name in the whole model.
        shape: its global shape.
    """
    return name.startswith(_LAYERS) and len(shape) == 2 and not name.endswith("_bias")


def is_sharded(model: ModelConfig, grid: Grid, *, offloads: bool) -> bool:
    """Whether FSDP holds the parameters: they are divided otherwise than over tp, or ``offloads``
    to the host. Experts are divided over all ranks of a stage."""
    shares_experts = bool(model.expert_layers) and grid.size(STAGE) > 1
    return grid.size("dp_cp") > 1 or shares_experts or offloads


def keeps_whole_weights(parallel: ParallelConfig, grid: Grid) -> bool:
    """Whether FSDP gathers weights and reduces gradients once in a step, and keeps both whole in
    between; otherwise it does so for each micro batch."""
    if parallel.fsdp_reshard == "auto":
        return grid.pp > 1  # several micro batches are in flight
    return parallel.fsdp_reshard == "never"


def local_heads(model: ModelConfig, tp: int) -> LocalHeads:
    """The heads of one of ``tp`` tensor parallel ranks, the same in all layers that attend."""
    return attention_of(model, layer=0).local_heads(tp)
