"""Shared code of Llama and the families derived from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import read_rope, write_rope

_KINDS = ("full_attention", "sliding_attention")

MODULES: Mapping[str, str] = {
    "model.embed_tokens": "embedding",
    "model.layers.{}.self_attn.q_proj": "layers.{}.attention.query",
    "model.layers.{}.self_attn.k_proj": "layers.{}.attention.key",
    "model.layers.{}.self_attn.v_proj": "layers.{}.attention.value",
    "model.layers.{}.self_attn.o_proj": "layers.{}.attention.out",
    "model.layers.{}.mlp.gate_proj": "layers.{}.mlp.gate",
    "model.layers.{}.mlp.up_proj": "layers.{}.mlp.up",
    "model.layers.{}.mlp.down_proj": "layers.{}.mlp.down",
    "model.layers.{}.input_layernorm": "layers.{}.attention_norm",
    "model.layers.{}.post_attention_layernorm": "layers.{}.mlp_norm",
    "model.layers.{}.self_attn.q_norm": "layers.{}.attention.query_norm",
    "model.layers.{}.self_attn.k_norm": "layers.{}.attention.key_norm",
    "model.norm": "norm",
    "lm_head": "head",
}
"""The tensor names of Llama, with those of Qwen3's head norms."""


def read(
    fields: JsonFields,
    *,
    default_head_dim: int | None = None,
    default_kv_heads: int | None = None,
    **flags: Any,
) -> ModelConfig:
    """Reads the keys that these families share.

    Args:
        default_head_dim: width of a head if the file does not say it; None derives it.
        default_kv_heads: the same for the number of key/value heads.
        flags: fields of ``ModelConfig`` that the family itself decides.
    """
    fields.only("hidden_act", "silu", "swish")
    fields.only("partial_rotary_factor", 1, 1.0, why="whole heads are rotated")
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    positions = fields.size("max_position_embeddings")
    kv_heads = fields.size("num_key_value_heads", default_kv_heads or heads)
    head_dim = fields.size("head_dim", default_head_dim or max(1, hidden // heads))
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"but must divide num_attention_heads {heads}")
    if head_dim % 2:
        raise fields.wrong("head_dim", "but must be even, because rope rotates pairs of channels")
    values: dict[str, Any] = {"disable_bias_linear": True, **read_rope(fields, positions), **flags}
    return ModelConfig(
        num_layers=fields.size("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=fields.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=kv_heads,
        kv_channels=head_dim,
        normalization="RMSNorm",
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        swiglu=True,
        position_embedding_type="rope",
        max_position_embeddings=positions,
        attention_dropout=fields.number("attention_dropout"),
        untie_embeddings_and_output_weights=not fields.switch("tie_word_embeddings"),
        init_method_std=fields.number("initializer_range", 0.02) or 0.02,
        vocab_size=fields.size("vocab_size"),
        **values,
    )


def write(model: ModelConfig, longest: int) -> dict[str, Any]:
    """Writes the entries that these families share; see ``Family.write``."""
    if model.rope_type == "dynamic":
        longest = model.original_length or longest  # the length from which this type stretches
    return {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": longest,
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.attention_dropout,
        **write_rope(model),
    }


def read_layer_windows(fields: JsonFields) -> dict[str, Any]:
    """Reads a sliding window that some layers have, from ``layer_types`` or the older keys.

    Hugging Face counts the token itself in the width of a window; ``window_size`` does not.
    """
    kinds = fields.value.get("layer_types")
    if not fields.switch("use_sliding_window"):
        for name in ("sliding_window", "max_window_layers"):
            fields.value.get(name)  # as in transformers, they are read and have no effect
        return {}
    width, layers = fields.size("sliding_window", 4096), fields.size("num_hidden_layers")
    if kinds is None:
        first = int(fields.number("max_window_layers", 28.0))
        kinds = ["full_attention"] * min(first, layers)
        kinds += ["sliding_attention"] * (layers - len(kinds))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.wrong("layer_types", f"but must be a list of {layers} entries, one per layer")
    if any(kind not in _KINDS for kind in kinds):
        raise fields.unsupported("layer_types", ", ".join(_KINDS))
    sliding = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
    some = sliding if len(sliding) < layers else None
    return {"window_size": (width - 1, 0), "window_layers": some} if sliding else {}


def write_layer_windows(model: ModelConfig) -> dict[str, Any]:
    """Writes a sliding window that some layers have."""
    width = window_width(model)
    sliding = [bool(width and model.layer_window(n)) for n in range(model.num_layers)]
    return {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        # Programs that do not know layer_types read this: the first layer with the window.
        "max_window_layers": [*sliding, True].index(True),
        "layer_types": [_KINDS[slides] for slides in sliding],
    }


def window_width(model: ModelConfig) -> int | None:
    """The width of the sliding window as Hugging Face counts it, or None without one."""
    left = -1 if model.window_size is None else model.window_size[0]
    return left + 1 if left >= 0 else None
