"""Tests vocabulary parallel cross-entropy against torch's own on the whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.tensor_parallel import vocab_parallel_cross_entropy
from tests.ranks import run_ranks
from tests.tensor_parallel.test_linear import TOLERANCE, numbers

VOCAB, PADDED = 257, 384


def logits_of(scale: float) -> Tensor:
    """[2, 5, 384], padding -inf."""
    logits = numbers(1, 2, 5, PADDED) * scale
    logits[..., VOCAB:] = float("-inf")
    return logits


def labels_of(masked: str) -> Tensor:
    labels = torch.tensor([[0, 95, 96, 191, 192], [256, 255, 128, 127, 3]])
    if masked == "some":
        labels[0, 1:4] = -100
    if masked == "all":
        labels[:] = -100
    return labels


def split(rank: int, world_size: int, scale: float, masked: str, dtype: torch.dtype) -> Tensor:
    """Token losses; they have no gradient."""
    logits = logits_of(scale).to(dtype).chunk(world_size, -1)[rank].clone().requires_grad_()
    group = torch.distributed.group.WORLD
    losses = vocab_parallel_cross_entropy(logits, labels_of(masked), group)
    assert not losses.requires_grad
    return losses


def plain(scale: float, masked: str, dtype: torch.dtype) -> Tensor:
    logits = logits_of(scale).to(dtype).double().flatten(0, 1)
    return F.cross_entropy(logits, labels_of(masked).flatten(), reduction="none").view(2, 5)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_equals_torch(world_size: int, masked: str, scale: float) -> None:
    expected = plain(scale, masked, torch.float64)
    for losses in run_ranks(split, world_size, scale, masked, torch.float64):
        torch.testing.assert_close(losses, expected, **TOLERANCE)
        assert not losses[labels_of(masked) == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    expected = plain(3.0, "some", dtype)
    for losses in run_ranks(split, 2, 3.0, "some", dtype):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=1e-5)


def test_no_group_is_one_rank() -> None:
    losses = vocab_parallel_cross_entropy(logits_of(1.0), labels_of("some"), None)
    torch.testing.assert_close(losses, plain(1.0, "some", torch.float64), **TOLERANCE)
