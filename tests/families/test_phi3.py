"""Phi-3, 3.5 and 4: config.json of published models as flags and back; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import read_hf_config
from tests.families.literal import model_of, written

SHORT, LONG = [1.0 + n / 100 for n in range(48)], [2.0 + n for n in range(48)]
MINI_128K: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"long_factor": LONG, "short_factor": SHORT, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}


def test_the_long_model(tmp_path: Path) -> None:
    model = model_of(tmp_path, MINI_128K)
    assert read_hf_config(tmp_path).unread == ()
    assert (model.rope_type, model.rope_scaling_factor) == ("longrope", 32.0)
    assert model.original_max_position_embeddings == 4096
    assert (model.rope_short_factor, model.rope_long_factor) == (tuple(SHORT), tuple(LONG))
    assert (model.window_size, model.window_layers) == ((262143, 0), None)
    assert (model.rotary_percent, model.norm_epsilon, model.head_dim) == (1.0, 1e-5, 96)
    assert model.disable_bias_linear
    assert model.untie_embeddings_and_output_weights


def test_both_generations_of_transformers_read_what_is_written(tmp_path: Path) -> None:
    entries = written(model_of(tmp_path, MINI_128K), "phi3")
    assert {key: entries.get(key) for key in MINI_128K if key != "attention_bias"} == {
        key: value for key, value in MINI_128K.items() if key != "attention_bias"
    }
    assert entries["rope_parameters"] == {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 4096,
        "factor": 32.0,
        "short_factor": SHORT,
        "long_factor": LONG,
    }


def test_what_the_lengths_do_not_say_is_written_where_version_5_looks_first(tmp_path: Path) -> None:
    model = replace(
        model_of(tmp_path, MINI_128K), rope_attention_factor=1.25, rope_scaling_factor=8.0
    )
    scaling = written(model, "phi3")["rope_scaling"]
    assert (scaling["factor"], scaling["attention_factor"]) == (8.0, 1.25)
    assert scaling.keys() == {
        *("type", "short_factor", "long_factor"),
        *("factor", "attention_factor"),
    }


def test_partial_rotary_of_phi_4_mini(tmp_path: Path) -> None:
    factors = {"type": "longrope", "short_factor": [1.0] * 36, "long_factor": [2.0] * 36}
    model = model_of(tmp_path, MINI_128K, partial_rotary_factor=0.75, rope_scaling=factors)
    assert (model.rotary_percent, model.rotary_dim) == (0.75, 72)
    entries = written(model, "phi3")
    assert entries["partial_rotary_factor"] == 0.75
    assert entries["rope_parameters"]["partial_rotary_factor"] == 0.75
    within = {**factors, "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    assert model_of(tmp_path, MINI_128K, rope_scaling=None, rope_parameters=within) == model


def test_the_first_name_of_longrope(tmp_path: Path) -> None:
    scaling = {**MINI_128K["rope_scaling"], "type": "su"}
    assert model_of(tmp_path, MINI_128K, rope_scaling=scaling) == model_of(tmp_path, MINI_128K)


def test_dropout(tmp_path: Path) -> None:
    model = model_of(tmp_path, MINI_128K, resid_pdrop=0.1, embd_pdrop=0.1)
    assert model.hidden_dropout == 0.1
    assert (written(model, "phi3")["resid_pdrop"], written(model, "phi3")["embd_pdrop"]) == (
        0.1,
        0.1,
    )


def test_a_missing_original_length_is_the_default_of_transformers(tmp_path: Path) -> None:
    model = model_of(tmp_path, MINI_128K, original_max_position_embeddings=None)
    assert model.original_max_position_embeddings == 131072  # a null is no default
    entries = {key: value for key, value in MINI_128K.items() if not key.startswith("original")}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert read_hf_config(tmp_path).model.original_max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"attention_bias": True}, "attention_bias is true, which is not supported"),
        ({"lm_head_bias": True}, "lm_head_bias is true, which is not supported"),
        ({"resid_pdrop": 0.1}, "embd_pdrop is 0.0, .*resid_pdrop must be the same"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling is .*Phi-3 knows no other type",
        ),
        ({"head_dim": 64}, "head_dim is 64, .*hidden_size / num_attention_heads"),
        ({"partial_rotary_factor": 0.7}, "rotates 67 channels of a head, which must be even"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model_of(tmp_path, MINI_128K, **changes)
