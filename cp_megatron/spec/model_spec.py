"""The whole model: its layers and its ends.

The modules are built from this description, parameters and FLOPs are counted from it, memory is
predicted from it, and checkpoints and Hugging Face tensors take their names from it. So none of
them can disagree with another.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from cp_megatron.config import Config, ModelConfig
from cp_megatron.plan import Grid
from cp_megatron.plan.grid import STAGE
from cp_megatron.plan.stages import Chunk, Stages
from cp_megatron.spec.experts import ExpertMixtureSpec
from cp_megatron.spec.layer_spec import LayerSpec, attention_of
from cp_megatron.spec.mixer import LocalHeads
from cp_megatron.spec.parameter import BlockSpec, ParameterSpec
from cp_megatron.spec.pieces import EmbeddingSpec, HeadSpec, NormSpec, PositionsSpec

_LAYERS = "layers."
SMALL_MODEL = 1 << 27  # parameters, whose weights and gradients take a GiB in float32


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

    def ends(self, chunks: Sequence[Chunk] | None = None) -> Iterator[ParameterSpec]:
        """The parameters outside of the layers: all, or those that a stage with these chunks holds.

        If embedding and head share a table, the stage of the head holds a copy.
        """
        chunks = self._whole() if chunks is None else chunks
        is_first = any(chunk.has_embedding for chunk in chunks)
        is_last = any(chunk.has_head for chunk in chunks)
        held = {"embedding": is_first or (is_last and self.head.tied), "positions": is_first}
        for parameter in replace(self, layers=()).parameters():
            if held.get(parameter.name.split(".")[0], is_last):
                yield parameter

    def check_split(self, axis: str, size: int) -> None:
        """Checks that ``size`` ranks of ``axis`` can share every parameter.

        Raises:
            ConfigError: one of them cannot be divided.
        """
        for parameter in self.parameters():
            parameter.check_split(axis, size)

    def num_parameters(self) -> int:
        """Parameters of the whole model, each counted once."""
        return sum(parameter.numel * copies for parameter, copies in self.held())

    def num_active_parameters(self) -> int:
        """Those that compute a token: of experts, only as many as a token has."""
        mixtures = [x.mlp for x in self.layers if isinstance(x.mlp, ExpertMixtureSpec)]
        idle = 0
        for mixture in mixtures:
            count = mixture.experts.num_experts
            stored = sum(parameter.numel for parameter in mixture.experts.parameters())
            idle += stored // count * (count - mixture.experts.topk)
        return self.num_parameters() - idle

    def held(self, chunks: Sequence[Chunk] | None = None) -> Iterator[tuple[ParameterSpec, int]]:
        """Every parameter that a stage with these chunks holds (None: the whole model), with the
        number of its copies; layers that are alike are listed once."""
        chunks = self._whole() if chunks is None else chunks
        for parameter in self.ends(chunks):
            yield parameter, 1
        layers = (self.layers[number] for chunk in chunks for number in chunk.layers)
        for layer, copies in Counter(layers).items():
            for parameter in layer.parameters():
                yield replace(parameter, name=f"{_LAYERS}{parameter.name}"), copies

    def parameters_on_rank(
        self,
        grid: Grid,
        rank: int,
        stages: Stages | None = None,
        *,
        wanted: Callable[[ParameterSpec], bool] = lambda _: True,
    ) -> int:
        """Parameters that ``rank`` stores: its part over tp or ep of its stage's parameters,
        sharded over its replica.

        FSDP2 cuts dim 0 into pieces of equal, rounded-up size, so the last ranks may hold less.

        Args:
            grid, rank: the grid, and a rank of it.
            stages: the layers of each stage; needed if there are several.
            wanted: whether to count a parameter.
        """
        assert grid.pp == (1 if stages is None else stages.num_stages)
        chunks = None if stages is None else stages.of(grid.coordinates(rank).pp)
        total, sizes = 0, grid.sizes | {"ep": grid.ep}
        for parameter, copies in self.held(chunks):
            if not wanted(parameter):
                continue
            shards, shard = grid.shards, grid.shard(rank)
            if parameter.stacked:
                shards, shard = grid.size("edp"), grid.index("edp", rank)
            shape = list(parameter.local_shape(sizes))
            rows = shape.pop(parameter.shard_dim(shards))
            piece = -(-rows // shards)
            total += min(piece, max(0, rows - shard * piece)) * math.prod(shape) * copies
        return total

    def _whole(self) -> tuple[Chunk, ...]:
        return (Chunk(range(len(self.layers)), has_embedding=True, has_head=True),)


def is_hidden_matrix(parameter: ParameterSpec) -> bool:
    """Whether a parameter is a matrix between two hidden layers, or a stack of such.

    So the embedding, the positions and the output layer are none, nor are vectors, stacked ones
    included, and convolutions.

    Args:
        parameter: with its name in the whole model.
    """
    dims = len(parameter.shape) - parameter.stacked
    return parameter.name.startswith(_LAYERS) and dims == 2


def is_sharded(model: ModelConfig, grid: Grid, *, offloads: bool) -> bool:
    """Whether FSDP holds the parameters: they are divided otherwise than over tp, or ``offloads``
    to the host. Experts are divided over all ranks of a stage."""
    shares_experts = bool(model.expert_layers) and grid.size(STAGE) > 1
    return grid.size("dp_cp") > 1 or shares_experts or offloads


def keeps_whole_weights(config: Config, grid: Grid, spec: ModelSpec) -> bool:
    """Whether FSDP gathers weights and reduces gradients once in a step, and keeps both whole in
    between; otherwise it does so for each micro batch."""
    if config.parallel.fsdp_reshard != "auto":
        return config.parallel.fsdp_reshard == "never"
    if grid.pp > 1:  # several micro batches are in flight
        return True
    return spec.num_parameters() <= SMALL_MODEL and not config.memory.optimizer_cpu_offload


def local_heads(model: ModelConfig, tp: int) -> LocalHeads:
    """The heads of one of ``tp`` tensor parallel ranks, the same in all layers that attend."""
    return attention_of(model, layer=0).local_heads(tp)
