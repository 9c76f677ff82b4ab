"""Describes a model as data, without torch: parameters, how they are split, and their costs."""

from cp_megatron.spec.layer_spec import LayerSpec, MLPSpec
from cp_megatron.spec.mixer import AttentionSpec, local_heads
from cp_megatron.spec.model_spec import ModelSpec
from cp_megatron.spec.parameter import BlockSpec, Init, ParameterSpec
from cp_megatron.spec.pieces import EmbeddingSpec, HeadSpec, LinearSpec, NormSpec, PositionsSpec
from cp_megatron.spec.sizes import ActivationSizes

__all__ = [
    "ActivationSizes",
    "AttentionSpec",
    "BlockSpec",
    "EmbeddingSpec",
    "HeadSpec",
    "Init",
    "LayerSpec",
    "LinearSpec",
    "MLPSpec",
    "ModelSpec",
    "NormSpec",
    "ParameterSpec",
    "PositionsSpec",
    "local_heads",
]
