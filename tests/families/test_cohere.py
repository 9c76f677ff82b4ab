"""Command-R and Command-R7B: what their config.json sets, and what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.families.literal import check, differs, read, refused

COMMAND_R_PLUS: dict[str, Any] = {
    "architectures": ["CohereForCausalLM"],
    "model_type": "cohere",
    "attention_bias": False,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "hidden_size": 12288,
    "intermediate_size": 33792,
    "layer_norm_eps": 1e-05,
    "logit_scale": 0.8333333333333334,
    "max_position_embeddings": 8192,
    "model_max_length": 131072,
    "num_attention_heads": 96,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "pad_token_id": 0,
    "rope_theta": 75000000.0,
    "use_qk_norm": True,
    "vocab_size": 256000,
}
COMMAND_R7B: dict[str, Any] = {
    "architectures": ["Cohere2ForCausalLM"],
    "model_type": "cohere2",
    "attention_bias": False,
    "cache_implementation": "hybrid",
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "layer_norm_eps": 1e-05,
    "layer_switch": 4,
    "logit_scale": 0.25,
    "max_position_embeddings": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "order_of_interleaved_layers": "local_attn_first",
    "position_embedding_type": "rope_gptj",
    "rope_scaling": None,
    "rope_theta": 50000,
    "rotary_pct": 1.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "use_embedding_sharing": True,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_parallel_embedding": True,
    "vocab_size": 256000,
}
WHOLE = tuple(range(3, 32, 4))


def test_command_r_plus(tmp_path: Path) -> None:
    written = check(
        tmp_path,
        COMMAND_R_PLUS,
        normalization="LayerNorm",
        norm_bias="none",
        norm_epsilon=1e-5,
        parallel_residual=True,
        rotary_interleaved=True,
        rotary_base=75000000.0,
        logit_multiplier=0.8333333333333334,
        qk_layernorm=True,
        qk_norm_scope="each_head",
        has_qkv_bias=False,
        untie_embeddings_and_output_weights=False,
    )
    # Ids of tokens are those of the tokenizer; the length is another program's.
    differing = {"bos_token_id", "pad_token_id", "model_max_length"}
    for key in COMMAND_R_PLUS.keys() - differing:
        assert written[key] == COMMAND_R_PLUS[key], key
    assert "rms_norm_eps" not in written


def test_command_r_has_defaults_of_its_own(tmp_path: Path) -> None:
    said = {"logit_scale", "layer_norm_eps", "num_key_value_heads", "use_qk_norm", "rope_theta"}
    entries = {key: COMMAND_R_PLUS[key] for key in COMMAND_R_PLUS.keys() - said}
    written = check(
        tmp_path,
        {**entries, "attention_bias": True, "tie_word_embeddings": False},
        logit_multiplier=0.0625,
        norm_epsilon=1e-5,
        num_kv_heads=96,
        qk_layernorm=False,
        rotary_base=500000.0,
        add_qkv_bias=True,
        add_attention_output_bias=True,
        has_mlp_bias=False,
        untie_embeddings_and_output_weights=True,
    )
    assert (written["attention_bias"], written["use_qk_norm"]) == (True, False)


def test_command_r7b_rotates_the_layers_with_a_window(tmp_path: Path) -> None:
    sliding = tuple(layer for layer in range(32) if layer not in WHOLE)
    written = check(
        tmp_path,
        COMMAND_R7B,
        window_size=(4095, 0),
        window_layers=sliding,
        no_rope_layers=WHOLE,
        logit_multiplier=0.25,
        rotary_base=50000.0,
        parallel_residual=True,
        norm_bias="none",
        untie_embeddings_and_output_weights=False,
    )
    assert written["layer_types"] == (["sliding_attention"] * 3 + ["full_attention"]) * 8
    assert written["sliding_window"] == 4096
    kinds = ["full_attention", "sliding_attention"] * 16
    check(tmp_path, {**COMMAND_R7B, "layer_types": kinds}, no_rope_layers=tuple(range(0, 32, 2)))
    everywhere = {"layer_types": ["sliding_attention"] * 32, "sliding_window": 9}
    check(
        tmp_path,
        {**COMMAND_R7B, **everywhere},
        window_size=(8, 0),
        window_layers=None,
        no_rope_layers=None,
    )
    nowhere = {"layer_types": ["full_attention"] * 32}
    check(
        tmp_path,
        {**COMMAND_R7B, **nowhere},
        window_size=None,
        no_rope_layers=tuple(range(32)),
    )


def test_layers_without_window_that_rotate_are_no_command_r7b(tmp_path: Path) -> None:
    model = read(tmp_path, COMMAND_R7B).model
    differs(replace(model, no_rope_layers=WHOLE[:-1]), "--no-rope-layers")


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({**COMMAND_R_PLUS, "logit_scale": 0}, "logit_scale is 0, but must be greater than 0"),
        ({**COMMAND_R_PLUS, "hidden_act": "gelu"}, "hidden_act is"),
        ({**COMMAND_R_PLUS, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which"),
        ({**COMMAND_R7B, "sliding_window": None}, "sliding_window is null, but"),
        ({**COMMAND_R7B, "position_embedding_type": "alibi"}, "position_embedding_type is"),
        ({**COMMAND_R7B, "use_qk_norm": True}, "use_qk_norm is true, which is not supported"),
        ({**COMMAND_R7B, "layer_switch": 3}, "layer_switch is 3, which is not supported"),
        ({**COMMAND_R7B, "layer_types": ["full_attention"]}, "must be a list of 32 entries"),
    ],
)
def test_refused(tmp_path: Path, entries: dict[str, Any], told: str) -> None:
    refused(tmp_path, entries, told)
