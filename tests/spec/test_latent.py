"""Latent attention has its own default factor of the scores, and its own epsilon of norms."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.spec import LatentAttentionSpec, NormSpec

DEEPSEEK = ModelConfig(
    multi_latent_attention=True,
    position_embedding_type="rope",
    rope_type="yarn",
    rope_scaling_factor=40.0,
    mscale_all_dim=1.0,
    qk_layernorm=True,
    norm_epsilon=1e-5,
)
"""Heads of 128 + 64 channels, and a context that grows 40 times, as in DeepSeek-V3."""


def test_scores_grow_with_the_square_of_the_factor_of_yarn() -> None:
    # m = 0.1 ln 40 + 1 = 1.368888; m^2 / sqrt(192) = 1.873854 / 13.856406
    assert DEEPSEEK.score_scale == pytest.approx(0.135234, rel=1e-5)
    for other in (
        replace(DEEPSEEK, mscale_all_dim=None),
        replace(DEEPSEEK, rope_type="linear"),
        replace(DEEPSEEK, rope_scaling_factor=1.0),
    ):
        assert other.score_scale == 192**-0.5
    plain = replace(DEEPSEEK, multi_latent_attention=False, kv_channels=192)
    assert plain.score_scale == 192**-0.5
    assert replace(DEEPSEEK, softmax_scale=0.5).score_scale == 0.5


def test_norms_of_latents_may_have_an_epsilon_of_their_own() -> None:
    model = replace(DEEPSEEK, q_lora_rank=24)

    def epsilons(model: ModelConfig) -> list[float]:
        spec = LatentAttentionSpec.of(model)
        return [norm.epsilon for norm in (spec.query_down_norm, spec.latent_norm) if norm]

    assert epsilons(model) == [1e-5, 1e-5]
    assert epsilons(replace(model, latent_norm_epsilon=1e-6)) == [1e-6, 1e-6]
    assert epsilons(replace(model, latent_norm_epsilon=0.0)) == [0.0, 0.0]
    assert epsilons(replace(model, q_lora_rank=None)) == [1e-5]
    assert NormSpec.of(replace(model, latent_norm_epsilon=1e-6)).epsilon == 1e-5
