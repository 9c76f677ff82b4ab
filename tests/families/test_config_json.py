"""config.json as flags and back; whatever is malformed or not supported is refused."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cp_megatron.config import ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import FAMILIES, read_hf_config, to_hf_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": True,
    "eos_token_id": [2, 3],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


BY_TYPE = {family.model_type: family for family in FAMILIES}
UNREADABLE = {"deepseek_v2", "glm4_moe", "granitemoehybrid"}
"""Families whose config class by default has Mamba layers, heads that rope cannot rotate, or no
number of experts for a token."""


def read(folder: Path, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return read_hf_config(folder).model


def other(family: str, **changes: Any) -> dict[str, Any]:
    return {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **changes}


def test_a_llama(tmp_path: Path) -> None:
    model = read(tmp_path)
    assert (model.num_kv_heads, model.head_dim, model.ffn_size) == (2, 8, 48)
    assert model.rotary_base == 500.0
    assert not model.untie_embeddings_and_output_weights
    assert model.disable_bias_linear
    found = read_hf_config(tmp_path)
    assert (found.vocab_size, found.raw["eos_token_id"]) == (300, [2, 3])
    assert (model.vocab_size, model.max_position_embeddings) == (300, 64)


def test_both_generations_of_rope_say_the_same(tmp_path: Path) -> None:
    old = read(tmp_path, rope_scaling={"type": "yarn", "factor": 4.0, **YARN})
    new = read(tmp_path, rope_theta=None, rope_parameters={"rope_theta": 500.0, **YARN})
    assert old == new
    assert (new.rope_type, new.rope_scaling_factor, new.rotary_base) == ("yarn", 4.0, 500.0)


def test_windows_count_the_token_itself(tmp_path: Path) -> None:
    assert read(tmp_path, **other("Mistral", sliding_window=8)).window_size == (7, 0)
    assert read(tmp_path, **other("Mistral", sliding_window=None)).window_size is None
    window = {"use_sliding_window": True, "sliding_window": 8}
    assert read(tmp_path, **other("Qwen2", **window, max_window_layers=0)).window_size == (7, 0)
    assert read(tmp_path, **other("Qwen2", **window, max_window_layers=4)).window_size is None


def test_a_window_on_some_layers(tmp_path: Path) -> None:
    window = {"use_sliding_window": True, "sliding_window": 8}
    model = read(tmp_path, **other("Qwen2", **window, max_window_layers=2))
    assert (model.window_size, model.window_layers) == ((7, 0), (2, 3))
    assert (model.layer_window(1), model.layer_window(2), model.row_window) == (None, (7, 0), None)
    kinds = ["sliding_attention", "full_attention"] * 2
    # layer_types has the last word, as in transformers.
    model = read(tmp_path, **other("Qwen3", **window, max_window_layers=4, layer_types=kinds))
    assert (model.window_size, model.window_layers) == ((7, 0), (0, 2))
    whole = read(tmp_path, **other("Qwen3", **window, layer_types=["sliding_attention"] * 4))
    assert (whole.window_size, whole.window_layers) == ((7, 0), None)
    # Of a Mistral with layer_types, transformers makes a Ministral.
    model = read(tmp_path, **other("Mistral", sliding_window=8, layer_types=kinds))
    assert (model.window_size, model.window_layers) == ((7, 0), (0, 2))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GptBigOssForCausalLM"]}, "not known to compute it .works: LlamaForCaus"),
    ({"architectures": None, "model_type": "mamba"}, "not known to compute it .works: llama, qw"),
    ({"architectures": ["XForCausalLM"], "num_experts": 8}, "supported: it is a mixture of 8 exp"),
    ({"architectures": ["X"], "text_config": {"n_routed_experts": 4}}, "is a mixture of 4 experts"),
    ({"architectures": [3]}, "architectures"),
    ({"hidden_act": "gelu"}, 'hidden_act is "gelu", which is not supported .works: "silu"'),
    ({"quantization_config": {"bits": 4}}, "works: weights that are not quantized"),
    ({"compression_config": {"bits": 4}}, "works: weights that are not quantized"),
    ({"quantization": {"bits": 4}}, "works: weights that are not quantized"),  # of MLX
    ({"model_type": "granite"}, "transformers builds what model_type says .works: llama"),
    (
        {"architectures": ["Ministral3ForCausalLM"], "model_type": None, "rope_parameters": None},
        "rope_parameters is null, which transformers replaces by the rope of Ministral 3",
    ),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported"),
    ({"vocab_size": None}, "vocab_size is null, but must be a whole number from 1"),
    ({"vocab_size": 1e400}, "vocab_size"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
    ({"num_hidden_layers": True}, "num_hidden_layers"),
    ({"hidden_size": "32"}, "hidden_size"),
    ({"num_key_value_heads": 3}, "must divide num_attention_heads 4"),
    ({"head_dim": 7}, "must be even"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rope_theta": -1}, "rope_theta"),
    ({"rope_scaling": [1]}, "must be an object"),
    ({"rope_scaling": {"rope_type": "mrope"}}, 'rope_type is "mrope"'),
    ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, 'factor is "2"'),
    (
        {"rope_scaling": {"rope_type": "linear", "factor": 2, "more": 1}},
        "more is 1, which is not",
    ),
    (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": 1, "long_factor": [1.0]}},
        "short_factor is 1, but must be a list of positive numbers",
    ),
    ({"rope_scaling": {**YARN, "rope_type": "longrope"}}, "short_factor is missing"),
    ({"tie_word_embeddings": "yes"}, "must be true or false"),
    ({"sliding_window": 8}, "works: MistralForCausalLM"),
    (other("Mistral", layer_types=5), "layer_types is 5, but must be a list of 4 entries"),
    (other("Mistral", layer_types=["chunked_attention"] * 4), "which is not supported"),
    (
        other("Qwen2", layer_types=["sliding_attention"] * 4),
        "but use_sliding_window is false .works: full_attention",
    ),
    (
        other("Mistral", sliding_window=None, layer_types=["sliding_attention"] * 4),
        "sliding_window is null, but must be a whole number",
    ),
    ({"is_causal": False}, "is_causal is false, which is not supported"),
]


@pytest.mark.parametrize(("changes", "told"), REFUSED)
def test_refused_with_file_and_reason(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read(tmp_path, **changes)
    assert str(caught.value).startswith(f"--load-hf {tmp_path}: config.json")


DUAL = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
UNREAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({}, ()),
    (
        other("Qwen2", dual_chunk_attention_config=DUAL, attn_logit_softcapping=50.0),
        ("attn_logit_softcapping = 50.0", f"dual_chunk_attention_config = {json.dumps(DUAL)[:60]}"),
    ),
    ({"num_local_experts": 8, "clip_qkv": 6}, ("clip_qkv = 6", "num_local_experts = 8")),
    ({"embedding_multiplier": 12.0}, ("embedding_multiplier = 12.0",)),
    ({"embedding_multiplier": 1.0, "logit_scale": 1, "use_mrope": False, "clip_qkv": None}, ()),
    (other("Qwen3", sliding_window=4096, max_window_layers=28, use_sliding_window=False), ()),
    ({"layer_types": ["full_attention"] * 4, "attn_implementation": "sdpa"}, ()),
    ({"bos_token_id": 1, "transformers_version": "4.57.0", "pretraining_tp": 4, "top_k": 50}, ()),
]


@pytest.mark.parametrize(("changes", "told"), UNREAD)
def test_what_is_not_read_is_told(
    tmp_path: Path, changes: dict[str, Any], told: tuple[str, ...]
) -> None:
    read(tmp_path, **changes)
    assert read_hf_config(tmp_path).unread == told


@pytest.mark.parametrize("model_type", sorted(BY_TYPE.keys() - UNREADABLE))
def test_what_transformers_writes_is_read_or_without_effect(
    model_type: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    architecture = BY_TYPE[model_type].architecture
    config = transformers.CONFIG_MAPPING[model_type](architectures=[architecture])
    config.save_pretrained(tmp_path)
    assert read_hf_config(tmp_path).unread == ()
    old = json.loads((tmp_path / "config.json").read_text())
    # As version 4 wrote every config, with the defaults of all models.
    old |= {"chunk_size_feed_forward": 0, "output_attentions": False, "pruned_heads": {}}
    old |= {"is_decoder": False, "add_cross_attention": False, "cross_attention_hidden_size": None}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert read_hf_config(tmp_path).unread == ()


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "[" * 100_000, "\xff"])
def test_text_that_is_no_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_hf_config(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
KEYS = st.sampled_from(
    [
        *LLAMA,
        *("rope_scaling", "rope_parameters", "layer_types", "sliding_window", "head_dim"),
        *("use_sliding_window", "max_window_layers", "attention_dropout", "initializer_range"),
        *("original_max_position_embeddings", "bos_token_id", "hidden_act", "mlp_bias"),
    ]
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.dictionaries(KEYS, JSON, max_size=3),
    family=st.sampled_from(["Llama", "Mistral", "Qwen2", "Qwen3"]),
    rope=st.dictionaries(st.sampled_from(["rope_type", "factor", "short_factor", *YARN]), JSON),
)
def test_anything_is_read_or_refused(
    tmp_path: Path, changes: dict[str, Any], family: str, rope: dict[str, Any]
) -> None:
    with contextlib.suppress(ConfigError):
        read(tmp_path, **{**other(family), "rope_scaling": {**YARN, **rope}, **changes})


BASE = replace(PRESETS["toy"].model, vocab_size=300, max_position_embeddings=64, norm_epsilon=1e-6)
ROUND: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, biases": {"disable_bias_linear": False},
    "mistral": {"window_size": (7, 0)},
    "mistral, odd heads": {"hidden_size": 190, "kv_channels": 48},
    "qwen2": {"add_qkv_bias": True},
    "llama, attention biases": {"add_qkv_bias": True, "add_attention_output_bias": True},
    "llama, MLP biases": {"add_mlp_bias": True},
    "qwen3, biases": {
        "qk_layernorm": True,
        "kv_channels": 20,
        "add_qkv_bias": True,
        "add_attention_output_bias": True,
    },
    "qwen3": {"qk_layernorm": True, "kv_channels": 20, "window_size": (3, 0)},
    "qwen2, window on some": {
        "add_qkv_bias": True,
        "window_size": (3, 0),
        "window_layers": (0,),
    },
    "linear": {"rope_type": "linear", "rope_scaling_factor": 2.0},
    "dynamic": {
        "rope_type": "dynamic",
        "rope_scaling_factor": 2.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_scaling_factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16.0,
        "rope_truncate": False,
    },
    "longrope": {
        "rope_type": "longrope",
        "rope_scaling_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_short_factor": (1.0,) * 24,
        "rope_long_factor": (2.0,) * 24,
    },
}


@pytest.mark.parametrize("name", ROUND)
def test_what_is_written_is_read_back(tmp_path: Path, name: str) -> None:
    model = replace(BASE, **ROUND[name])
    family, written = to_hf_config(model, vocab_size=300, seq_length=48, eod=5)
    (tmp_path / "config.json").write_text(json.dumps(written))
    found = read_hf_config(tmp_path)
    assert found.raw["eos_token_id"] == 5
    assert found.family is family
    assert family.model_type == name.partition(",")[0] or model.rope_type == name
    filled = replace(
        model,
        ffn_hidden_size=model.ffn_size,
        kv_channels=model.head_dim,
        make_vocab_size_divisible_by=found.model.make_vocab_size_divisible_by,
        hf_model_type=family.model_type,
    )
    assert found.model == filled


def test_an_export_has_the_family_of_the_folder_if_that_has_such_a_model(tmp_path: Path) -> None:
    for family, chosen in (("Qwen2", "llama"), ("Mistral", "mistral"), ("Phi3", "phi3")):
        model = read(tmp_path, **other(family, sliding_window=None))
        unbiased = replace(model, add_qkv_bias=False)
        assert to_hf_config(unbiased, vocab_size=300, seq_length=8, eod=1)[0].model_type == chosen
        first = replace(unbiased, hf_model_type=None)
        assert to_hf_config(first, vocab_size=300, seq_length=8, eod=1)[0].model_type == "llama"


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"normalization": "LayerNorm", "window_size": (3, 0)}, "--window-size"),
        ({"window_size": (3, 0), "window_rotary_base": 50.0}, "--window-rotary-base"),
        ({"softmax_type": "learnable"}, "--softmax-type"),
        ({"v_head_dim": 16}, "--v-head-dim"),
        ({"swiglu": False}, "--no-swiglu"),
        ({"disable_bias_linear": False, "qk_layernorm": True}, "--no-disable-bias-linear"),
        ({"add_attention_output_bias": True, "qk_layernorm": True}, "--add-attention-output-bias"),
    ],
)
def test_what_no_architecture_has(changes: dict[str, Any], flag: str) -> None:
    with pytest.raises(ConfigError, match="no supported Hugging Face architecture") as caught:
        to_hf_config(replace(BASE, **changes), vocab_size=300, seq_length=8, eod=1)
    assert caught.value.flag == flag
