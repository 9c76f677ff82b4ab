"""The transformer, its initial weights, and how it is spread over a grid."""

from cp_megatron.model.parallelize import ComputeDType, build_model
from cp_megatron.model.transformer import Transformer

__all__ = ["ComputeDType", "Transformer", "build_model"]
