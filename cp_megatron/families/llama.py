"""Hugging Face's config.json as a ``ModelConfig``, and back. Read with suspicion; no torch.

Llama, Mistral, Qwen2 and Qwen3 are one model here, with other options: Mistral is Llama with a
window, Qwen2 has biases on q, k and v, Qwen3 a norm per head. Whatever a config says beyond what
these options hold is refused, as weights would load and mean something else. A model of GPT-2's
shape (``hf_gpt2``) is written only.

Both generations are read: transformers 4 has ``rope_theta`` beside ``rope_scaling``, 5 has both in
``rope_parameters``. What is written has the two, so that either generation loads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cp_megatron.config.schema import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.gpt2 import check_gpt2, gpt2_entries, has_gpt2_shape
from cp_megatron.families.json_fields import ARCHITECTURES, ROPE_KEYS, JsonFields, read_json

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)
"""What a folder may hold of its tokenizer."""


@dataclass(frozen=True, kw_only=True)
class HFModel:
    """What config.json says.

    Attributes:
        folder: where it lies.
        architecture: llama, mistral, qwen2 or qwen3.
        model: the same model here.
        vocab_size: rows of the embedding.
        max_positions: tokens of the longest sequence it is made for.
        bos, eos: ids of the first and the last token of a text, where it names one.
        raw: all of the file.
    """

    folder: str
    architecture: str
    model: ModelConfig
    vocab_size: int
    max_positions: int
    bos: int | None
    eos: int | None
    raw: Mapping[str, Any]


def read_hf_config(folder: str | Path, *, flag: str = "--load-hf") -> HFModel:
    """The model of a Hugging Face folder.

    Args:
        folder: holds config.json.
        flag: of the user who named it, for errors.

    Raises:
        ConfigError: there is none, it is malformed, or it asks for something not honoured here.
    """
    fields = JsonFields(Path(folder), flag, "", read_json(Path(folder), flag))
    architecture = _architecture(fields)
    _refuse_unhonoured(fields, architecture)
    vocab_size, positions = fields.size("vocab_size"), fields.size("max_position_embeddings")
    heads = fields.size("num_attention_heads")
    hidden, layers = fields.size("hidden_size"), fields.size("num_hidden_layers")
    head_dim = fields.size("head_dim", 128 if architecture == "qwen3" else max(1, hidden // heads))
    biases = architecture == "llama" and fields.switch("attention_bias", False)
    model = ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=fields.size("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=fields.size(
            "num_key_value_heads", 8 if architecture == "mistral" else heads
        ),
        kv_channels=head_dim,
        normalization="RMSNorm",
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        swiglu=True,
        position_embedding_type="rope",
        max_position_embeddings=positions,
        **_window(fields, architecture, layers),
        attention_dropout=fields.number("attention_dropout", 0.0),
        untie_embeddings_and_output_weights=not fields.switch("tie_word_embeddings", False),
        disable_bias_linear=not biases,
        add_qkv_bias=architecture == "qwen2",
        qk_layernorm=architecture == "qwen3",
        init_method_std=fields.number("initializer_range", 0.02) or 0.02,
        vocab_size=vocab_size,
        **_rope(fields, positions),
    )
    if heads % model.num_kv_heads:
        raise fields.wrong("num_key_value_heads", f"must divide num_attention_heads {heads}")
    if head_dim % 2:
        raise fields.wrong("head_dim", "must be even, as rope turns pairs of channels")
    return HFModel(
        folder=str(folder),
        architecture=architecture,
        model=model,
        vocab_size=vocab_size,
        max_positions=positions,
        bos=fields.token("bos_token_id"),
        eos=fields.token("eos_token_id"),
        raw=MappingProxyType(fields.value),
    )


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a folder holds a tokenizer that can be read."""
    return any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _architecture(fields: JsonFields) -> str:
    names = fields.value.get("architectures")
    if names is None:
        kind = fields.value.get("model_type")
        if isinstance(kind, str) and kind in ARCHITECTURES.values():
            return kind
        raise fields.wrong("model_type", "is not known here", ", ".join(ARCHITECTURES.values()))
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.wrong("architectures", "must name one architecture")
    if names[0] not in ARCHITECTURES:
        raise fields.wrong("architectures", "is not known here", ", ".join(ARCHITECTURES))
    return ARCHITECTURES[names[0]]


def _refuse_unhonoured(fields: JsonFields, architecture: str) -> None:
    if fields.value.get("hidden_act", "silu") not in ("silu", "swish", None):
        raise fields.wrong("hidden_act", "is not honoured", "silu")
    if fields.value.get("quantization_config") is not None:
        raise fields.wrong("quantization_config", "is not honoured", "weights that are plain")
    attention, mlp = (fields.switch(name, False) for name in ("attention_bias", "mlp_bias"))
    if architecture == "llama":
        if attention != mlp:
            rule = f"beside mlp_bias {mlp} is not honoured: all linear layers have biases or none"
            raise fields.wrong("attention_bias", rule)
    elif attention and architecture == "qwen3":
        raise fields.wrong("attention_bias", "is not honoured in Qwen3", "false")
    factor = fields.number("partial_rotary_factor", 1.0)
    if factor != 1:
        raise fields.wrong("partial_rotary_factor", "is not honoured: rope turns whole heads", "1")


def _window(fields: JsonFields, architecture: str, layers: int) -> dict[str, Any]:
    """The sliding window as LEFT, RIGHT, and its layers: Hugging Face counts the token itself."""
    kinds = fields.value.get("layer_types")
    if architecture == "llama":
        if fields.value.get("sliding_window") is not None:
            raise fields.wrong("sliding_window", "is not honoured in Llama", "MistralForCausalLM")
        return {}
    if architecture == "mistral":
        named = isinstance(kinds, list) and all(kind == "sliding_attention" for kind in kinds)
        if kinds is not None and not named:
            raise fields.wrong("layer_types", "is not honoured in Mistral", "no layer_types")
        if "sliding_window" in fields.value and fields.value["sliding_window"] is None:
            return {}
        return {"window_size": (fields.size("sliding_window", 4096) - 1, 0)}
    if not fields.switch("use_sliding_window", False):
        return {}
    width = fields.size("sliding_window", 4096)
    if kinds is None:
        first = int(fields.number("max_window_layers", 28.0))
        kinds = ["full_attention"] * min(first, layers)
        kinds += ["sliding_attention"] * (layers - len(kinds))
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise fields.wrong("layer_types", f"must name {layers} layers")
    if any(kind not in ("full_attention", "sliding_attention") for kind in kinds):
        raise fields.wrong("layer_types", "is not honoured", "full_attention, sliding_attention")
    sliding = tuple(n for n, kind in enumerate(kinds) if kind == "sliding_attention")
    if not sliding:
        return {}
    some = sliding if len(sliding) < layers else None
    return {"window_size": (width - 1, 0), "window_layers": some}


def _rope(fields: JsonFields, positions: int) -> dict[str, Any]:
    """The fields of ModelConfig about rope, from either generation of config.json."""
    place = "rope_scaling" if fields.mapping("rope_scaling") else "rope_parameters"
    rope = JsonFields(fields.folder, fields.flag, f"{place}.", fields.mapping(place))
    base = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    if not base > 1:
        raise rope.wrong("rope_theta", "must be above 1")
    kind = rope.value.get("rope_type", rope.value.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise rope.wrong("rope_type", "is not known here", ", ".join(ROPE_KEYS))
    known = {*ROPE_KEYS[kind], "rope_theta", "rope_type", "type", "partial_rotary_factor"}
    for name, value in rope.value.items():
        if name not in known and value is not None:
            raise rope.wrong(name, f"is not honoured with rope_type {kind}")
    if rope.number("partial_rotary_factor", 1.0) != 1:
        raise rope.wrong("partial_rotary_factor", "is not honoured", "1")
    values: dict[str, Any] = {"rotary_base": base, "rope_type": kind}
    for name, field in ROPE_KEYS[kind].items():
        value = _rope_value(rope, name)
        if value is not None:
            values[field] = value
    if kind in ("yarn", "llama3", "longrope"):
        outer = fields.value.get("original_max_position_embeddings")
        values["original_max_position_embeddings"] = (
            fields.size("original_max_position_embeddings")
            if outer is not None
            else values.get("original_max_position_embeddings", positions)
        )
    elif kind == "dynamic":
        values["original_max_position_embeddings"] = positions
    if kind in ("yarn", "longrope"):
        ratio = positions / values["original_max_position_embeddings"]
        values.setdefault("rope_scaling_factor", ratio)
    needed = {"llama3": ["low_freq_factor", "high_freq_factor"]}.get(kind, [])
    needed += {"longrope": ["short_factor", "long_factor"]}.get(kind, [])
    for name in ["factor"] * (kind in ("linear", "dynamic", "llama3")) + needed:
        if rope.value.get(name) is None:
            raise rope.wrong(name, f"is missing for rope_type {kind}")
    return values


def _rope_value(rope: JsonFields, name: str) -> Any:
    if rope.value.get(name) is None:
        return None
    if name == "truncate":
        return rope.switch(name, True)
    if name in ("short_factor", "long_factor"):
        return rope.numbers(name)
    if name == "original_max_position_embeddings":
        return rope.size(name)
    return rope.number(name, math.nan)


def to_hf_config(
    model: ModelConfig,
    *,
    vocab_size: int,
    seq_length: int,
    eod: int | None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """What config.json holds of a model.

    Args:
        model: the model.
        vocab_size: tokens it knows; the vocabulary's padding is not exported.
        seq_length: tokens of the rows it was trained on.
        eod: id of the token that ends a document.
        dtype: of the weights.

    Raises:
        ConfigError: no architecture of Hugging Face has such a model.
    """
    longest = max(seq_length, model.max_position_embeddings or 0)
    shared: dict[str, Any] = {
        "vocab_size": vocab_size,
        "initializer_range": model.init_method_std,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "bos_token_id": None,
        "eos_token_id": eod,
        "pad_token_id": None,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if has_gpt2_shape(model):
        check_gpt2(model)
        named = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return named | shared | gpt2_entries(model, longest)
    return _llama_entries(model, longest) | shared


def _llama_entries(model: ModelConfig, longest: int) -> dict[str, Any]:
    """What config.json holds of Llama and its kin."""
    architecture = _architecture_of(model)
    if model.rope_type == "dynamic":
        longest = model.original_length or longest  # it is where this type begins to stretch
    config: dict[str, Any] = {
        "architectures": [next(k for k, v in ARCHITECTURES.items() if v == architecture)],
        "model_type": architecture,
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
    }
    return config | _rope_entries(model) | _window_entries(model, architecture)


def _architecture_of(model: ModelConfig) -> str:
    def refused(flag: str, value: object, rule: str, works: str) -> ConfigError:
        return ConfigError(flag, value, f"has no architecture of Hugging Face: {rule}", works)

    if model.normalization != "RMSNorm":
        rule = "Llama and its kin normalize so"
        raise refused("--normalization", model.normalization, rule, "RMSNorm")
    if not model.swiglu:
        raise refused("--swiglu", False, "Llama and its kin have a gated MLP", "--swiglu")
    if model.position_embedding_type != "rope":
        kind = model.position_embedding_type
        raise refused("--position-embedding-type", kind, "Llama and its kin rotate", "rope")
    biases, window = not model.disable_bias_linear, _has_window(model)
    if biases and (model.qk_layernorm or window):
        rule = "only Llama has biases in all linear layers, and neither head norms nor a window"
        raise refused("--disable-bias-linear", False, rule, "--disable-bias-linear")
    if model.qk_layernorm and model.add_qkv_bias:
        rule = "Qwen3 has head norms and no biases"
        raise refused("--add-qkv-bias", True, rule, "one of the two")
    if model.qk_layernorm:
        return "qwen3"
    if model.add_qkv_bias and not biases:
        return "qwen2"
    if window and model.window_layers is not None and model.row_window is None:
        rule = "only Qwen2 and Qwen3 have a window on some layers"
        layers = " ".join(map(str, model.window_layers))
        raise refused("--window-layers", layers, rule, "--add-qkv-bias or --qk-layernorm")
    # transformers refuses a Llama whose hidden size the heads do not divide.
    odd = model.hidden_size % model.num_attention_heads
    if odd and biases:
        raise refused("--hidden-size", model.hidden_size, "heads must divide it", "no biases")
    return "mistral" if window or odd else "llama"


def _has_window(model: ModelConfig) -> bool:
    return model.window_size is not None and model.window_size[0] >= 0


def _rope_entries(model: ModelConfig) -> dict[str, Any]:
    scaling: dict[str, Any] = {"rope_type": model.rope_type}
    for name, field in ROPE_KEYS[model.rope_type].items():
        value = getattr(model, field)
        if name == "original_max_position_embeddings":
            value = model.original_length
        if value is not None:
            scaling[name] = list(value) if isinstance(value, tuple) else value
    if model.rope_type == "longrope" and "factor" not in scaling:
        original = model.original_length or 1
        scaling["factor"] = (model.max_position_embeddings or original) / original
    return {
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling if model.rope_type != "default" else None,
        "rope_parameters": {**scaling, "rope_theta": model.rotary_base},
    }


def _window_entries(model: ModelConfig, architecture: str) -> dict[str, Any]:
    width = model.window_size[0] + 1 if model.window_size and _has_window(model) else None
    if architecture == "llama":
        biases = not model.disable_bias_linear
        return {"attention_bias": biases, "mlp_bias": biases}
    if architecture == "mistral":
        return {"sliding_window": width}
    sliding = [model.layer_window(layer) is not None for layer in range(model.num_layers)]
    sliding = sliding if width is not None else [False] * model.num_layers
    entries: dict[str, Any] = {
        "use_sliding_window": width is not None,
        "sliding_window": width,
        # Read by those who do not know layer_types: the first layer of the window.
        "max_window_layers": [*sliding, True].index(True),
        "layer_types": ["sliding_attention" if x else "full_attention" for x in sliding],
    }
    return entries if architecture == "qwen2" else {**entries, "attention_bias": False}
