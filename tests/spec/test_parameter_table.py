"""Parameter counts against counts by hand and published ones."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.plan import Grid
from cp_megatron.spec.parameter_table import num_parameters, parameters_on_rank


def test_a_tiny_gpt_by_hand() -> None:
    model = ModelConfig(num_layers=1, hidden_size=4, num_attention_heads=2)
    embedding, positions = 8 * 4, 6 * 4
    attention = 4 * (4 * 4 + 4)
    mlp = (16 * 4 + 16) + (4 * 16 + 4)
    norms = 3 * 2 * 4
    expected = embedding + positions + attention + mlp + norms
    assert num_parameters(model, vocab_size=8, seq_length=6) == expected


def test_a_tiny_llama_by_hand() -> None:
    model = ModelConfig(
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        swiglu=True,
        position_embedding_type="rope",
        untie_embeddings_and_output_weights=True,
        disable_bias_linear=True,
    )
    attention = 8 * 8 + 2 * (4 * 8) + 8 * 8
    layer = attention + 3 * 12 * 8 + 2 * 8
    assert num_parameters(model, vocab_size=10, seq_length=6) == 2 * 10 * 8 + 2 * layer + 8


def test_biases_and_norms_of_heads() -> None:
    sizes = {"vocab_size": 10, "seq_length": 6}
    model = replace(
        PRESETS["toy"].model, num_layers=1, hidden_size=8, num_attention_heads=4, kv_channels=6
    )
    more = replace(model, add_qkv_bias=True, qk_layernorm=True)
    added = num_parameters(more, **sizes) - num_parameters(model, **sizes)
    assert added == (4 * 6 + 2 * 2 * 6) + 2 * 6


@pytest.mark.parametrize(
    ("preset", "vocab_size", "published"),
    [
        ("gpt2-small", 50_257, 124_439_808),
        ("llama-1b", 128_256, 1_235_814_400),
        ("llama3-8b", 128_256, 8_030_261_248),
    ],
)
def test_published_counts(preset: str, vocab_size: int, published: int) -> None:
    model = PRESETS[preset].model
    assert num_parameters(model, vocab_size=vocab_size, seq_length=1024) == published


@pytest.mark.parametrize(
    ("size", "unit", "padded"), [(257, 128, 384), (256, 128, 256), (257, 1, 257), (1, 128, 128)]
)
def test_the_vocabularys_padding(size: int, unit: int, padded: int) -> None:
    assert ModelConfig(make_vocab_size_divisible_by=unit).padded_vocab_size(size) == padded


@pytest.mark.parametrize("preset", ["toy-gpt", "toy"])
def test_sharding_over_dp_and_cp_loses_and_doubles_nothing(preset: str) -> None:
    sizes = {"vocab_size": 384, "seq_length": 1024}
    model = PRESETS[preset].model
    grid = Grid(dp=2, cp=3)
    held = [parameters_on_rank(model, **sizes, grid=grid, rank=rank) for rank in range(6)]
    assert sum(held) == num_parameters(model, **sizes)


def test_tensor_parallelism_splits_matrices_and_copies_the_rest() -> None:
    sizes = {"vocab_size": 384, "seq_length": 1024}
    model = PRESETS["toy-gpt"].model
    grid = Grid(tp=2)
    held = sum(parameters_on_rank(model, **sizes, grid=grid, rank=rank) for rank in range(2))
    # Positions, 9 norms with a bias, and 2 biases of row-split layers per layer are held twice.
    copied = 1024 * 128 + 9 * 2 * 128 + 4 * 2 * 128
    assert held == num_parameters(model, **sizes) + copied


def test_key_value_heads_fewer_than_ranks_are_held_whole() -> None:
    model = PRESETS["toy"].model
    sizes = {"vocab_size": 384, "seq_length": 1024}
    held = sum(parameters_on_rank(model, **sizes, grid=Grid(tp=4), rank=rank) for rank in range(4))
    keys_and_values, norms = 2 * 2 * (2 * 48 * 192), 5 * 192
    assert held == num_parameters(model, **sizes) + 3 * (keys_and_values + norms)
