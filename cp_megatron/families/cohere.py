"""Command-R and Command-R7B: attention and the MLP read one LayerNorm, which has no bias.

Logits have a factor. Command-R may normalize every head with a weight of its own. In Command-R7B
most layers have a window, and only these rotate queries and keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families import llama_like
from cp_megatron.families.family import Family
from cp_megatron.families.json_fields import JsonFields

# Keys that folders of Command-R7B have, with the only values that transformers computes.
_GRANTED: Mapping[str, Any] = {
    "position_embedding_type": "rope_gptj",
    "rotary_pct": 1.0,
    "order_of_interleaved_layers": "local_attn_first",
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}


def _read(fields: JsonFields, **flags: Any) -> ModelConfig:
    scale = fields.number("logit_scale", 0.0625)
    if not scale:
        raise fields.wrong("logit_scale", "but must be greater than 0")
    return llama_like.read(
        fields,
        normalization="LayerNorm",
        norm_epsilon=fields.number("layer_norm_eps", 1e-5),
        norm_bias="none",
        parallel_residual=True,
        rotary_interleaved=True,
        logit_multiplier=scale,
        **llama_like.read_biases(fields, mlp=None),
        **flags,
    )


def _write(model: ModelConfig, longest: int) -> dict[str, Any]:
    entries = llama_like.write(model, longest)
    del entries["rms_norm_eps"]
    return {
        **entries,
        "layer_norm_eps": model.norm_epsilon,
        "logit_scale": model.logit_multiplier,
        "attention_bias": model.has_qkv_bias,
    }


def _read_head_norms(fields: JsonFields) -> ModelConfig:
    if not fields.switch("use_qk_norm"):
        return _read(fields)
    return _read(fields, qk_layernorm=True, qk_norm_scope="each_head")


def _read_windows(fields: JsonFields) -> ModelConfig:
    for name, value in _GRANTED.items():
        fields.only(name, value)
    fields.only("layer_switch", fields.size("sliding_window_pattern", 4))
    windows = llama_like.read_layer_windows(fields, llama_like.every_nth_full(fields, 4))
    layers = range(fields.size("num_hidden_layers"))
    sliding = (windows["window_layers"] or layers) if windows else ()
    unrotated = tuple(layer for layer in layers if layer not in sliding)
    return _read(fields, no_rope_layers=unrotated or None, **windows)


COHERE = Family(
    model_type="cohere",
    architecture="CohereForCausalLM",
    read=_read_head_norms,
    write=lambda model, longest: {**_write(model, longest), "use_qk_norm": model.qk_layernorm},
    modules=llama_like.MODULES,
    defaults={"rope_theta": 500000.0, "tie_word_embeddings": True},
)
COHERE2 = Family(
    model_type="cohere2",
    architecture="Cohere2ForCausalLM",
    read=_read_windows,
    write=lambda model, longest: {
        **_write(model, longest),
        **llama_like.write_layer_windows(model),
    },
    modules=llama_like.MODULES,
    defaults={"sliding_window": 4096, "tie_word_embeddings": True},
)
