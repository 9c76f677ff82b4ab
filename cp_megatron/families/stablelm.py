"""StableLM 2: Llama with LayerNorms that have biases, and a share of each head rotated.

Queries, keys and values may have biases, every head may have a norm of its own, and attention and
the MLP may read the same norm.
"""

from __future__ import annotations

from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields


def _read(fields: JsonFields) -> ModelConfig:
    width = fields.size("hidden_size") // fields.size("num_attention_heads")
    fields.only("head_dim", width, why="it is hidden_size / num_attention_heads")
    fields.only("hidden_dropout", 0, 0.0, why="transformers applies it to the MLP alone")
    flags: dict[str, Any] = {}
    if fields.switch("qk_layernorm"):
        # The norms of heads have no bias, those of the residual stream do.
        flags = {"qk_layernorm": True, "qk_norm_scope": "each_head", "norm_bias": "residual"}
    return llama_like.read(
        fields,
        normalization="LayerNorm",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        add_qkv_bias=fields.switch("use_qkv_bias"),
        parallel_residual=fields.switch("use_parallel_residual"),
        **flags,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = llama_like.write(model, longest, partial=True)
    del entries["head_dim"], entries["rms_norm_eps"]
    return {
        **entries,
        "layer_norm_eps": model.norm_epsilon,
        "use_qkv_bias": model.has_qkv_bias,
        "qk_layernorm": model.qk_layernorm,
        "use_parallel_residual": model.parallel_residual,
        "hidden_dropout": 0.0,
    }


STABLELM = Family(
    model_type="stablelm",
    architecture="StableLmForCausalLM",
    read=_read,
    write=_write,
    modules={
        theirs.replace("_norm", "_layernorm.norms.{}"): ours
        for theirs, ours in llama_like.MODULES.items()
    },
    defaults={"num_key_value_heads": 32, "partial_rotary_factor": 0.25},
    heads_divide_hidden_size=True,
)
