"""Tensor parallelism: weights split over ranks, activations moved by explicit collectives."""

from cp_megatron.tensor_parallel.embedding import (
    VocabParallelEmbedding,
    VocabParallelHead,
)
from cp_megatron.tensor_parallel.fused_loss import LossRule, vocab_parallel_fused_loss
from cp_megatron.tensor_parallel.linear import (
    ColumnParallelLinear,
    ReplicatedColumnLinear,
    RowParallelLinear,
)
from cp_megatron.tensor_parallel.loss import accumulation_dtype, vocab_parallel_cross_entropy
from cp_megatron.tensor_parallel.parameters import (
    Init,
    ParameterSpec,
    SpecifiedModule,
    TensorParallel,
    local_weight,
    named_specs,
    place,
)
from cp_megatron.tensor_parallel.regather import entered

__all__ = [
    "ColumnParallelLinear",
    "Init",
    "LossRule",
    "ParameterSpec",
    "ReplicatedColumnLinear",
    "RowParallelLinear",
    "SpecifiedModule",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "accumulation_dtype",
    "entered",
    "local_weight",
    "named_specs",
    "place",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_fused_loss",
]
