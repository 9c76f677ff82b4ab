"""Gated DeltaNets as data: parameters and costs counted by hand, and how ranks share them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cp_megatron.config import ModelConfig
from cp_megatron.config.files.presets import PRESETS
from cp_megatron.errors import ConfigError
from cp_megatron.spec import LinearAttentionSpec, ModelSpec

MODEL = ModelConfig(
    num_layers=4,
    hidden_size=8,
    num_attention_heads=2,
    ffn_hidden_size=16,
    linear_attention_freq=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=3,
    linear_value_head_dim=5,
    linear_conv_kernel_dim=4,
    normalization="RMSNorm",
    swiglu=True,
    position_embedding_type="rope",
    disable_bias_linear=True,
)
# Projections of query and key [8 -> 6], value and gate [8 -> 20], rate and decay [8 -> 4], out.
PROJECTIONS = 8 * (2 * 6 + 2 * 20 + 2 * 4) + 20 * 8
CONVOLUTIONS = 4 * (2 * 6 + 20)
STATES = 3 * 4 * 3 * 5
MLP = 3 * 8 * 16


def test_parameters_and_work_counted_by_hand() -> None:
    spec = ModelSpec.of(MODEL, vocab_size=128, seq_length=8)
    recurrence = spec.layers[0].recurrence
    assert recurrence is not None
    assert [layer.attention is None for layer in spec.layers] == [True, True, True, False]
    small = 2 * 4 + 5  # A_log and dt_bias of each head, and the norm's weight
    numel = sum(parameter.numel for parameter in recurrence.parameters())
    assert numel == PROJECTIONS + CONVOLUTIONS + small
    assert recurrence.matmul_parameters() == PROJECTIONS + CONVOLUTIONS + STATES
    attention, head = 4 * 8 * 8, 128 * 8
    per_token = 3 * recurrence.matmul_parameters() + attention + 4 * MLP + head
    # Pairs belong to the layer that attends: two products over 8 channels.
    flops = 6 * (per_token * 10 + 20 * 2 * 8)
    assert spec.training_flops(num_tokens=10, num_pairs=20) == flops


@pytest.mark.parametrize(("tp", "heads"), [(1, (4, 2)), (2, (2, 1)), (4, (1, 1))])
def test_tp_ranks_share_value_heads_and_repeat_key_heads(tp: int, heads: tuple[int, int]) -> None:
    spec = LinearAttentionSpec.of(MODEL)
    assert spec.local_heads(tp) == heads
    shapes = {x.name: x.local_shape({"tp": tp}) for x in spec.parameters()}
    whole = {x.name: x.shape for x in spec.parameters()}
    assert shapes["value.weight"] == (20 // tp, 8)
    assert shapes["out.weight"] == (8, 20 // tp)
    assert shapes["decay.A_log"] == (4 // tp,)
    assert shapes["norm.weight"] == (5,)
    keys = "query.weight", "key_conv.weight"
    assert all(shapes[x][0] == (whole[x][0] if tp > 2 else whole[x][0] // tp) for x in keys)
    partial = {x.name for x in spec.parameters() if x.is_partial("tp", tp, splits_sequence=False)}
    shared = {f"{name}.weight" for name in ("query", "key", "query_conv", "key_conv")}
    assert partial == (set() if tp == 1 else {"norm.weight", *(shared if tp > 2 else ())})


def test_ranks_that_cannot_share_the_heads() -> None:
    for heads, named in ((6, "recurrence.query"), (3, "recurrence.query")):
        model = replace(MODEL, linear_num_value_heads=heads, linear_num_key_heads=3)
        with pytest.raises(ConfigError, match=named):
            ModelSpec.of(model, vocab_size=128, seq_length=8).check_split("tp", 2)


def test_the_preset_has_the_size_that_its_name_says() -> None:
    spec = ModelSpec.of(PRESETS["qwen3.5-9b"].model, vocab_size=248_320, seq_length=8)
    assert spec.num_parameters() == pytest.approx(9e9, rel=0.02)
