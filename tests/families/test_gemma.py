"""Gemma, Gemma 2 and Gemma 3: what their config.json sets, what is written, what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families.case import FULL, SLIDING
from tests.families.literal import check, differs, read, refused

GEMMA_2B: Mapping[str, Any] = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2_27B: Mapping[str, Any] = {
    **GEMMA_2B,
    "architectures": ["Gemma2ForCausalLM"],
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 128,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "model_type": "gemma2",
    "num_attention_heads": 32,
    "num_hidden_layers": 46,
    "num_key_value_heads": 16,
    "query_pre_attn_scalar": 144,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
}
GEMMA3_1B: Mapping[str, Any] = {
    **GEMMA_2B,
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "hidden_act": None,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
LINEAR = {"rope_type": "linear", "factor": 8.0}
MORE_THAN_TEXT = "Gemma3ForConditionalGener.* a folder of its language model alone may be supported"
SHARED = {
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "apply_layernorm_1p": True,
    "geglu": True,
    "swiglu": False,
    "disable_bias_linear": True,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
}


def test_gemma_2b(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        GEMMA_2B,
        **SHARED,
        norm_placement="pre",
        embedding_multiplier=2048**0.5,
        num_kv_heads=1,
        head_dim=256,
        score_scale=1 / 16,
        attn_logit_softcapping=None,
        window_size=None,
        rotary_base=10000.0,
    )
    same = GEMMA_2B.keys() - {"hidden_act", "bos_token_id"}
    assert {key: written[key] for key in same} == {key: GEMMA_2B[key] for key in same}
    assert written["hidden_act"] == "gelu_pytorch_tanh"
    for activation in ("gelu_pytorch_tanh", None):
        assert read(tmp_path, {**GEMMA_2B, "hidden_act": activation}).model.geglu


def test_gemma_2_27b(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        GEMMA2_27B,
        **SHARED,
        norm_placement="both",
        embedding_multiplier=4608**0.5,
        softmax_scale=1 / 12,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        window_size=(4095, 0),
        window_layers=tuple(range(0, 46, 2)),
        window_rotary_base=None,
        qk_layernorm=False,
    )
    same = GEMMA2_27B.keys() - {"bos_token_id", "cache_implementation", "sliding_window_size"}
    assert {key: written[key] for key in same} == {key: GEMMA2_27B[key] for key in same}
    assert written["layer_types"] == [SLIDING, FULL] * 23


def test_gemma_3_1b_in_both_generations_of_keys(tmp_path: Path) -> None:
    flags = {
        "norm_placement": "both",
        "qk_layernorm": True,
        "qk_norm_scope": "head",
        "embedding_multiplier": 1152**0.5,
        "score_scale": 1 / 16,
        "final_logit_softcapping": None,
        "rotary_base": 1000000.0,
        "window_rotary_base": 10000.0,
        "rope_type": "default",
        "window_size": (511, 0),
        "window_layers": (0, 1, 2, 3, 4, 6, 7),
    }
    written = check(tmp_path, GEMMA3_1B, **SHARED, **flags)
    changed = {"hidden_act", "bos_token_id", "cache_implementation", "sliding_window_pattern"}
    same = GEMMA3_1B.keys() - changed
    assert {key: written[key] for key in same} == {key: GEMMA3_1B[key] for key in same}
    assert written["layer_types"] == [*[SLIDING] * 5, FULL, SLIDING, SLIDING]
    assert written["rope_parameters"] == {
        FULL: {"rope_type": "default", "rope_theta": 1000000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    }
    older = {"rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"}
    newer = {key: value for key, value in GEMMA3_1B.items() if key not in older}
    newer |= {key: written[key] for key in ("layer_types", "rope_parameters")}
    assert check(tmp_path, newer, **flags) == written


def test_only_layers_without_a_window_are_scaled(tmp_path: Path) -> None:
    flags = {"rope_type": "linear", "rope_scaling_factor": 8.0, "window_rotary_base": 10000.0}
    written = check(tmp_path, {**GEMMA3_1B, "rope_scaling": LINEAR}, **flags)
    assert written["rope_scaling"] == LINEAR
    assert written["rope_parameters"] == {
        FULL: {**LINEAR, "rope_theta": 1000000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    }


@pytest.mark.parametrize("entries", [GEMMA_2B, GEMMA2_27B, GEMMA3_1B])
def test_what_is_left_out_means_the_defaults_of_transformers(
    entries: Mapping[str, Any], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = ("architectures", "model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    few: dict[str, Any] = {key: entries[key] for key in sizes} | {"hidden_act": None}
    model = read(tmp_path, few).model
    del few["hidden_act"]
    whole = transformers.AutoConfig.for_model(few.pop("model_type"), **few).to_dict()
    found = read(tmp_path, {"hidden_act": None, **whole})
    assert found.model == model
    assert found.unread == ()


@pytest.mark.parametrize("entries", [GEMMA_2B, GEMMA2_27B, GEMMA3_1B])
def test_biases_and_softcaps(entries: Mapping[str, Any], tmp_path: Path) -> None:
    changes = {"attention_bias": True, "tie_word_embeddings": False}
    flags = {"has_qkv_bias": True, "has_attention_output_bias": True, "has_mlp_bias": False}
    if entries is not GEMMA_2B:
        changes["final_logit_softcapping"] = flags["final_logit_softcapping"] = 20.0
    if entries is GEMMA2_27B:
        changes["attn_logit_softcapping"] = flags["attn_logit_softcapping"] = None
    written = check(tmp_path, {**entries, **changes}, **flags)
    assert {key: written[key] for key in changes} == changes


REFUSED: list[tuple[Mapping[str, Any], dict[str, Any], str]] = [
    (GEMMA_2B, {"hidden_act": "silu"}, 'hidden_act is "silu", which is not supported'),
    (GEMMA_2B, {"hidden_activation": "gelu"}, 'hidden_activation is "gelu", which is not'),
    (GEMMA_2B, {"use_bidirectional_attention": True}, "a token then reads those that follow it"),
    (GEMMA2_27B, {"hidden_activation": "gelu"}, "works: .gelu_pytorch_tanh"),
    (GEMMA2_27B, {"hidden_act": "relu"}, 'hidden_act is "relu", which is not supported'),
    (GEMMA2_27B, {"query_pre_attn_scalar": 14.5}, "query_pre_attn_scalar is 14.5, but must be a"),
    (GEMMA2_27B, {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is null, but must"),
    (GEMMA2_27B, {"attn_logit_softcapping": 0}, "attn_logit_softcapping is 0, but must be great"),
    (GEMMA2_27B, {"final_logit_softcapping": -1}, "final_logit_softcapping is -1, but must be"),
    (GEMMA3_1B, {"sliding_window": None}, "sliding_window is null, but must be a whole"),
    (GEMMA2_27B, {"sliding_window_size": 512}, "sliding_window_size is 512, which is not supp"),
    (GEMMA2_27B, {"sliding_window_pattern": 6}, "transformers does not read it in Gemma 2"),
    (GEMMA2_27B, {"layer_types": [FULL]}, "must be a list of 46 entries, one per layer"),
    (GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "does not apply it in Gemma 3 .works: null"),
    (GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    (GEMMA3_1B, {"layer_types": ["chunked_attention"] * 8}, "layer_types is .* not supported"),
    (
        GEMMA3_1B,
        {"rope_parameters": {FULL: LINEAR, SLIDING: LINEAR}},
        'sliding_attention.rope_type is "linear", which is not supported',
    ),
]


@pytest.mark.parametrize(("entries", "changes", "told"), REFUSED)
def test_refused(
    tmp_path: Path, entries: Mapping[str, Any], changes: dict[str, Any], told: str
) -> None:
    refused(tmp_path, {**entries, **changes}, told)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"embedding_multiplier": 34.0}, "--embedding-multiplier"),
        ({"softmax_scale": 0.0631}, "--softmax-scale"),  # 1 / sqrt(251.17)
        ({"attn_logit_softcapping": 50.0}, "--attn-logit-softcapping"),
        ({"apply_layernorm_1p": False}, "--no-apply-layernorm-1p"),
        ({"geglu": False, "swiglu": True}, "--swiglu"),
        ({"norm_placement": "pre"}, "--norm-placement"),
    ],
)
def test_an_export_that_would_compute_otherwise(
    changes: dict[str, Any], flag: str, tmp_path: Path
) -> None:
    model = read(tmp_path, GEMMA3_1B).model
    differs(replace(model, **changes), flag)


def test_gemma_3_with_images(tmp_path: Path) -> None:
    """The text is a model of its own."""
    entries = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
    refused(tmp_path, {**entries, "text_config": dict(GEMMA3_1B)}, MORE_THAN_TEXT)


def test_the_names_of_the_norms(tmp_path: Path) -> None:
    found = read(tmp_path, GEMMA3_1B)
    tensors = found.family.tensors(found.model, vocab_size=262144, seq_length=8)
    held = {tensor.key: [part.name for part in tensor.parts] for tensor in tensors}
    layer = "model.layers.7."
    assert {key: held[f"{layer}{key}.weight"] for key in NORMS} == {
        key: [f"layers.7.{name}.weight"] for key, name in NORMS.items()
    }
    assert len(held) == 8 * 13 + 2


NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "self_attn.q_norm": "attention.query_norm",
    "self_attn.k_norm": "attention.key_norm",
}
