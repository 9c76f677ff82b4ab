"""Shared code of Llama and the families derived from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import LAYER_KINDS, read_rope, write_rope

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

TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
"""The names of GELU with tanh, the only GELU of the trainer."""


def read(
    fields: JsonFields,
    *,
    activations: Sequence[str] = ("silu", "swish"),
    activation_key: str = "hidden_act",
    rope: Mapping[str, Any] = MappingProxyType({}),
    **flags: Any,
) -> ModelConfig:
    """Reads the keys that these families share.

    Args:
        fields: config.json, with the family's defaults.
        activations: the names of the activation that ``flags`` describe.
        activation_key: the key that names it.
        rope: options of ``read_rope``.
        flags: fields of ``ModelConfig`` that the family decides itself; they replace what is read
            here.

    Raises:
        ConfigError: a key is missing, malformed or not supported.
    """
    fields.only(activation_key, *activations)
    positions = fields.size("max_position_embeddings")
    values: dict[str, Any] = {
        "num_layers": fields.size("num_hidden_layers"),
        "ffn_hidden_size": flags.get("ffn_hidden_size") or fields.size("intermediate_size"),
        **_read_heads(fields),
        "normalization": "RMSNorm",
        "norm_epsilon": fields.number("rms_norm_eps", 1e-6),
        "swiglu": True,
        "disable_bias_linear": True,
        "position_embedding_type": "rope",
        "max_position_embeddings": positions,
        "attention_dropout": fields.number("attention_dropout"),
        "untie_embeddings_and_output_weights": not fields.switch("tie_word_embeddings"),
        "init_method_std": fields.number("initializer_range", 0.02) or 0.02,
        "vocab_size": fields.size("vocab_size"),
        **read_rope(fields, positions, **rope),
        **flags,
    }
    if values.get("window_size") is None:
        values.pop("window_rotary_base", None)
    model = ModelConfig(**values)
    if model.rotary_dim % 2:
        rule = f"but rope rotates {model.rotary_dim} channels of a head, which must be even"
        raise fields.wrong("head_dim", rule)
    return model


def _read_heads(fields: JsonFields) -> dict[str, Any]:
    heads, hidden = fields.size("num_attention_heads"), fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.wrong("num_key_value_heads", f"but must divide num_attention_heads {heads}")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": kv_heads,
        "kv_channels": fields.size("head_dim", max(1, hidden // heads)),
    }


def write(model: ModelConfig, longest: int, **rope: Any) -> dict[str, Any]:
    """Writes the entries that these families share; see ``Family.write``.

    Args:
        model: the model.
        longest: its longest sequence, in tokens.
        rope: options of ``write_rope``.
    """
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
        **write_rope(model, **rope),
    }


def read_biases(
    fields: JsonFields, *, attention: str = "attention_bias", mlp: str | None = "mlp_bias"
) -> dict[str, Any]:
    """Reads which linear layers have biases.

    Args:
        fields: config.json.
        attention: the key of queries, keys, values and the output of attention.
        mlp: the key of the MLP; None: it has no biases.

    Returns:
        The fields of ``ModelConfig`` about biases.
    """
    has_attention, has_mlp = fields.switch(attention), mlp is not None and fields.switch(mlp)
    some = has_attention != has_mlp
    return {
        "disable_bias_linear": some or not has_mlp,
        "add_qkv_bias": some and has_attention,
        "add_attention_output_bias": some and has_attention,
        "add_mlp_bias": some and has_mlp,
    }


def every_nth_full(fields: JsonFields, default: int) -> list[str]:
    """Lists the kinds of layers of which every n-th attends to the whole past.

    Args:
        fields: config.json, which gives n under ``sliding_window_pattern``.
        default: n if it does not.
    """
    n, layers = fields.size("sliding_window_pattern", default), fields.size("num_hidden_layers")
    return [LAYER_KINDS[(layer + 1) % n != 0] for layer in range(layers)]


def all_or_none(fields: JsonFields) -> list[str]:
    """Lists the kinds of layers that all have a window if config.json has its width, else none."""
    slides = fields.get("sliding_window") is not None
    return [LAYER_KINDS[slides]] * fields.size("num_hidden_layers")


def read_layer_windows(fields: JsonFields, kinds: list[str]) -> dict[str, Any]:
    """Reads a sliding window that the layers of the kind ``sliding_attention`` have.

    Hugging Face counts the token itself in the width of a window; ``window_size`` does not.

    Args:
        fields: config.json.
        kinds: the kinds of all layers if ``layer_types`` is missing.

    Returns:
        ``window_size`` and ``window_layers`` of ``ModelConfig``; nothing if no layer has a window.
    """
    fields.get("sliding_window")  # without a layer that has a window, it has no effect
    given, layers = fields.get("layer_types"), fields.size("num_hidden_layers")
    kinds = kinds if given is None else given
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.wrong("layer_types", f"but must be a list of {layers} entries, one per layer")
    if any(kind not in LAYER_KINDS for kind in kinds):
        raise fields.unsupported("layer_types", ", ".join(LAYER_KINDS))
    sliding = tuple(n for n, kind in enumerate(kinds) if kind == LAYER_KINDS[1])
    if not sliding:
        return {}
    width = fields.size("sliding_window")
    some = sliding if len(sliding) < layers else None
    return {"window_size": (width - 1, 0), "window_layers": some}


def write_layer_windows(model: ModelConfig) -> dict[str, Any]:
    """Writes a sliding window that some layers have."""
    width = window_width(model)
    sliding = [bool(width and model.layer_window(n)) for n in range(model.num_layers)]
    return {
        # Some classes of transformers need a width even if no layer has a window.
        "sliding_window": width or 4096,
        "layer_types": [LAYER_KINDS[slides] for slides in sliding],
    }


def read_optional_windows(fields: JsonFields) -> dict[str, Any]:
    """Reads windows that ``use_sliding_window`` turns on.

    Without ``layer_types``, the layers from ``max_window_layers`` on have them.
    """
    first, layers = int(fields.number("max_window_layers", 28.0)), fields.size("num_hidden_layers")
    if not fields.switch("use_sliding_window"):
        fields.get("sliding_window")  # as in transformers, it is read and has no effect
        refuse_unused_windows(fields)
        return {}
    return read_layer_windows(fields, [LAYER_KINDS[layer >= first] for layer in range(layers)])


def refuse_unused_windows(fields: JsonFields) -> None:
    """Refuses ``layer_types`` with a window in a config.json whose ``use_sliding_window`` is off.

    Programs disagree about whether such a layer has a window.
    """
    kinds = fields.get("layer_types")
    if isinstance(kinds, list) and LAYER_KINDS[1] in kinds:
        raise fields.wrong("layer_types", "but use_sliding_window is false", LAYER_KINDS[0])


def write_optional_windows(model: ModelConfig) -> dict[str, Any]:
    """Writes what ``read_optional_windows`` reads."""
    written = write_layer_windows(model)
    slides = [kind == LAYER_KINDS[1] for kind in written["layer_types"]]
    return {
        **written,
        "use_sliding_window": any(slides),
        # Programs that do not know layer_types read this: the first layer with the window.
        "max_window_layers": [*slides, True].index(True),
    }


def window_width(model: ModelConfig) -> int | None:
    """The width of the sliding window as Hugging Face counts it, or None without one."""
    left = -1 if model.window_size is None else model.window_size[0]
    return left + 1 if left >= 0 else None
