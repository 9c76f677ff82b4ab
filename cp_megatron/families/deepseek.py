"""DeepSeek V2 and V3: latent attention (``spec/latent.py``), dense layers, then experts.

``first_k_dense_replace`` is the number of dense layers before those with experts. Moonlight is a
DeepSeek V3 without groups of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_DENSE = "first_k_dense_replace"
_LATENT_EPSILON = 1e-6  # transformers' norms of latents do not read rms_norm_eps
_DEFAULTS: Mapping[str, Any] = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_COUNT = "n_routed_experts"
_SHARED = "n_shared_experts"
# Keys that have no effect in layers without experts.
_EXPERTS = (
    *("moe_layer_freq", _SHARED, "norm_topk_prob", "routed_scaling_factor"),
    *("n_group", "topk_group", "topk_method", "scoring_func"),
)


def read_experts(fields: JsonFields, *, num_scores: int | None) -> dict[str, Any]:
    """Reads what DeepSeek V2, V3 and GLM-4.5 share about experts.

    Args:
        fields: config.json.
        num_scores: how many of its best scores rank a group of experts; None: there are no groups.
    """
    layers, dense = fields.size("num_hidden_layers"), fields.get(_DENSE)
    if type(dense) is not int or dense < 0:
        raise fields.wrong(_DENSE, "but must be the number of dense layers before those of experts")
    for name in _EXPERTS:
        fields.get(name)
    read = mixture.read_experts(fields, range(dense, layers), count=(_COUNT,))
    if not read:
        return {}
    fields.only("moe_layer_freq", 1, why="every layer after the dense ones has experts")
    if num_scores is not None:
        read |= mixture.read_groups(
            fields, read["num_experts"], read["moe_router_topk"], num_scores=num_scores
        )
    return {
        **read,
        "moe_router_topk_scaling_factor": fields.number("routed_scaling_factor", 1.0),
        "moe_shared_expert_intermediate_size": read["moe_ffn_hidden_size"] * fields.size(_SHARED),
    }


def read_sigmoid_experts(fields: JsonFields) -> dict[str, Any]:
    """Reads the experts of DeepSeek V3 and GLM-4.5, which have sigmoid scores and biases."""
    read = read_experts(fields, num_scores=2)
    fields.get("num_nextn_predict_layers")  # transformers does not read these layers, either
    if not read:
        return {}
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    return {
        **read,
        "moe_router_score_function": "sigmoid",
        "moe_router_norm_topk_prob": fields.switch("norm_topk_prob"),
        "moe_router_enable_expert_bias": True,
    }


def _read_softmax_experts(fields: JsonFields) -> dict[str, Any]:
    """Reads the experts of DeepSeek V2, the best of all or of the best groups."""
    is_limited = fields.get("topk_method") == "group_limited_greedy"
    read = read_experts(fields, num_scores=1 if is_limited else None)
    if not read:
        return {}
    fields.only("topk_method", "greedy", "group_limited_greedy")
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", False, why="transformers does not read it in DeepSeek V2")
    why = "it has none in experts, but in dense layers"
    fields.only("mlp_bias", False, why=why)
    return {**read, "moe_router_pre_softmax": True}


def write_experts(model: ModelConfig) -> dict[str, Any]:
    """Writes what ``read_experts`` reads."""
    layers = model.expert_layers
    dense = layers[0] if layers else model.num_layers
    entries = {_DENSE: dense}
    if not layers:
        return entries
    shared = (model.moe_shared_expert_intermediate_size or 0) // model.expert_size
    return {
        **entries,
        **mixture.write_experts(model, count=_COUNT),
        _SHARED: shared,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        "norm_topk_prob": model.moe_router_norm_topk_prob,
    }


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    heads = fields.size("num_attention_heads")
    unrotated, rotated = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    fields.only("head_dim", rotated, why="transformers stores qk_rope_head_dim there")
    fields.only("qk_head_dim", unrotated + rotated)
    fields.only("num_key_value_heads", heads, why="every query head has keys of its own")
    if rotated % 2:
        raise fields.wrong("qk_rope_head_dim", "but must be even, because rope rotates pairs")
    has_query_latent = fields.get("q_lora_rank") is not None
    return llama_like.read(
        fields,
        multi_latent_attention=True,
        q_lora_rank=fields.size("q_lora_rank") if has_query_latent else None,
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_head_dim=unrotated,
        qk_pos_emb_head_dim=rotated,
        v_head_dim=fields.size("v_head_dim"),
        kv_channels=None,
        qk_layernorm=True,
        latent_norm_epsilon=_LATENT_EPSILON,
        **flags,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest),
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_head_dim,
        "qk_rope_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.value_dim,
        "head_dim": model.qk_pos_emb_head_dim,
        "attention_bias": model.has_qkv_bias,
        **write_experts(model),
    }


def _modules(model: ModelConfig) -> dict[str, str]:
    attention, ours = "model.layers.{}.self_attn", "layers.{}.attention"
    modules = {
        theirs: name
        for theirs, name in llama_like.MODULES.items()
        if not theirs.startswith(attention)
    }
    modules |= {**mixture.ROUTER, **mixture.EXPERT_BIAS, **mixture.EXPERTS}
    return modules | {
        **mixture.shared_names("shared_experts"),
        f"{attention}.q_a_proj": f"{ours}.query_down",
        f"{attention}.q_a_layernorm": f"{ours}.query_down_norm",
        f"{attention}.{'q_b_proj' if model.q_lora_rank else 'q_proj'}": f"{ours}.query",
        f"{attention}.kv_a_proj_with_mqa": f"{ours}.latent {ours}.rotary_key",
        f"{attention}.kv_a_layernorm": f"{ours}.latent_norm",
        f"{attention}.kv_b_proj": f"{ours}.key_value",
        f"{attention}.o_proj": f"{ours}.out",
    }


def _method(model: ModelConfig) -> str:
    return "group_limited_greedy" if model.moe_router_num_groups else "greedy"


DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    read=lambda fields: _read(
        fields,
        rotary_interleaved=fields.switch("rope_interleave", True),
        **llama_like.read_biases(fields, mlp=None),
        **read_sigmoid_experts(fields),
    ),
    write=lambda model, longest: {
        **_write(model, longest),
        "rope_interleave": model.rotary_interleaved,
        "num_nextn_predict_layers": 0,
        **({"scoring_func": "sigmoid", "topk_method": "noaux_tc"} if model.num_experts else {}),
    },
    modules=_modules,
    other_names=mixture.STACKED,
    defaults={
        **_DEFAULTS,
        _DENSE: 3,
        "n_shared_experts": 1,
        _COUNT: 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
    },
    # transformers does not read the layer that predicts further tokens, either.
    buffers=r"model\.layers\.(\d+\.self_attn\.rotary_emb\.inv_freq|61\..*)",
)
DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    read=lambda fields: _read(
        fields,
        rotary_interleaved=True,
        **llama_like.read_biases(fields),
        **_read_softmax_experts(fields),
    ),
    write=lambda model, longest: {
        **_write(model, longest),
        "mlp_bias": model.has_mlp_bias,
        **({"norm_topk_prob": False, "topk_method": _method(model)} if model.num_experts else {}),
    },
    modules=_modules,
    other_names=mixture.STACKED,
    defaults={
        **_DEFAULTS,
        _DENSE: 0,
        "n_shared_experts": 2,
        _COUNT: 64,
        "moe_intermediate_size": 1407,
        "topk_method": "greedy",
    },
    heads_divide_hidden_size=True,
)
