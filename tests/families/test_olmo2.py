"""OLMo 2 and 3: config.json of published models as flags and back; what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.errors import ConfigError
from tests.families.case import FULL, SLIDING
from tests.families.literal import model_of, written

OLMO2: dict[str, Any] = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 16,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}
YARN = {
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "yarn",
}
OLMO3: dict[str, Any] = {
    **OLMO2,
    "architectures": ["Olmo3ForCausalLM"],
    "model_type": "olmo3",
    "max_position_embeddings": 65536,
    "num_hidden_layers": 8,
    "layer_types": [*[SLIDING] * 3, FULL] * 2,
    "sliding_window": 4096,
    "rope_scaling": YARN,
}


def test_olmo2(tmp_path: Path) -> None:
    model = model_of(tmp_path, OLMO2)
    assert (model.norm_placement, model.qk_layernorm, model.qk_norm_scope) == (
        *("post", True),
        "all_heads",
    )
    biases = model.has_qkv_bias, model.has_attention_output_bias, model.has_mlp_bias
    assert not any(biases)
    entries = written(model, "olmo2")
    assert {key: entries[key] for key in OLMO2} == OLMO2
    biased = model_of(tmp_path, OLMO2, attention_bias=True)
    assert biased.has_qkv_bias
    assert biased.has_attention_output_bias
    assert not biased.has_mlp_bias
    assert written(biased, "olmo2")["attention_bias"]


def test_olmo3_scales_the_layers_without_a_window(tmp_path: Path) -> None:
    model = model_of(tmp_path, OLMO3)
    assert (model.window_size, model.window_layers) == ((4095, 0), (0, 1, 2, 4, 5, 6))
    assert (model.rotary_base, model.rope_type) == (500000.0, "yarn")
    assert model.window_rotary_base == 500000.0
    assert model.rope_attention_factor == YARN["attention_factor"]
    entries = written(model, "olmo3")
    expected = {**YARN, "truncate": True}
    assert {key: entries[key] for key in OLMO3} == {**OLMO3, "rope_scaling": expected}
    assert entries["rope_parameters"] == {
        FULL: {**expected, "rope_theta": 500000.0},
        SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
    }
    new = {"rope_parameters": entries["rope_parameters"], "rope_scaling": None, "rope_theta": None}
    assert model_of(tmp_path, OLMO3, **new) == model


def test_olmo3_has_a_window_on_three_of_four_layers(tmp_path: Path) -> None:
    entries = {key: x for key, x in OLMO3.items() if key not in ("layer_types", "sliding_window")}
    model = model_of(tmp_path, entries, rope_scaling=None)
    assert (model.window_size, model.window_layers) == ((4095, 0), (0, 1, 2, 4, 5, 6))
    assert model.window_rotary_base is None


def test_olmo3_may_scale_all_layers(tmp_path: Path) -> None:
    """A run that extends the context of a model without scaling scales all layers."""
    scaled = replace(model_of(tmp_path, OLMO3), window_rotary_base=None)
    entries = written(scaled, "olmo3")
    assert entries["rope_parameters"][SLIDING] == entries["rope_parameters"][FULL]
    # transformers 4 cannot, and refuses a scaling without a type.
    assert entries["rope_scaling"] == {"rope_theta": 500000.0}
    assert written(replace(scaled, window_rotary_base=9.0), "olmo3")["rope_scaling"].keys() == {
        "rope_theta"
    }


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_theta": 10000.0}, "rope_theta is 10000.0, .*transformers 4 and 5 rotate"),
        ({"sliding_window": None}, "sliding_window is null, but must be a whole number"),
        ({"layer_types": [FULL, "chunked_attention"] * 4}, "layer_types is .*not supported"),
        ({"rope_local_base_freq": 10000.0}, "rope_local_base_freq is 10000.0, which is not"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters is .*not supported",
        ),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_refused(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        model_of(tmp_path, OLMO3, **changes)
