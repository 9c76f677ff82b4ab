"""The transformer, its initial weights, and how it is spread over a grid."""

from cp_megatron.model.parallelize import build_model
from cp_megatron.model.transformer import Transformer

__all__ = ["Transformer", "build_model"]
