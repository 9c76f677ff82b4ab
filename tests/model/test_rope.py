"""Rotary positions."""

from __future__ import annotations

import math

import pytest
import torch

from cp_megatron.config import ModelConfig
from cp_megatron.model.rope import Rotation


def rotation(*positions: int, dtype: torch.dtype = torch.float64, head_dim: int = 4) -> Rotation:
    model = ModelConfig(kv_channels=head_dim, rotary_base=100.0)
    return Rotation.of(torch.tensor(positions), model, longest=1, dtype=dtype)


def test_a_literal_rotation() -> None:
    # d = 4, base 100: channels (0, 2) turn by 1 radian per position, (1, 3) by 0.1
    x = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 4)
    out = rotation(2).apply(x).flatten()
    expected = [math.cos(2), -math.sin(0.2), math.sin(2), math.cos(0.2)]
    torch.testing.assert_close(out.tolist(), expected, atol=1e-15, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    near, far = rotation(0, 5, 7).apply(x), rotation(1000, 1005, 1007).apply(x)
    scores = [torch.einsum("bqnd,bknd->bnqk", y, y) for y in (near, far)]
    torch.testing.assert_close(scores[0], scores[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_exact_in_low_precision(dtype: torch.dtype) -> None:
    position = 2**24 + 1  # float32 has no such integer
    low = rotation(position, dtype=dtype)
    assert low.cos.dtype == torch.float32
    exact = [math.cos(position), math.cos(position * 0.1)]
    torch.testing.assert_close(low.cos.flatten().tolist(), exact, atol=1e-7, rtol=0)
    assert low.apply(torch.ones(1, 1, 1, 4, dtype=dtype)).dtype == dtype
