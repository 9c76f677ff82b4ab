"""Tests the description of a model: counts by hand and published ones, FLOPs, refused splits."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace

import pytest

from cp_megatron.config import Config, MemoryConfig, ModelConfig, ParallelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Grid, Mask
from cp_megatron.spec import ModelSpec, ParameterSpec, keeps_whole_weights


def spec_of(model: ModelConfig, *, vocab_size: int, seq_length: int) -> ModelSpec:
    """The description without padding of the vocabulary."""
    model = replace(model, make_vocab_size_divisible_by=1)
    return ModelSpec.of(model, vocab_size=vocab_size, seq_length=seq_length)


def test_a_tiny_gpt_by_hand() -> None:
    model = ModelConfig(num_layers=1, hidden_size=4, num_attention_heads=2)
    embedding, positions = 8 * 4, 6 * 4
    attention = 4 * (4 * 4 + 4)
    mlp = (16 * 4 + 16) + (4 * 16 + 4)
    norms = 3 * 2 * 4
    expected = embedding + positions + attention + mlp + norms
    assert spec_of(model, vocab_size=8, seq_length=6).num_parameters() == expected


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
    assert (
        spec_of(model, vocab_size=10, seq_length=6).num_parameters() == 2 * 10 * 8 + 2 * layer + 8
    )


def test_biases_and_norms_of_heads() -> None:
    sizes = {"vocab_size": 10, "seq_length": 6}
    model = replace(
        PRESETS["toy"].model, num_layers=1, hidden_size=8, num_attention_heads=4, kv_channels=6
    )
    more = replace(model, add_qkv_bias=True, qk_layernorm=True)
    added = spec_of(more, **sizes).num_parameters() - spec_of(model, **sizes).num_parameters()
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
    assert spec_of(model, vocab_size=vocab_size, seq_length=1024).num_parameters() == published


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
    held = [spec_of(model, **sizes).parameters_on_rank(grid, rank) for rank in range(6)]
    assert sum(held) == spec_of(model, **sizes).num_parameters()


def test_tensor_parallelism_splits_matrices_and_copies_the_rest() -> None:
    sizes = {"vocab_size": 384, "seq_length": 1024}
    model = PRESETS["toy-gpt"].model
    grid = Grid(tp=2)
    held = sum(spec_of(model, **sizes).parameters_on_rank(grid, rank) for rank in range(2))
    # Positions, 9 norms with a bias, and 2 biases of row-split layers per layer are held twice.
    copied = 1024 * 128 + 9 * 2 * 128 + 4 * 2 * 128
    assert held == spec_of(model, **sizes).num_parameters() + copied


def test_key_value_heads_fewer_than_ranks_are_held_whole() -> None:
    model = PRESETS["toy"].model
    sizes = {"vocab_size": 384, "seq_length": 1024}
    held = sum(spec_of(model, **sizes).parameters_on_rank(Grid(tp=4), rank) for rank in range(4))
    keys_and_values, norms = 2 * 2 * (2 * 48 * 192), 5 * 192
    assert held == spec_of(model, **sizes).num_parameters() + 3 * (keys_and_values + norms)


def test_flops_by_hand() -> None:
    model = ModelConfig(num_layers=2, hidden_size=8, num_attention_heads=2, num_query_groups=1)
    mask = Mask.causal(4)
    # Per layer q 8x8, k and v 4x8 each, output 8x8, up and down 32x8 each; the head is 16x8.
    matrices = 2 * (64 + 2 * 32 + 64 + 2 * 256) + 16 * 8
    # 10 pairs; scores and values are a product of 8 channels each, 2 FLOPs, 3 times.
    attention = 2 * 10 * 8 * 2 * 2 * 3
    flops = spec_of(model, vocab_size=16, seq_length=1).training_flops(
        num_tokens=4, num_pairs=mask.pairs()
    )
    assert flops == 6 * matrices * 4 + attention


@pytest.mark.parametrize(
    ("change", "tp", "refused"),
    [
        ({}, 2, ""),
        ({"num_query_groups": 1}, 4, ""),
        ({"num_attention_heads": 3, "kv_channels": 8}, 2, "layers.0.attention.query.weight"),
        ({"num_attention_heads": 6, "num_query_groups": 3}, 2, "layers.0.attention.key.weight"),
        ({"ffn_hidden_size": 13}, 2, "layers.0.mlp.up.weight"),
        ({}, 3, "embedding.weight"),
    ],
)
def test_ranks_that_cannot_share_a_parameter_are_refused(
    change: dict[str, int], tp: int, refused: str
) -> None:
    model = replace(ModelConfig(num_layers=1, hidden_size=24, num_attention_heads=4), **change)
    spec = spec_of(model, vocab_size=16, seq_length=8)
    with pytest.raises(ConfigError, match=re.escape(refused)) if refused else nullcontext():
        spec.check_split("tp", tp)


def test_a_parameter_lies_over_any_named_axis() -> None:
    expert = ParameterSpec(name="up", shape=(8, 6, 4), init="normal", split={"ep": 0, "tp": 1})
    assert expert.local_shape({"tp": 2, "cp": 3, "ep": 4}) == (2, 3, 4)
    assert not expert.is_partial("ep", 4, splits_sequence=True)
    heads = replace(expert, split={"tp": 0}, units=2, shares_units=True)
    assert heads.local_shape({"tp": 4}) == heads.shape
    assert [heads.is_partial("tp", tp, splits_sequence=False) for tp in (1, 2, 4)] == [0, 0, 1]
    norm = ParameterSpec(name="weight", shape=(4,), init="ones")
    assert [norm.is_partial("tp", 2, splits_sequence=split) for split in (False, True)] == [0, 1]
    assert replace(norm, used_on="heads").is_partial("tp", 2, splits_sequence=False)


def test_small_models_and_stages_keep_whole_weights() -> None:
    def keeps(rows: int, reshard: str = "auto", *, pp: int = 1, offloads: bool = False) -> bool:
        model = ModelConfig(num_layers=1, hidden_size=1 << 10, num_attention_heads=8)
        spec = spec_of(model, vocab_size=rows, seq_length=8)
        parallel = ParallelConfig(fsdp_reshard=reshard)  # type: ignore[arg-type]
        memory = MemoryConfig(optimizer_cpu_offload=offloads)
        config = Config(model=model, parallel=parallel, memory=memory)
        return keeps_whole_weights(config, Grid(dp=2, pp=pp), spec)

    most = (1 << 27) // (1 << 10)  # rows of an embedding that alone has as many as are small
    assert keeps(most - 20_000)
    assert not keeps(most)
    assert keeps(most, pp=2)
    assert not keeps(64, offloads=True)
    assert keeps(most, "never", offloads=True)
    assert not keeps(64, "always", pp=2)
