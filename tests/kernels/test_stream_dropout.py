"""Dropout of the residual stream: the mask as random numbers, and as a function of the token."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import stream_dropout
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.stream_dropout import StreamDropout, drop_eager
from tests.kernels.interpreted import DEVICE, LOW, triton_file

ALL = 1 << 64


def kept(
    dropout: Dropout, *, place: int = 0, length: int = 64, num_rows: int = 2, width: int = 48
) -> Tensor:
    """bool [b, r, h]."""
    made = StreamDropout.of(dropout, torch.arange(length), num_rows)
    return replace(made, place=place).drop(torch.ones(num_rows, length, width)) != 0


def mixed(x: int) -> int:
    """The finalizer of splitmix64 in Python's integers."""
    x %= ALL
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % ALL
    x = (x ^ x >> 27) * 0x94D049BB133111EB % ALL
    return x ^ x >> 31


def test_the_mask_is_the_hash_of_seed_row_position_place_and_channel() -> None:
    found = kept(Dropout(0.3, seed=(1 << 63) - 5, batch0=9), place=4, length=5, width=7)
    for row, position, channel in itertools.product(range(2), range(5), range(7)):
        token = mixed(mixed(mixed((1 << 63) - 5) + 9 + row) + position)
        drawn = mixed(mixed(token + 4) + (channel + 1) * 0x9E3779B97F4A7C15)
        share = (drawn + ALL // 2) % ALL / ALL
        assert found[row, position, channel] == (share >= 0.3), (row, position, channel)


@pytest.mark.parametrize("probability", [0.0, 0.02, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_in_every_row_and_channel(probability: float) -> None:
    drawn = kept(Dropout(probability, seed=7), length=1024, num_rows=4, width=256).double()
    bound = (probability * (1 - probability)) ** 0.5
    whole = (drawn.mean() - 1 + probability).abs()
    assert whole <= 5 * bound / drawn.numel() ** 0.5
    for dims in itertools.combinations(range(3), 2):
        number = drawn.numel() / drawn.mean(dims).numel()
        assert (drawn.mean(dims) - 1 + probability).abs().max() <= 5 * bound / number**0.5


def test_every_input_draws_a_mask_of_its_own() -> None:
    """Neighbours in each input of the hash agree as often as two independent masks."""
    dropout, shape = Dropout(0.5, seed=3), {"length": 256, "width": 96}
    mask = kept(dropout, **shape)
    others = {
        "seed": kept(replace(dropout, seed=4), **shape),
        "row": kept(replace(dropout, batch0=1), **shape),
        "place": kept(dropout, place=1, **shape),
        "row next to it": mask.roll(1, 0),
        "position": mask.roll(1, 1),
        "channel": mask.roll(1, 2),
        "position and channel": mask.roll((1, 1), (1, 2)),
    }
    for name, other in others.items():
        agree = (mask == other).double().mean()
        assert (agree - 0.5).abs() < 5 * 0.5 / mask.numel() ** 0.5, name


def test_layers_have_two_places_each() -> None:
    made = StreamDropout.of(Dropout(0.5, seed=3), torch.arange(4), 1)
    places = [made.place, *(one.place for layer in range(5) for one in made.in_layer(layer))]
    assert places == list(range(11))


def test_a_token_drops_the_same_wherever_it_is() -> None:
    dropout = Dropout(0.4, seed=5, batch0=3)
    whole = kept(dropout, length=64, num_rows=4)
    some, x = torch.tensor([60, 2, 3, 41]), torch.ones(1, 4, 48)
    for row in range(4):
        own = StreamDropout.of(replace(dropout, batch0=3 + row), some, 1)
        assert torch.equal(own.drop(x)[0] != 0, whole[row, some])
    joined = StreamDropout.of(replace(dropout, row_length=64), torch.arange(256), 1)
    assert torch.equal(joined.drop(torch.ones(1, 256, 48))[0] != 0, whole.flatten(0, 1))


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_pieces_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kept(Dropout(0.4, seed=5))
    monkeypatch.setattr(stream_dropout, "_AT_ONCE", at_once)
    assert torch.equal(kept(Dropout(0.4, seed=5)), whole)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_and_its_gradient_are_scaled(dtype: torch.dtype) -> None:
    made = StreamDropout.of(Dropout(0.2, seed=5), torch.arange(16), 2)
    mask = made.drop(torch.ones(2, 16, 8)) != 0
    # Neither is contiguous.
    x, grad = (torch.randn(16, 2, 8, dtype=dtype).transpose(0, 1) for _ in range(2))
    out = made(x.requires_grad_())
    out.backward(grad)
    assert x.grad is not None
    assert out.dtype == x.grad.dtype == dtype
    assert torch.equal(out, torch.where(mask, x * 1.25, 0))
    assert torch.equal(x.grad, torch.where(mask, grad * 1.25, 0))


@pytest.mark.parametrize("dtype", [torch.float32, LOW])
@pytest.mark.parametrize("width", [7, 64, 2500])
def test_triton_computes_the_same_bits(width: int, dtype: torch.dtype) -> None:
    drop = triton_file("stream_dropout_triton").drop_triton
    made = StreamDropout.of(Dropout(0.3, seed=5), torch.arange(9), 2)
    x = torch.randn(18, width).to(DEVICE, dtype)
    for share in (0.0, 0.3, 0.99):
        arguments = x, made.tokens.flatten().to(DEVICE), round((share - 0.5) * 2**31) << 33, 1 / 0.7
        assert torch.equal(drop(*arguments), drop_eager(*arguments)), share
