"""Granite 3 and the dense Granite 4: Llama with factors of embeddings, blocks, scores and logits.

Granite 4 is the hybrid architecture, here with attention in all layers and without experts.
"""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_ATTENTION, _MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")
_SMALLEST = 1e-30  # JsonFields.number accepts its reciprocal, and nothing larger
_EXPERTS = ("num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    return llama_like.read(
        fields,
        embedding_multiplier=_factor(fields, "embedding_multiplier"),
        residual_multiplier=_factor(fields, "residual_multiplier"),
        softmax_scale=_factor(fields, "attention_multiplier"),
        logit_multiplier=1 / _factor(fields, "logits_scaling"),
        **flags,
    )


def _factor(fields: JsonFields, name: str) -> float:
    value = fields.number(name, 1.0)
    if not value >= _SMALLEST:
        raise fields.wrong(name, f"but must be a number of at least {_SMALLEST:g}")
    return value


def _read_hybrid(fields: JsonFields) -> ModelConfig:
    fields.only("num_local_experts", 0, why="it is a mixture of experts")
    fields.only("normalization_function", "rmsnorm")
    key = "layer_types" if fields.get("layers_block_type") is None else "layers_block_type"
    kinds, layers = fields.get(key), fields.size("num_hidden_layers")
    if kinds is None or (isinstance(kinds, list) and any(kind in _MAMBA for kind in kinds)):
        raise fields.unsupported(key, "layers of attention only", "it has Mamba layers")
    if kinds not in ([kind] * layers for kind in _ATTENTION):
        raise fields.wrong(key, f'but must be a list of {layers} times "{_ATTENTION[0]}"')
    for name in (*_EXPERTS, *fields.value):
        if name in _EXPERTS or name.startswith("mamba_"):
            fields.get(name)  # without effect
    fields.only("position_embedding_type", "rope", "nope")
    flags: dict[str, Any] = {}
    if fields.get("position_embedding_type") != "rope":
        flags = {"position_embedding_type": "none", "rope_type": "default"}
    return _read(
        fields,
        ffn_hidden_size=fields.size("shared_intermediate_size"),
        **llama_like.read_biases(fields, mlp=None),
        **flags,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest),
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "attention_multiplier": model.score_scale,
        "logits_scaling": float(f"{1 / model.logit_multiplier:.15g}"),
        "attention_bias": model.has_qkv_bias,
    }


def _write_hybrid(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **_write(model, longest),
        "shared_intermediate_size": model.ffn_size,
        "position_embedding_type": "rope" if model.position_embedding_type == "rope" else "nope",
        "layer_types": [_ATTENTION[0]] * model.num_layers,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        # transformers checks it even without Mamba layers: it must divide twice the hidden size.
        "mamba_n_heads": 1,
    }


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=lambda fields: _read(fields, **llama_like.read_biases(fields)),
    write=lambda model, longest: {**_write(model, longest), "mlp_bias": model.has_mlp_bias},
    modules=llama_like.MODULES,
)
GRANITE_HYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read=_read_hybrid,
    write=_write_hybrid,
    modules={
        **{key: ours for key, ours in llama_like.MODULES.items() if ".mlp." not in key},
        "model.layers.{}.shared_mlp.input_linear": "layers.{}.mlp.gate layers.{}.mlp.up",
        "model.layers.{}.shared_mlp.output_linear": "layers.{}.mlp.down",
    },
    defaults={"num_local_experts": 8, "shared_intermediate_size": 1024, "intermediate_size": 1},
)
