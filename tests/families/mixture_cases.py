"""Tiny mixtures of experts of all Hugging Face families that have them; see ``cases.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.case import (
    FULL,
    LATENT_WIDTHS,
    LINEAR_ATTENTION,
    RECURRENCE,
    RMS,
    SLIDING,
    TIED,
    Case,
    rope,
    yarn,
)

CHOICE = {"num_experts_per_tok": 3, "moe_intermediate_size": 20}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
LATENT = {
    **CHOICE,
    **LATENT_WIDTHS,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
RECURRENT = {
    **RECURRENCE,
    "head_dim": 12,
    "num_experts": 8,
    "shared_expert_intermediate_size": 28,
    **CHOICE,
}
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.45,
}


def case(name: str, *, one_plus: bool = False, **options: Any) -> Case:
    return Case(name=name, options={**RMS, **options}, one_plus=one_plus)


MIXTURES: Mapping[str, Case] = {
    "qwen3_moe": case(
        "Qwen3Moe",
        **TIED,
        **CHOICE,
        **rope("linear", factor=2.5),
        num_experts=8,
        norm_topk_prob=True,
        head_dim=12,
        attention_bias=True,
        mlp_only_layers=[1],
        use_sliding_window=True,
        sliding_window=5,
    ),
    "qwen3_moe, weights as they are": case(
        "Qwen3Moe", **CHOICE, num_experts=8, decoder_sparse_step=2, num_hidden_layers=4
    ),
    "mixtral": case("Mixtral", **TIED, **LOCAL, **yarn(), head_dim=12, sliding_window=7),
    "mixtral, no window": case("Mixtral", num_local_experts=4, **rope()),
    "gpt_oss": case(
        "GptOss",
        **TIED,
        **LOCAL,
        **yarn(truncate=False),
        head_dim=12,
        sliding_window=5,
        swiglu_limit=1.5,
        layer_types=[FULL, SLIDING, FULL],
    ),
    "gpt_oss, no biases of attention": case(
        "GptOss", **LOCAL, **rope(), head_dim=12, sliding_window=6, attention_bias=False
    ),
    "qwen3_next, experts": case(
        "Qwen3Next",
        one_plus=True,
        **RECURRENT,
        **rope(partial_rotary_factor=0.5),
        layer_types=[LINEAR_ATTENTION, FULL, FULL],
        norm_topk_prob=False,
        mlp_only_layers=[0],
    ),
    "qwen3_5_moe_text": Case(
        name="Qwen3_5MoeText",
        model_class="Qwen3_5MoeForCausalLM",
        options={
            **RMS,
            **TIED,
            **RECURRENT,
            **rope("linear", factor=2.5, partial_rotary_factor=0.5),
            "attention_bias": True,
            "num_key_value_heads": 4,
            "layer_types": [FULL, LINEAR_ATTENTION, FULL],
        },
        one_plus=True,
    ),
    "deepseek_v2, groups of experts": case(
        "DeepseekV2", **LATENT, topk_method="group_limited_greedy", n_group=4, topk_group=2
    ),
    "deepseek_v2, the best of all": case("DeepseekV2", **{**LATENT, "q_lora_rank": None}),
    "deepseek_v3, groups of experts": case(
        "DeepseekV3", **LATENT, n_group=4, topk_group=2, num_mtp_layers=0
    ),
    # Moonlight
    "deepseek_v3, no groups": case(
        "DeepseekV3",
        **{**LATENT, "q_lora_rank": None},
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        num_mtp_layers=0,
    ),
    "glm4_moe": case(
        "Glm4Moe",
        **TIED,
        **CHOICE,
        **rope(partial_rotary_factor=0.75),
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.7,
        first_k_dense_replace=2,
        num_mtp_layers=0,
    ),
    "glm4_moe, no norms of heads": case(
        "Glm4Moe", **CHOICE, head_dim=16, n_routed_experts=8, norm_topk_prob=False, num_mtp_layers=0
    ),
    "olmoe": case(
        "Olmoe",
        **TIED,
        **rope("linear", factor=2.5),
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=True,
        attention_bias=True,
    ),
    "olmoe, weights as they are": case("Olmoe", num_experts=8, num_experts_per_tok=3),
    "granitemoe": case(
        "GraniteMoe",
        **TIED,
        **LOCAL,
        **GRANITE,
        **rope("linear", factor=2.5),
        attention_bias=True,
    ),
    "granitemoe, no biases": case("GraniteMoe", **LOCAL, **GRANITE),
    "granitemoehybrid, experts": case(
        "GraniteMoeHybrid",
        **LOCAL,
        **GRANITE,
        shared_intermediate_size=28,
        layer_types=[FULL] * 3,
        mamba_n_heads=4,
    ),
}
