"""gpt-oss: experts and attention with biases, sinks, and a window on every second layer.

The folder stacks experts, with the inputs of a product before its outputs, and the columns of gate
and up alternate::

    gate_up_proj       [E, h, 2f]    gate 0, up 0, gate 1, up 1, ...
    gate_up_proj_bias  [E, 2f]       the same
    down_proj          [E, f, h]
"""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like, mixture
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import LAYER_KINDS

_LAYER, _OURS = "model.layers.{}.mlp", "layers.{}.mlp"
_ALPHA = 1.702


def _read(fields: JsonFields) -> ModelConfig:
    fields.only("swiglu_alpha", _ALPHA, why="the gate is x sigmoid(1.702 x)")
    if not any(fields.inner(name).value for name in ("rope_parameters", "rope_scaling")):
        raise fields.wrong("rope_parameters", "which transformers replaces by the rope of gpt-oss")
    layers = fields.size("num_hidden_layers")
    experts = mixture.read_experts(
        fields,
        range(layers),
        count=("num_local_experts", "num_experts"),
        width="intermediate_size",
        moe_router_add_bias=True,
    )
    if not experts:
        raise fields.wrong("num_local_experts", "but there must be experts")
    fields.only("experts_per_token", experts["moe_router_topk"])
    kinds = [LAYER_KINDS[(layer + 1) % 2] for layer in range(layers)]
    biases = fields.switch("attention_bias")
    return llama_like.read(
        fields,
        swiglu=False,
        quick_geglu=True,
        activation_func_clamp_value=fields.number("swiglu_limit"),
        glu_linear_offset=1.0,
        softmax_type="learnable",
        disable_bias_linear=not biases,
        add_mlp_bias=not biases,
        **llama_like.read_layer_windows(fields, kinds),
        **experts,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    return {
        **llama_like.write(model, longest),
        **llama_like.write_layer_windows(model),
        "attention_bias": model.has_qkv_bias,
        "swiglu_alpha": _ALPHA,
        "swiglu_limit": model.activation_func_clamp_value,
        **mixture.write_experts(model, count="num_local_experts", width="intermediate_size"),
    }


GPT_OSS = Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    read=_read,
    write=_write,
    modules={
        **llama_like.MODULES,
        "model.layers.{}.self_attn": "layers.{}.attention",
        f"{_LAYER}.router": f"{_OURS}.router",
        **mixture.STACKED,
        f"{_LAYER}.experts.gate_up_proj_bias": (
            f"{_OURS}.experts.gate_bias {_OURS}.experts.up_bias"
        ),
        f"{_LAYER}.experts.down_proj_bias": f"{_OURS}.experts.down_bias",
    },
    transposed=frozenset({"gate_up_proj", "down_proj"}),
    interleaved=frozenset({"gate_up_proj", "gate_up_proj_bias"}),
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
        "attention_bias": True,
        "rope_theta": 150_000.0,
        "rms_norm_eps": 1e-5,
        "swiglu_limit": 7.0,
        "intermediate_size": 2880,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
)
