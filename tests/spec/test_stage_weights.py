"""The weights of layers and ends add up to the FLOPs of the model, each by its own cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.plan import Mask
from cp_megatron.plan.stages import Stages
from cp_megatron.spec import ModelSpec, stage_weights
from tests.spec.test_linear_attention import MODEL as HYBRID


def spec_of(model: ModelConfig) -> ModelSpec:
    model = replace(model, make_vocab_size_divisible_by=1)
    return ModelSpec.of(model, vocab_size=64, seq_length=16)


@pytest.mark.parametrize("mask", [Mask.causal(16), Mask.documents([5, 11])])
@pytest.mark.parametrize("model", [PRESETS["toy-gpt"].model, PRESETS["toy"].model, HYBRID])
def test_they_add_up_to_the_models_flops(model: ModelConfig, mask: Mask) -> None:
    spec = spec_of(model)
    weights = stage_weights(spec, mask)
    whole = spec.training_flops(num_tokens=mask.seq_len, num_pairs=mask.pairs())
    assert sum(weights.layers) + weights.first + weights.last == whole
    assert weights.first == 0
    assert weights.last == 6 * 64 * model.hidden_size * mask.seq_len


def test_a_linear_layer_costs_the_same_per_token_at_any_length() -> None:
    spec, lengths = spec_of(HYBRID), (16, 64)
    short, long = (stage_weights(spec, Mask.causal(n)).layers for n in lengths)
    assert [4 * a == b for a, b in zip(short, long)] == [True, True, True, False]
    # 8 channels of queries and keys, and as many of values.
    pairs = [n * (n + 1) // 2 for n in lengths]
    matrices = (4 * 8 * 8 + 3 * 8 * 16) * 16
    assert short[3] == 6 * (matrices + 16 * pairs[0])
    assert long[3] == 6 * (4 * matrices + 16 * pairs[1])


def test_a_window_counts_its_own_pairs() -> None:
    model = replace(PRESETS["toy"].model, window_size=(2, 0), window_layers=(1,))
    spec = spec_of(model)
    windows = [layer.mixer.window for layer in spec.layers]
    assert set(windows) == {(2, 0), None}
    weights = stage_weights(spec, Mask.causal(16)).layers
    full, cut = (weights[windows.index(window)] for window in (None, (2, 0)))
    channels = spec.layers[0].mixer.pair_channels()
    assert full - cut == 6 * channels * (16 * 17 // 2 - (1 + 2 + 14 * 3))


def test_experts_count_as_many_as_a_token_has() -> None:
    model = replace(HYBRID, moe_ffn_hidden_size=8, moe_router_topk=2)
    few, many = (
        stage_weights(spec_of(replace(model, num_experts=n)), Mask.causal(16)).layers
        for n in (4, 8)
    )
    # Only the router is larger.
    assert [b - a for a, b in zip(few, many)] == [6 * 4 * 8 * 16] * 4


def test_the_split_of_a_hybrid_model_depends_on_the_length() -> None:
    """Three recurrences, then a layer that attends: on long rows it weighs more than they do."""
    spec = spec_of(HYBRID)
    for length, lengths in ((16, [2, 2]), (4096, [3, 1])):
        weights = stage_weights(spec, Mask.causal(length))
        found = Stages.split(weights.layers, first=weights.first, last=weights.last, num_stages=2)
        assert [len(chunk) for chunk in found.ranges] == lengths
