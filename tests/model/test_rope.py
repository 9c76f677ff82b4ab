"""Rotary positions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cp_megatron.config import ModelConfig
from cp_megatron.model.rope import Rotation
from cp_megatron.spec import RotarySpec


def rotation(
    *positions: int, dtype: torch.dtype = torch.float64, head_dim: int = 4, **flags: Any
) -> Rotation:
    model = ModelConfig(
        kv_channels=head_dim, rotary_base=100.0, position_embedding_type="rope", **flags
    )
    rotary = RotarySpec.of(model, layer=0)
    assert rotary is not None
    return Rotation.of(torch.tensor(positions), model, rotary, longest=1, dtype=dtype)


def test_a_literal_rotation() -> None:
    # d = 4, base 100: channels (0, 2) turn by 1 radian per position, (1, 3) by 0.1
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    out = rotation(2).keys(x).flatten()
    expected = [math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)]
    torch.testing.assert_close(out.tolist(), expected, atol=1e-15, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    near, far = rotation(0, 5, 7).keys(x), rotation(1000, 1005, 1007).keys(x)
    scores = [torch.einsum("bqnd,bknd->bnqk", y, y) for y in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_exact_in_low_precision(dtype: torch.dtype) -> None:
    position = 2**24 + 1  # float32 has no such integer
    low = rotation(position, dtype=dtype)
    assert low.cos.dtype == torch.float32
    exact = [math.cos(position), math.cos(position * 0.1)]
    torch.testing.assert_close(low.cos.flatten().tolist(), exact, atol=1e-7, rtol=0)
    assert low.keys(torch.ones(1, 1, 1, 4, dtype=dtype)).dtype == dtype


def test_pairs_of_neighbours_and_a_part_of_the_head() -> None:
    x = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 6.0], dtype=torch.float64).view(1, 1, 1, 6)
    turning = rotation(2, head_dim=6, rotary_percent=0.7, rotary_interleaved=True)
    # d = int(0.7 * 6) = 4: channels (0, 1) turn by 2, (2, 3) by 0.2, the last two stay
    expected = [math.cos(2), math.sin(2), -math.sin(0.2), math.cos(0.2), 5.0, 6.0]
    torch.testing.assert_close(turning.keys(x).flatten().tolist(), expected, atol=1e-15, rtol=0)


def test_late_queries_are_scaled_and_keys_are_not() -> None:
    turning = rotation(*(3, 4, 9), query_temperature_beta=0.5, original_max_position_embeddings=4)
    x = torch.randn(1, 3, 1, 4, dtype=torch.float64)
    factors = [1.0, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)]
    ratio = turning.queries(x) / turning.keys(x)
    torch.testing.assert_close(ratio[0, :, 0, 0].tolist(), factors, atol=1e-12, rtol=0)
