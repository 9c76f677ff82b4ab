"""Tensor parallelism: weights split over ranks, activations moved by explicit collectives."""

from cp_megatron.kernels.logit_transform import LogitTransform
from cp_megatron.tensor_parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from cp_megatron.tensor_parallel.fused_loss import LossRule, vocab_parallel_fused_loss
from cp_megatron.tensor_parallel.group import TensorParallel
from cp_megatron.tensor_parallel.head_norms import AllHeadsNorm, EachHeadNorm
from cp_megatron.tensor_parallel.linear import (
    ColumnParallelLinear,
    Entered,
    RowParallelLinear,
    products,
)
from cp_megatron.tensor_parallel.local_unit import attach_units
from cp_megatron.tensor_parallel.loss import vocab_parallel_cross_entropy
from cp_megatron.tensor_parallel.placement import (
    LocalWeights,
    SpecifiedModule,
    local_weight,
    named_specs,
    place,
    place_stacked,
    shared_unit,
)

__all__ = [
    "AllHeadsNorm",
    "ColumnParallelLinear",
    "EachHeadNorm",
    "Entered",
    "LocalWeights",
    "LogitTransform",
    "LossRule",
    "RowParallelLinear",
    "SpecifiedModule",
    "TensorParallel",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "attach_units",
    "local_weight",
    "named_specs",
    "place",
    "place_stacked",
    "products",
    "shared_unit",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_fused_loss",
]
