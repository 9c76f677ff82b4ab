"""EXAONE 4: config.json of published models as flags and back; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import to_hf_config
from tests.families.case import FULL, SLIDING
from tests.families.literal import model_of, written

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXAONE4: dict[str, Any] = {
    "architectures": ["Exaone4ForCausalLM"],
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 27392,
    "layer_types": [*[SLIDING] * 3, FULL] * 2,
    "max_position_embeddings": 131072,
    "model_type": "exaone4",
    "num_attention_heads": 40,
    "num_hidden_layers": 8,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": LLAMA3,
    "rope_theta": 1000000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "tie_word_embeddings": False,
    "vocab_size": 102400,
}


def test_layers_without_a_window_do_not_rotate(tmp_path: Path) -> None:
    model = model_of(tmp_path, EXAONE4)
    assert (model.window_size, model.window_layers) == ((4095, 0), (0, 1, 2, 4, 5, 6))
    assert model.no_rope_layers == (3, 7)
    assert (model.rope_type, model.window_rotary_base) == ("llama3", None)
    assert (model.norm_placement, model.qk_layernorm, model.qk_norm_scope) == ("post", True, "head")
    entries = written(model, "exaone4")
    old = {key: value for key, value in EXAONE4.items() if key != "sliding_window_pattern"}
    assert {key: entries[key] for key in old} == old
    assert entries["rope_parameters"] == {**LLAMA3, "rope_theta": 1000000.0}


def test_without_a_window_all_layers_rotate(tmp_path: Path) -> None:
    none = {"sliding_window": None, "sliding_window_pattern": None}
    for kinds in (None, [FULL] * 8):
        model = model_of(tmp_path, EXAONE4, **none, layer_types=kinds)
        assert (model.window_size, model.no_rope_layers) == (None, None)
    entries = written(model, "exaone4")
    assert (entries["sliding_window"], entries["layer_types"]) == (None, [FULL] * 8)


def test_a_pattern_in_place_of_layer_types(tmp_path: Path) -> None:
    assert model_of(tmp_path, EXAONE4, layer_types=None, sliding_window_pattern=4) == model_of(
        tmp_path, EXAONE4
    )
    model = model_of(tmp_path, EXAONE4, layer_types=None, sliding_window_pattern=3)
    assert (model.window_layers, model.no_rope_layers) == ((0, 1, 3, 4, 6, 7), (2, 5))


def test_all_layers_or_none_have_the_window(tmp_path: Path) -> None:
    model = model_of(tmp_path, EXAONE4, layer_types=[SLIDING] * 8)
    assert (model.window_size, model.window_layers, model.no_rope_layers) == ((4095, 0), None, None)
    assert written(model, "exaone4")["layer_types"] == [SLIDING] * 8
    model = model_of(tmp_path, EXAONE4, layer_types=[FULL] * 8)
    assert (model.window_size, model.no_rope_layers) == (None, tuple(range(8)))
    assert written(model, "exaone4")["sliding_window"] is not None


def test_rotation_and_windows_that_the_family_does_not_combine(tmp_path: Path) -> None:
    model = replace(model_of(tmp_path, EXAONE4), no_rope_layers=(0,))
    with pytest.raises(ConfigError, match="Exaone4ForCausalLM, differs in this flag") as caught:
        to_hf_config(model, vocab_size=102400, seq_length=8, eod=2)
    assert caught.value.flag == "--no-rope-layers"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layer_types": None}, 'sliding_window_pattern is "LLLG", but must be a whole number'),
        ({"sliding_window": None}, "sliding_window is null, but must be a whole number"),
        ({"layer_types": [FULL]}, "layer_types is .*a list of 8 entries"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model_of(tmp_path, EXAONE4, **changes)
