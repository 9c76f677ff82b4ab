"""Granite 3 and 4: Llama with factors of embeddings, blocks, scores and logits, or with experts.

Granite 4 is the hybrid architecture, here with attention in all layers. Its MLP is shared by all
tokens, beside experts if there are any. Folders stack experts, gate before up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

_ATTENTION, _MAMBA = ("attention", "full_attention"), ("mamba", "linear_attention")
_SMALLEST = 1e-30  # JsonFields.number accepts its reciprocal, and nothing larger
_MOE, _EXPERTS = "model.layers.{}.block_sparse_moe", "layers.{}.mlp.experts"
_MIXTURE: Mapping[str, str] = {
    f"{_MOE}.router.layer": "layers.{}.mlp.router",
    f"{_MOE}.input_linear.weight": f"{_EXPERTS}.gate {_EXPERTS}.up",
    f"{_MOE}.output_linear.weight": f"{_EXPERTS}.down",
}
_COUNT = "num_local_experts"


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


def _read_experts(fields: JsonFields) -> dict[str, Any]:
    layers = range(fields.size("num_hidden_layers"))
    return mixture.read_experts(fields, layers, count=(_COUNT,), width="intermediate_size")


def _read_mixture(fields: JsonFields) -> ModelConfig:
    experts = _read_experts(fields)
    if not experts:
        raise fields.wrong(_COUNT, "but there must be experts")
    return _read(fields, **experts, **llama_like.read_biases(fields, mlp=None))


def _read_hybrid(fields: JsonFields) -> ModelConfig:
    fields.only("normalization_function", "rmsnorm")
    key = "layer_types" if fields.get("layers_block_type") is None else "layers_block_type"
    kinds, layers = fields.get(key), fields.size("num_hidden_layers")
    if kinds is None or (isinstance(kinds, list) and any(kind in _MAMBA for kind in kinds)):
        raise fields.unsupported(key, "layers of attention only", "it has Mamba layers")
    if kinds not in ([kind] * layers for kind in _ATTENTION):
        raise fields.wrong(key, f'but must be a list of {layers} times "{_ATTENTION[0]}"')
    for name in fields.value:
        if name.startswith("mamba_"):
            fields.get(name)  # without effect
    fields.only("position_embedding_type", "rope", "nope")
    flags: dict[str, Any] = {}
    if fields.get("position_embedding_type") != "rope":
        flags = {"position_embedding_type": "none", "rope_type": "default"}
    width = fields.size("shared_intermediate_size")
    if experts := _read_experts(fields):
        flags |= {**experts, "moe_shared_expert_intermediate_size": width}
    return _read(
        fields,
        ffn_hidden_size=width,
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


def _write_experts(model: ModelConfig) -> dict[str, Any]:
    return mixture.write_experts(model, count=_COUNT, width="intermediate_size")


def _write_hybrid(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **_write(model, longest),
        "shared_intermediate_size": model.moe_shared_expert_intermediate_size or model.ffn_size,
        "position_embedding_type": "rope" if model.position_embedding_type == "rope" else "nope",
        "layer_types": [_ATTENTION[0]] * model.num_layers,
        "num_experts_per_tok": 0,
        **_write_experts(model),
        # transformers checks it even without Mamba layers: it must divide twice the hidden size.
        "mamba_n_heads": 1,
    }


def _shared(model: ModelConfig) -> str:
    """The MLP that computes every token."""
    return "layers.{}.mlp" if model.num_experts is None else "layers.{}.mlp.shared"


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    read=lambda fields: _read(fields, **llama_like.read_biases(fields)),
    write=lambda model, longest: {**_write(model, longest), "mlp_bias": model.has_mlp_bias},
    modules=llama_like.MODULES,
)
GRANITE_MOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    read=_read_mixture,
    write=lambda model, longest: {**_write(model, longest), **_write_experts(model)},
    modules={**llama_like.MODULES, **_MIXTURE},
    defaults={_COUNT: 8, "num_experts_per_tok": 2},
)
GRANITE_HYBRID = Family(
    model_type="granitemoehybrid",
    architecture="GraniteMoeHybridForCausalLM",
    read=_read_hybrid,
    write=_write_hybrid,
    modules=lambda model: {
        **{key: ours for key, ours in llama_like.MODULES.items() if ".mlp." not in key},
        **_MIXTURE,
        "model.layers.{}.shared_mlp.input_linear": f"{_shared(model)}.gate {_shared(model)}.up",
        "model.layers.{}.shared_mlp.output_linear": f"{_shared(model)}.down",
    },
    defaults={_COUNT: 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024},
)
