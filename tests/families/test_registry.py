"""Models that no family, or not the one that is asked for, can have are refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config.files.presets import PRESETS
from cp_megatron.errors import ConfigError
from cp_megatron.families.registry import check_model_type, to_hf_config
from cp_megatron.preflight.rope_rules import check_rope

MODEL = PRESETS["toy"].model


def test_a_number_that_no_family_can_have() -> None:
    model = replace(MODEL, init_method_std=1e300)
    with pytest.raises(ConfigError, match=r"no supported .* initializer_range is 1e\+300"):
        to_hf_config(model, vocab_size=300, seq_length=8, eod=1)


def test_a_scale_whose_square_has_no_reciprocal() -> None:
    family, _ = to_hf_config(
        replace(MODEL, softmax_scale=1e-29), vocab_size=300, seq_length=8, eod=1
    )
    assert family.model_type == "granite"
    with pytest.raises(ConfigError, match="--softmax-scale 1e-200: no supported"):
        to_hf_config(replace(MODEL, softmax_scale=1e-200), vocab_size=300, seq_length=8, eod=1)


def test_longrope_without_its_length_is_left_to_the_check_of_rope() -> None:
    factors = (1.0,) * (MODEL.head_dim // 2)
    model = replace(
        MODEL,
        rope_type="longrope",
        rope_short_factor=factors,
        rope_long_factor=factors,
        hf_model_type="phi3",
    )
    check_model_type(model, seq_length=8, is_asked=True)
    with pytest.raises(ConfigError, match="--original-max-position-embeddings"):
        check_rope(model, 8, frozenset())
