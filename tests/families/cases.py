"""Tiny models of all Hugging Face families, with every optional field off its default.

A family has one ``Case`` or more, which together give each field of its config class a value that
is not the default (``test_cases.py`` says which fields are left out). The name of the first case is
the family's model type; further names have a comma and a remark after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.families.case import (
    BOTH_BIASES,
    DYNAMIC,
    FULL,
    LATENT_WIDTHS,
    LAYER_NORM,
    LINEAR,
    LINEAR_ATTENTION,
    LLAMA3,
    RECURRENCE,
    RMS,
    SIZES,
    SLIDING,
    TIED,
    UNTIED,
    Case,
    longrope,
    rope,
    yarn,
)
from tests.families.mixture_cases import MIXTURES


def gemma(name: str, model_class: str, **options: Any) -> Case:
    shared = {"head_dim": 12, "query_pre_attn_scalar": 7, "attention_bias": True}
    shared |= {"final_logit_softcapping": 4.0, "sliding_window": 5, **RMS}
    return Case(name=name, model_class=model_class, options={**shared, **options}, one_plus=True)


def gpt2(**options: Any) -> Case:
    return Case(
        name="GPT2",
        model_class="GPT2LMHeadModel",
        sizes={
            **{key: value for key, value in SIZES.items() if key.endswith(("vocab_size", "_id"))},
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
        },
        options={"n_inner": 48, "layer_norm_epsilon": 0.03, **options},
    )


TWO_BASES = {
    "rope_parameters": {
        FULL: {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.5},
        SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    }
}
YARN_ON_FULL = {
    "rope_parameters": {
        FULL: yarn(attention_factor=1.3)["rope_parameters"],
        SLIDING: {"rope_type": "default", "rope_theta": 500.0},
    }
}
MINISTRAL_YARN = yarn(
    original_max_position_embeddings=12, mscale=0.9, mscale_all_dim=0.5, llama_4_scaling_beta=0.4
)
GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.45,
}
DENSE_HYBRID = {
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 48,
    "layer_types": [FULL] * 3,
    "mamba_n_heads": 4,
}
LATENT = {
    **LATENT_WIDTHS,
    "first_k_dense_replace": 4,
    "attention_bias": True,
}

RECURRENT = {
    **RECURRENCE,
    "head_dim": 12,
}


def qwen3_next(**options: Any) -> Case:
    return Case(
        name="Qwen3Next",
        options={**RMS, **RECURRENT, "num_experts": 0, **options},
        one_plus=True,
        inert=("mlp_only_layers", "decoder_sparse_step", "full_attention_interval"),
    )


def qwen3_5(inert: tuple[str, ...] = (), **options: Any) -> Case:
    return Case(
        name="Qwen3_5Text",
        model_class="Qwen3_5ForCausalLM",
        options={**RMS, **RECURRENT, **options},
        one_plus=True,
        inert=inert,
    )


CASES: Mapping[str, Case] = {
    "llama": Case(
        name="Llama",
        options={**RMS, **TIED, **BOTH_BIASES, **LLAMA3, "head_dim": 12},
    ),
    "llama, attention biases": Case(
        name="Llama", options={**RMS, **LINEAR, "attention_bias": True, "num_key_value_heads": 1}
    ),
    "llama, mlp biases": Case(
        name="Llama", options={**RMS, **DYNAMIC, "mlp_bias": True, "head_dim": 8}
    ),
    "llama, longrope": Case(
        name="Llama", options={**RMS, **longrope(4, 32)}, inert=("long_factor",)
    ),
    "mistral": Case(
        name="Mistral",
        options={**RMS, **TIED, **yarn(truncate=False), "sliding_window": 7, "head_dim": 12},
    ),
    "mistral, no window": Case(name="Mistral", options={**RMS, **rope(), "sliding_window": None}),
    "qwen2": Case(
        name="Qwen2",
        options={
            **RMS,
            **TIED,
            **yarn(mscale=0.9, mscale_all_dim=0.5),
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
        },
    ),
    "qwen2, window everywhere": Case(
        name="Qwen2",
        options={"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0},
    ),
    "qwen3": Case(
        name="Qwen3",
        options={
            **RMS,
            **TIED,
            **LINEAR,
            "head_dim": 12,
            "attention_bias": True,
            "max_window_layers": 5,
            "use_sliding_window": True,
            "sliding_window": 4,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
    ),
    "qwen3, dynamic, one kv head": Case(
        name="Qwen3", options={**DYNAMIC, "head_dim": 12, "num_key_value_heads": 1}
    ),
    "gpt2": gpt2(**UNTIED),
    "gpt2, tied": gpt2(),
    "gemma": Case(
        name="Gemma",
        options={**RMS, **UNTIED, **LINEAR, "head_dim": 12, "attention_bias": True},
        one_plus=True,
    ),
    "gemma, tied": Case(name="Gemma", options={**RMS, "head_dim": 12}, one_plus=True),
    "gemma2": gemma(
        "Gemma2",
        "Gemma2ForCausalLM",
        **UNTIED,
        **rope(),
        attn_logit_softcapping=3.0,
        layer_types=[FULL, SLIDING, SLIDING],
    ),
    "gemma2, tied": gemma("Gemma2", "Gemma2ForCausalLM", attention_bias=False),
    "gemma3_text": gemma(
        "Gemma3Text",
        "Gemma3ForCausalLM",
        **UNTIED,
        **TWO_BASES,
        layer_types=[FULL, SLIDING, FULL],
    ),
    "gemma3_text, tied": gemma(
        "Gemma3Text",
        "Gemma3ForCausalLM",
        attention_bias=False,
        final_logit_softcapping=None,
        layer_types=[SLIDING, FULL, SLIDING],
    ),
    "phi3": Case(
        name="Phi3",
        options={
            **RMS,
            **TIED,
            **longrope(3, 16, partial_rotary_factor=0.75),
            "original_max_position_embeddings": 16,
            "sliding_window": 7,
        },
        inert=("short_factor", "partial_rotary_factor"),
    ),
    "phi3, no window": Case(name="Phi3", options=rope()),
    "olmo2": Case(name="Olmo2", options={**RMS, **TIED, **yarn(), "attention_bias": True}),
    "olmo2, no biases": Case(name="Olmo2", options={**RMS, "num_key_value_heads": 4}),
    "olmo3": Case(
        name="Olmo3",
        options={
            **RMS,
            **TIED,
            **YARN_ON_FULL,
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": [FULL, SLIDING, SLIDING],
        },
    ),
    "olmo3, no biases": Case(
        name="Olmo3", options={"num_hidden_layers": 4, "sliding_window": 6, **RMS}
    ),
    "smollm3": Case(
        name="SmolLM3",
        options={
            **RMS,
            **UNTIED,
            **BOTH_BIASES,
            **LINEAR,
            "use_sliding_window": True,
            "sliding_window": 5,
            "no_rope_layers": [1, 0, 1],
            "layer_types": [SLIDING, FULL, FULL],
        },
        inert=("1.self_attn.k_proj.bias", "no_rope_layer_interval"),
    ),
    "smollm3, interval": Case(
        name="SmolLM3",
        options={**RMS, **yarn(), "attention_bias": True, "no_rope_layer_interval": 2},
        inert=("1.self_attn.k_proj.bias",),
    ),
    "granite": Case(name="Granite", options={**RMS, **TIED, **BOTH_BIASES, **LINEAR, **GRANITE}),
    "granite, attention biases": Case(
        name="Granite", options={**RMS, **GRANITE, **rope(), "attention_bias": True}
    ),
    "granitemoehybrid": Case(
        name="GraniteMoeHybrid",
        options={
            **RMS,
            **TIED,
            **GRANITE,
            **DENSE_HYBRID,
            **LINEAR,
            "attention_bias": True,
            "position_embedding_type": "rope",
        },
    ),
    "granitemoehybrid, no positions": Case(
        name="GraniteMoeHybrid",
        options={**RMS, **GRANITE, **DENSE_HYBRID},
    ),
    "glm": Case(
        name="Glm",
        options={
            **RMS,
            **TIED,
            **rope(partial_rotary_factor=0.75),
            "head_dim": 16,
            "attention_bias": False,
        },
    ),
    "glm, biases": Case(name="Glm", options={**RMS, "head_dim": 16, "num_key_value_heads": 4}),
    "glm4": Case(
        name="Glm4",
        options={
            **RMS,
            **TIED,
            **rope(partial_rotary_factor=0.75),
            "head_dim": 16,
            "attention_bias": False,
        },
    ),
    "glm4, biases": Case(name="Glm4", options={**RMS, "head_dim": 16, "num_key_value_heads": 4}),
    "cohere": Case(
        name="Cohere",
        options={
            **LAYER_NORM,
            **UNTIED,
            **LINEAR,
            "logit_scale": 0.6,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "cohere, tied": Case(name="Cohere", options={**LAYER_NORM, "logit_scale": 1.5}),
    "cohere2": Case(
        name="Cohere2",
        options={
            **LAYER_NORM,
            **UNTIED,
            **LINEAR,
            "logit_scale": 0.6,
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": [FULL, SLIDING, SLIDING],
        },
        inert=("0.self_attn.k_proj.bias",),
    ),
    "cohere2, tied": Case(
        name="Cohere2",
        options={**LAYER_NORM, "num_hidden_layers": 4, "sliding_window": 6},
    ),
    "stablelm": Case(
        name="StableLm",
        options={
            **LAYER_NORM,
            **TIED,
            **rope("linear", factor=2.5, partial_rotary_factor=0.5),
            "use_qkv_bias": True,
            "qk_layernorm": True,
            "use_parallel_residual": True,
        },
    ),
    "stablelm, in order": Case(
        name="StableLm",
        options={**LAYER_NORM, **rope(partial_rotary_factor=0.75), "qk_layernorm": True},
    ),
    "internlm3": Case(
        name="InternLM3",
        model_class="LlamaForCausalLM",
        options={
            **RMS,
            **TIED,
            **DYNAMIC,
            "qkv_bias": True,
            "bias": True,
            "head_dim": 12,
            "num_key_value_heads": 1,
        },
    ),
    "ministral": Case(
        name="Ministral",
        options={
            **RMS,
            **TIED,
            **LINEAR,
            "head_dim": 12,
            "sliding_window": 5,
            "layer_types": [SLIDING, FULL, SLIDING],
        },
    ),
    "ministral3": Case(
        name="Ministral3",
        options={
            **RMS,
            **TIED,
            **MINISTRAL_YARN,
            "head_dim": 12,
            "sliding_window": 15,
        },
    ),
    "exaone4": Case(
        name="Exaone4",
        options={
            **RMS,
            **TIED,
            **LLAMA3,
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "sliding_window_pattern": 2,
        },
        inert=("sliding_window_pattern",),
    ),
    "exaone4, layer types": Case(
        name="Exaone4",
        options={**RMS, "sliding_window": 6, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "exaone4, no window": Case(
        name="Exaone4", options={**RMS, "sliding_window": None, "layer_types": [FULL] * 3}
    ),
    "deepseek_v2": Case(
        name="DeepseekV2",
        options={**RMS, **TIED, **LATENT, **yarn(mscale=0.9, mscale_all_dim=0.5), "mlp_bias": True},
    ),
    "deepseek_v2, whole queries": Case(
        name="DeepseekV2",
        options={**RMS, **LATENT, "q_lora_rank": None, "attention_bias": False},
    ),
    "deepseek_v3": Case(
        name="DeepseekV3",
        options={
            **RMS,
            **TIED,
            **LATENT,
            **yarn(mscale=0.9, mscale_all_dim=0.5),
            "rope_interleave": False,
            "num_nextn_predict_layers": 0,
        },
    ),
    "deepseek_v3, whole queries": Case(
        name="DeepseekV3",
        options={
            **RMS,
            **LATENT,
            "q_lora_rank": None,
            "attention_bias": False,
            "num_nextn_predict_layers": 0,
        },
    ),
    "qwen3_next": qwen3_next(
        **TIED,
        **rope("linear", factor=2.5, partial_rotary_factor=0.5),
        attention_bias=True,
        layer_types=[LINEAR_ATTENTION, FULL, LINEAR_ATTENTION],
        mlp_only_layers=[0, 2],
        decoder_sparse_step=2,
    ),
    "qwen3_next, every second": qwen3_next(
        **rope(partial_rotary_factor=0.5),
        full_attention_interval=2,
        linear_num_key_heads=1,
        num_key_value_heads=1,
    ),
    "qwen3_5_text": qwen3_5(
        **TIED,
        **rope("linear", factor=2.5, partial_rotary_factor=0.5),
        attention_bias=True,
        layer_types=[FULL, LINEAR_ATTENTION, LINEAR_ATTENTION],
    ),
    "qwen3_5_text, recurrences only": qwen3_5(
        **rope(partial_rotary_factor=0.5),
        num_hidden_layers=2,
        layer_types=[LINEAR_ATTENTION] * 2,
        linear_num_key_heads=2,
        inert=("rope_theta", "partial_rotary_factor"),
    ),
    **MIXTURES,
}
