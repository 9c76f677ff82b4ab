"""Describes a model as data, without torch: parameters, how they are split, and their costs."""

from cp_megatron.spec.dense_mlp import MLPSpec
from cp_megatron.spec.experts import (
    BalanceSpec,
    ExpertMixtureSpec,
    ExpertsSpec,
    RouterSpec,
    RoutingSpec,
)
from cp_megatron.spec.latent import LatentAttentionSpec
from cp_megatron.spec.layer_spec import LayerSpec
from cp_megatron.spec.linear_attention import ConvolutionSpec, DecaySpec, LinearAttentionSpec
from cp_megatron.spec.mixer import AttentionSpec, LocalHeads, MixerSpec, RotarySpec
from cp_megatron.spec.model_spec import (
    ModelSpec,
    is_hidden_matrix,
    is_sharded,
    keeps_whole_weights,
    local_heads,
)
from cp_megatron.spec.parameter import BlockSpec, Init, ParameterSpec
from cp_megatron.spec.pieces import (
    EmbeddingSpec,
    HeadNormSpec,
    HeadSpec,
    LinearSpec,
    NormSpec,
    PositionsSpec,
)
from cp_megatron.spec.sizes import ActivationSizes, KeptStates
from cp_megatron.spec.stage_weights import StageWeights, stage_weights

__all__ = [
    "ActivationSizes",
    "AttentionSpec",
    "BalanceSpec",
    "BlockSpec",
    "ConvolutionSpec",
    "DecaySpec",
    "EmbeddingSpec",
    "ExpertMixtureSpec",
    "ExpertsSpec",
    "HeadNormSpec",
    "HeadSpec",
    "Init",
    "KeptStates",
    "LatentAttentionSpec",
    "LayerSpec",
    "LinearAttentionSpec",
    "LinearSpec",
    "LocalHeads",
    "MLPSpec",
    "MixerSpec",
    "ModelSpec",
    "NormSpec",
    "ParameterSpec",
    "PositionsSpec",
    "RotarySpec",
    "RouterSpec",
    "RoutingSpec",
    "StageWeights",
    "is_hidden_matrix",
    "is_sharded",
    "keeps_whole_weights",
    "local_heads",
    "stage_weights",
]
