"""Tensor parallelism: weights split over ranks, activations moved by explicit collectives."""

from cp_megatron.tensor_parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
    padded_vocab_size,
)
from cp_megatron.tensor_parallel.linear import (
    ColumnParallelLinear,
    ReplicatedColumnLinear,
    RowParallelLinear,
)
from cp_megatron.tensor_parallel.loss import vocab_parallel_cross_entropy
from cp_megatron.tensor_parallel.parameters import (
    ParameterSpec,
    SpecifiedModule,
    TensorParallel,
    local_weight,
    named_specs,
    place,
)

__all__ = [
    "ColumnParallelLinear",
    "ParameterSpec",
    "ReplicatedColumnLinear",
    "RowParallelLinear",
    "SpecifiedModule",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "local_weight",
    "named_specs",
    "padded_vocab_size",
    "place",
    "vocab_parallel_cross_entropy",
]
