"""Describes the model for the start table, without what Llama or GPT-2 have too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cp_megatron.config import ModelConfig

_SIDES: Mapping[str, str] = {"pre": "", "post": " after blocks", "both": " around blocks"}
_HEAD_NORMS: Mapping[str, str] = {
    "head": "norms of heads",
    "each_head": "a norm for each head",
    "all_heads": "norms of all heads together",
}


def heads_of(model: ModelConfig) -> str:
    """The number of heads, their widths, and what they share."""
    heads = f"{model.num_attention_heads} heads of {model.head_dim}"
    if model.value_dim != model.head_dim:
        heads += f" (values {model.value_dim})"
    if model.multi_latent_attention:
        heads += f" from latents of {model.kv_lora_rank}"
    elif model.num_kv_heads != model.num_attention_heads:
        heads += f" in {model.num_kv_heads} groups"
    return heads


def recurrences_of(model: ModelConfig) -> Iterator[str]:
    """The layers that do not attend, and their heads."""
    if layers := len(model.linear_layers):
        dims = f"{model.linear_key_head_dim} x {model.linear_value_head_dim}"
        heads = f"{model.linear_num_value_heads} heads of {dims}"
        if model.linear_num_key_heads != model.linear_num_value_heads:
            heads += f" in {model.linear_num_key_heads} groups"
        yield f"{layers} of {model.num_layers} layers are gated DeltaNets ({heads})"


def norms_of(model: ModelConfig) -> Iterator[str]:
    """The kind and the places of norms."""
    yield f"{model.normalization}{_SIDES[model.norm_placement]}"
    if model.qk_layernorm:
        latent = model.multi_latent_attention
        yield "norms of latents" if latent else _HEAD_NORMS[model.qk_norm_scope]


def positions_of(model: ModelConfig) -> str:
    """How positions enter the model."""
    kind: str = model.position_embedding_type
    if kind != "rope":
        return kind
    words = []
    if model.rope_type != "default":
        factor = f" x {model.rope_scaling_factor:g}" if model.rope_scaling_factor else ""
        words.append(f"{model.rope_type}{factor}")
    if model.rotary_dim != model.head_dim:
        words.append(f"{model.rotary_dim} channels of a head")
    if model.window_rotary_base is not None:
        words.append(f"base {model.window_rotary_base:g} in windows")
    if model.no_rope_layers:
        words.append(f"not in {len(set(model.no_rope_layers))} of {model.num_layers} layers")
    if model.query_temperature_beta:
        words.append(f"temperature {model.query_temperature_beta:g}")
    return f"rope ({', '.join(words)})" if words else "rope"


def mlp_of(model: ModelConfig) -> str:
    """The activation of the MLP, its width, and whether it runs beside attention."""
    gates = {"SwiGLU": model.swiglu, "GEGLU": model.geglu, "quick GEGLU": model.quick_geglu}
    kind = next((name for name, has in gates.items() if has), "GELU")
    beside = " beside attention" if model.parallel_residual else ""
    width = f" {model.ffn_size}" if len(model.expert_layers) < model.num_layers else ""
    if (bound := model.activation_func_clamp_value) is not None:
        width += f" clamped at {bound:g}"
    return f"{kind}{width}{beside}"


def experts_of(model: ModelConfig) -> Iterator[str]:
    """The number of experts and their widths, and how a token chooses from them."""
    if model.num_experts is None:
        return
    words = [f"{model.num_experts} experts of {model.expert_size}, {model.moe_router_topk} a token"]
    if (shared := model.moe_shared_expert_intermediate_size) is not None:
        gated = "gated " if model.moe_shared_expert_gate else ""
        words.append(f"a {gated}shared one of {shared}")
    if (layers := len(model.expert_layers)) < model.num_layers:
        words.append(f"in {layers} of {model.num_layers} layers")
    yield ", ".join(words)
    yield ", ".join(_routing_of(model))


def _routing_of(model: ModelConfig) -> Iterator[str]:
    """The scores of experts, the groups, and what keeps experts equally busy."""
    scores: str = model.moe_router_score_function
    if scores == "softmax":
        scores += " over all experts" if model.moe_router_pre_softmax else " over the chosen ones"
    elif model.moe_router_norm_topk_prob:
        scores += " with sum 1"
    if (factor := model.moe_router_topk_scaling_factor or 1.0) != 1.0:
        scores += f" x {factor:g}"
    yield f"routed by {scores}"
    if model.moe_router_num_groups is not None:
        yield f"the best {model.moe_router_group_topk} of {model.moe_router_num_groups} groups"
    if model.moe_aux_loss_coeff:
        yield f"{model.moe_router_load_balancing_type} x {model.moe_aux_loss_coeff:g}"
    if model.moe_z_loss_coeff:
        yield f"z-loss x {model.moe_z_loss_coeff:g}"
    if model.moe_router_enable_expert_bias:
        yield f"biases moved by {model.moe_router_bias_update_rate:g} a step"


def factors_of(model: ModelConfig) -> Iterator[str]:
    """The factors of embeddings, blocks and logits, and the bound of logits."""
    factors = {
        "embeddings": model.embedding_multiplier,
        "blocks": model.residual_multiplier,
        "logits": model.logit_multiplier,
    }
    yield from (f"{name} x {factor:g}" for name, factor in factors.items() if factor != 1)
    if model.final_logit_softcapping is not None:
        yield f"logits capped at {model.final_logit_softcapping:g}"


def scores_of(model: ModelConfig) -> Iterator[str]:
    """What attention does with its scores, besides the mask."""
    if model.softmax_scale is not None:
        yield f"scores x {model.softmax_scale:g}"
    if model.attn_logit_softcapping is not None:
        yield f"scores capped at {model.attn_logit_softcapping:g}"
    if model.softmax_type != "vanilla":
        learned = model.softmax_type == "learnable"
        yield "learned sinks" if learned else "softmax off by one"
    if model.attention_output_gate:
        yield "gated output"
