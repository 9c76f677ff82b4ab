"""Rotary embeddings in config.json: shares of a head, bases by layer, keys of a family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.errors import ConfigError
from cp_megatron.families.json_fields import JsonFields
from cp_megatron.families.rope_fields import read_rope, write_rope

LINEAR = {"rope_type": "linear", "factor": 4.0}
MODEL = ModelConfig(
    position_embedding_type="rope",
    rotary_base=900.0,
    rope_type="linear",
    rope_scaling_factor=4.0,
    max_position_embeddings=64,
    window_size=(4, 0),
)
READ = {"rotary_base": 900.0, "rope_type": "linear", "rope_scaling_factor": 4.0}


def read(
    value: dict[str, Any], defaults: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    return read_rope(JsonFields(Path(), value, defaults=defaults or {}), 64, **options)


@pytest.mark.parametrize(
    ("value", "share"),
    [
        ({}, 0.25),
        ({"partial_rotary_factor": 0.5}, 0.5),
        ({"rope_parameters": {"partial_rotary_factor": 0.75}, "partial_rotary_factor": 0.5}, 0.75),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 1}, 1.0),
    ],
)
def test_the_share_that_is_rotated(value: dict[str, Any], share: float) -> None:
    """transformers 4 has it beside the object, transformers 5 in it."""
    assert read(value, {"partial_rotary_factor": 0.25})["rotary_percent"] == share


def test_a_family_without_shares_refuses_them() -> None:
    assert "rotary_percent" not in read({"partial_rotary_factor": 1.0})
    for value in ({"partial_rotary_factor": 0.5}, {"rope_scaling": {"partial_rotary_factor": 0.5}}):
        with pytest.raises(ConfigError, match=r"partial_rotary_factor is 0.5.*whole heads are rot"):
            read(value)
    with pytest.raises(ConfigError, match="greater than 0 and at most 1"):
        read({"partial_rotary_factor": 1.5}, {"partial_rotary_factor": 1.0})


def test_both_generations_of_two_bases_say_the_same() -> None:
    old = {"rope_theta": 900.0, "rope_local_base_freq": 50.0, "rope_scaling": LINEAR}
    window = {"rope_type": "default", "rope_theta": 50.0}
    new = {"full_attention": {**LINEAR, "rope_theta": 900.0}, "sliding_attention": window}
    for value in (old, {"rope_parameters": new}, {**old, "rope_parameters": new}):
        assert read(value, window_base=10.0) == {**READ, "window_rotary_base": 50.0}
    assert read({}, {"rope_theta": 7.0}, window_base=5.0) == {
        "rotary_base": 7.0,
        "rope_type": "default",
        "window_rotary_base": 5.0,
    }
    # Layers that rotate alike need no second base; the same base without the scaling is one.
    same = {"full_attention": new["full_attention"], "sliding_attention": new["full_attention"]}
    assert read({"rope_parameters": same}, window_base=5.0) == READ
    assert read({"rope_theta": 5.0}, window_base=5.0)["rotary_base"] == 5.0
    assert "window_rotary_base" not in read({"rope_theta": 5.0}, window_base=5.0)
    plain = {"rope_theta": 5.0, "rope_scaling": LINEAR}
    assert read(plain, window_base=5.0)["window_rotary_base"] == 5.0


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        (LINEAR, "objects full_attention and sliding_attention"),
        ({"sliding_attention": LINEAR}, "the frequencies of windows are unscaled"),
        ({"full_attention": 3}, "must be an object"),
        ({"sliding_attention": {"factor": 2.0}}, r"sliding_attention.factor is 2.0"),
    ],
)
def test_two_bases_that_are_refused(parameters: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read({"rope_parameters": parameters}, window_base=10.0)
    with pytest.raises(ConfigError, match="rope_parameters"):
        read({"rope_parameters": {"full_attention": LINEAR}})


def test_what_is_written_is_read_back() -> None:
    model = replace(MODEL, window_rotary_base=50.0, rotary_percent=0.5)
    found = read(
        write_rope(model, partial=True, by_layer=True),
        {"partial_rotary_factor": 1.0},
        window_base=10.0,
    )
    assert found == {**READ, "window_rotary_base": 50.0, "rotary_percent": 0.5}


def test_keys_of_a_family() -> None:
    more = {"beta": "query_temperature_beta", "comment": None}
    value = {"rope_scaling": {**LINEAR, "beta": 0.1, "comment": 3}, "rope_theta": 900.0}
    assert read(value, more=more) == {**READ, "query_temperature_beta": 0.1}
    with pytest.raises(ConfigError, match=r"rope_scaling.beta is 0.1"):
        read(value)
    written = write_rope(replace(MODEL, query_temperature_beta=0.3), more=more)
    assert written["rope_scaling"] == {**LINEAR, "beta": 0.3}
