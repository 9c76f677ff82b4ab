"""Families that differ from Llama in a few keys of config.json: read, written back, refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config, to_hf_config
from tests.families.case import FULL, SLIDING

SIZES: Mapping[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BETA = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.2,
    "max_position_embeddings": 64,
}
# architecture, keys, flags, and the model type of the export
READ: Mapping[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "llama, attention biases": (
        "LlamaForCausalLM",
        {"attention_bias": True},
        {"add_qkv_bias": True, "add_attention_output_bias": True, "add_mlp_bias": False},
        "llama",
    ),
    "llama, MLP biases": (
        "LlamaForCausalLM",
        {"mlp_bias": True},
        {"add_qkv_bias": False, "add_mlp_bias": True, "disable_bias_linear": True},
        "llama",
    ),
    "falcon 3": (
        "LlamaForCausalLM",
        {"head_dim": 8, "mlp_bias": False, "attention_bias": False, "activation": "swiglu"},
        {"kv_channels": 8, "disable_bias_linear": True, "swiglu": True},
        "llama",
    ),
    "mistral, layer_types": (
        "MistralForCausalLM",
        {"sliding_window": 5, "layer_types": [FULL, SLIDING, FULL, SLIDING]},
        {"window_size": (4, 0), "window_layers": (1, 3)},
        "ministral",
    ),
    "ministral": (
        "MinistralForCausalLM",
        {"sliding_window": 5, "layer_types": [SLIDING, FULL, FULL, FULL]},
        {"window_size": (4, 0), "window_layers": (0,)},
        "ministral",
    ),
    "ministral, its default": (
        "MinistralForCausalLM",
        {"num_attention_heads": 8, "num_key_value_heads": 8, "sliding_window": 9},
        {"window_size": (8, 0), "window_layers": None},
        "ministral",
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        {"rope_parameters": {**BETA, "rope_theta": 7e5}, "head_dim": 12},
        {"query_temperature_beta": 0.2, "rotary_base": 7e5, "rope_type": "yarn"},
        "ministral3",
    ),
    "ministral3, as transformers 4": (
        "Ministral3ForCausalLM",
        {"rope_scaling": BETA, "sliding_window": 5},
        {"query_temperature_beta": 0.2, "window_size": (4, 0), "kv_channels": 128},
        "ministral3",
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"attention_bias": True},
        {"no_rope_layers": (3,), "rotary_base": 2e6, "add_attention_output_bias": True},
        "smollm3",
    ),
    "smollm3, windows": (
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5},
        {"no_rope_layers": (1, 3), "window_size": (4, 0), "window_layers": (1, 3)},
        "smollm3",
    ),
    "smollm3, a list": (
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [0, 1, 1, 0], "mlp_bias": True, "tie_word_embeddings": False},
        {"no_rope_layers": (0, 3), "add_mlp_bias": True},
        "smollm3",
    ),
    "internlm3": (
        "InternLM3ForCausalLM",
        {"qkv_bias": True, "bias": True, "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
        {"disable_bias_linear": False, "rope_scaling_factor": 6.0, "kv_channels": 128},
        "internlm3",
    ),
    "qwen3, biases": (
        "Qwen3ForCausalLM",
        {"attention_bias": True},
        {"add_qkv_bias": True, "add_attention_output_bias": True, "qk_layernorm": True},
        "qwen3",
    ),
}


def read(folder: Path, architecture: str, **keys: Any) -> ModelConfig:
    entries = {"architectures": [architecture], **SIZES, **keys}
    (folder / "config.json").write_text(json.dumps(entries))
    return read_hf_config(folder).model


@pytest.mark.parametrize("name", READ)
def test_what_is_read_is_written_and_read_back(tmp_path: Path, name: str) -> None:
    architecture, keys, flags, model_type = READ[name]
    model = read(tmp_path, architecture, **keys)
    assert {flag: getattr(model, flag) for flag in flags} == flags
    family, written = to_hf_config(model, vocab_size=300, seq_length=64, eod=2)
    assert family.model_type == model_type
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert read_hf_config(tmp_path).model == replace(model, hf_model_type=model_type)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Ministral3ForCausalLM", {"layer_types": [FULL] * 4}, "not read it in Ministral 3"),
    ("Ministral3ForCausalLM", {"rope_scaling": {**BETA, "more": 1}}, "rope_scaling.more is 1"),
    ("LlamaForCausalLM", {"rope_scaling": BETA}, "rope_scaling.llama_4_scaling_beta is 0.2"),
    ("MinistralForCausalLM", {"layer_types": [FULL]}, "a list of 4 entries, one per layer"),
    ("MinistralForCausalLM", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}, "a list of 4 entries 0 or 1"),
    ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 2]}, "a list of 4 entries 0 or 1"),
    ("SmolLM3ForCausalLM", {"layer_types": [SLIDING] * 4}, "but use_sliding_window is false"),
    ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "must be a whole number from 1"),
    ("InternLM3ForCausalLM", {"qkv_bias": True}, "all linear layers have biases or none"),
    ("InternLM3ForCausalLM", {"partial_rotary_factor": 0.5}, "whole heads are rotated"),
    ("Qwen3ForCausalLM", {"attention_bias": 1}, "must be true or false"),
]


@pytest.mark.parametrize(("architecture", "keys", "told"), REFUSED)
def test_refused_by_name(
    tmp_path: Path, architecture: str, keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, architecture, **keys)


def test_internlm3_as_transformers_saves_it(tmp_path: Path) -> None:
    """With the class of Llama, but with the defaults of InternLM3."""
    keys = {"model_type": "internlm3", "attention_bias": True, "mlp_bias": True}
    model = read(tmp_path, "LlamaForCausalLM", **keys)
    assert (model.kv_channels, model.disable_bias_linear) == (128, False)
    assert read_hf_config(tmp_path).family.model_type == "internlm3"


GPT2 = {"architectures": ["GPT2LMHeadModel"], "vocab_size": 300, "n_embd": 32, "n_head": 4}


def test_gpt2_and_its_defaults(tmp_path: Path) -> None:
    summary = {"summary_activation": None, "summary_first_dropout": 0.1, "n_ctx": 1024}
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, **summary}))
    found = read_hf_config(tmp_path)
    model = found.model
    assert (model.num_layers, model.ffn_size, model.max_position_embeddings) == (12, 128, 1024)
    assert (model.hidden_dropout, model.attention_dropout) == (0.1, 0.1)
    assert not model.untie_embeddings_and_output_weights
    assert found.unread == ()
    unscaled = {**GPT2, "scale_attn_weights": False, "reorder_and_upcast_attn": True}
    (tmp_path / "config.json").write_text(json.dumps(unscaled))
    model = read_hf_config(tmp_path).model
    assert model.score_scale == 1.0
    _, written = to_hf_config(model, vocab_size=300, seq_length=8, eod=1)
    assert (written["scale_attn_weights"], written["n_positions"]) == (False, 1024)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"activation_function": "gelu"}, r'is "gelu".*works: "gelu_pytorch_tanh"'),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"add_cross_attention": True}, "add_cross_attention is true"),
        ({"embd_pdrop": -0.2}, "embd_pdrop is -0.2, but must be a number from 0 to 1e30"),
    ],
)
def test_gpt2_keys_that_are_refused(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**GPT2, **keys}))
    with pytest.raises(ConfigError, match=told):
        read_hf_config(tmp_path)
