"""OLMoE: Llama with norms of all heads of a token together, and experts in all layers."""

from __future__ import annotations

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("clip_qkv", works="null", why="queries, keys and values are not clipped")
    experts = mixture.read_experts(
        fields,
        range(fields.size("num_hidden_layers")),
        count=("num_experts", "num_local_experts"),
        width="intermediate_size",
        moe_router_pre_softmax=not fields.switch("norm_topk_prob"),
    )
    if not experts:
        raise fields.wrong("num_experts", "but there must be experts")
    return llama_like.read(
        fields,
        qk_layernorm=True,
        qk_norm_scope="all_heads",
        **llama_like.read_biases(fields, mlp=None),
        **experts,
    )


OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    read=_read,
    write=lambda model, longest: {
        **llama_like.write(model, longest),
        "attention_bias": model.has_qkv_bias,
        **mixture.write_experts(model, count="num_experts", width="intermediate_size"),
        "norm_topk_prob": not model.moe_router_pre_softmax,
    },
    modules={**llama_like.MODULES, **mixture.ROUTER, **mixture.EXPERTS},
    other_names=mixture.STACKED,
    defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
)
