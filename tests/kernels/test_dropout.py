"""Attention dropout: the mask as a random number, and attention under it against autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cp_megatron.errors import ConfigError
from cp_megatron.kernels.dropout import Dropout, TileDropout, keep_mask
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.merge import merge_
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.kernels.select import TRAITS
from cp_megatron.plan.tiling import CAUSAL, FULL, Band
from tests.kernels.cases import SCALE, allowed, error

RUN = torch.arange(64)


def masks(dropout: Dropout, length: int = 64, batch: int = 2, heads: int = 3) -> Tensor:
    run = torch.arange(length)
    return keep_mask(dropout, run, run, batch, heads)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9])
def test_the_rate(probability: float) -> None:
    """Over all pairs, and over each row, column, head and batch row."""
    keep = masks(Dropout(probability, seed=7), length=192, batch=4, heads=4).double()
    kept = 1 - probability
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        mean = keep.mean(dims)
        number = keep.numel() / mean.numel()
        # The limit is six standard deviations.
        assert (mean - kept).abs().max() <= 6 * (probability * kept / number) ** 0.5


def test_pairs_are_independent() -> None:
    """Neighbours in every direction and other seeds: coins of +-1 correlate below 6 / sqrt(n)."""

    def coins_of(seed: int) -> Tensor:
        return masks(Dropout(0.5, seed=seed), length=256).double() * 2 - 1

    coins = coins_of(3)
    upper = torch.ones(256, 256, dtype=torch.bool).triu(1)
    pairs = [
        (coins[..., 1:], coins[..., :-1]),
        (coins[..., 1:, :], coins[..., :-1, :]),
        (coins[..., 1:, 1:], coins[..., :-1, :-1]),
        (coins[..., 1:, :-1], coins[..., :-1, 1:]),
        (coins[..., upper], coins.mT[..., upper]),
        (coins[:, 1:], coins[:, :-1]),
        (coins[1:], coins[:-1]),
        *((coins, coins_of(seed)) for seed in (4, 2**40, -3)),
    ]
    for a, b in pairs:
        assert (a * b).mean().abs() < 6 / a.numel() ** 0.5


def test_the_hash_is_splitmix64() -> None:
    """Compares with the definition in Python's integers."""
    word = (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    for seed in (0, 12345, -1, 1 << 63, (1 << 64) + 5):
        keep = keep_mask(Dropout(0.4, seed, 5, 7), torch.tensor([11, 900]), RUN, 2, 2)
        for index in ((0, 0, 0, 0), (1, 1, 1, 63), (0, 1, 1, 17), (1, 0, 0, 40)):
            batch, head, row, column = index
            key = mix(seed & word)
            for part in (5 + batch, 7 + head, (11, 900)[row]):
                key = mix((key + part) & word)
            drawn = mix((key + (column + 1) * 0x9E3779B97F4A7C15) & word) >> 11
            assert bool(keep[index]) == (drawn >= int(0.4 * 2**53))


def test_any_part_of_the_mask_is_that_part() -> None:
    """The same pairs are kept wherever rows, columns, batch rows and heads are cut and shuffled."""
    whole = Dropout(0.3, seed=11)
    keep = masks(whole)
    rows, columns = torch.tensor([40, 3, 9]), torch.tensor([63, 0, 7, 8])
    part = keep_mask(replace(whole, batch0=1, head0=1), rows, columns, 1, 2)
    assert torch.equal(part, keep[1:, 1:][:, :, rows][..., columns])
    tile = TileDropout(whole, rows, columns, head0=2).weights(2, 1, torch.float64)
    torch.testing.assert_close(tile, keep[:, 2:][:, :, rows][..., columns].double() / 0.7)


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_an_invalid_probability_is_refused(probability: float) -> None:
    with pytest.raises(ConfigError, match="at least 0 and below 1"):
        Dropout(probability, seed=0)


def attention(mask: Tensor, dropout: Dropout) -> dict[str, Tensor]:
    """Dropped attention of 6 query heads over 2 key/value heads, with autograd's gradients."""
    generator = torch.Generator().manual_seed(5)
    rows, columns = mask.shape
    shapes = ((rows, 6, 8), (columns, 2, 8), (columns, 2, 4), (rows, 6, 4))
    q, k, v, dout = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    kv_head = torch.arange(6) // 3
    scores = SCALE * torch.einsum("bqhd,bkhd->bhqk", q, k[:, :, kv_head])
    scores = scores.masked_fill(~mask, -torch.inf)
    keep = keep_mask(dropout, torch.arange(rows), torch.arange(columns), 2, 6)
    weights = scores.softmax(-1) * keep / (1 - dropout.probability)
    out = torch.einsum("bhqk,bkhe->bqhe", weights, v[:, :, kv_head])
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    q, k, v = (x.detach() for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "dout": dout, "out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(left=2, right=1)], ids=["full", "causal", "w"])
def test_attention_against_autograd(band: Band) -> None:
    dropout = Dropout(0.35, seed=2, batch0=4, head0=6)
    a = attention(allowed(band, 9, 9), dropout)
    run = torch.arange(9)
    tile = TileDropout(dropout, run, run)
    q, k, v, dout = (a[name] for name in ("q", "k", "v", "dout"))
    kernel = ReferenceKernel().dropping(tile)
    out, lse = kernel.forward(q, k, v, band, SCALE)
    _, plain_lse = ReferenceKernel().forward(q, k, v, band, SCALE)
    assert torch.equal(lse, plain_lse)
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), band, SCALE)
    found = zip((out, *grads), (a["out"], a["dq"], a["dk"], a["dv"]), strict=True)
    assert max(error(x, y) for x, y in found) < 1e-13


def test_tiles_merged_are_one_whole() -> None:
    """Rows 4 .. 9, causal with themselves and full with keys 0 .. 3, one head group at a time."""
    dropout = Dropout(0.35, seed=2)
    a = attention(allowed(CAUSAL, 10, 10), dropout)
    q, dout = a["q"][:, 4:], a["dout"][:, 4:]
    run = torch.arange(10)
    parts = [(CAUSAL, slice(4, 10)), (FULL, slice(0, 4))]

    def kernel(columns: slice, head0: int = 0) -> Kernel:
        tile = TileDropout(dropout, run[4:], run[columns], head0)
        return ReferenceKernel().dropping(tile)

    results = [kernel(c).forward(q, a["k"][:, c], a["v"][:, c], band, SCALE) for band, c in parts]
    out, lse = results[0]
    merge_(out, lse, *results[1])
    assert error(out, a["out"][:, 4:]) < 1e-13
    dq = torch.zeros_like(q)
    for band, c in parts:
        for group in (0, 1):
            heads, kv = slice(3 * group, 3 * group + 3), slice(group, group + 1)
            whole = BackwardInputs(dout, q, a["k"], a["v"], out, lse)
            part = whole.part(slice(None), c, heads, kv)
            dq[:, :, heads] += kernel(c, 3 * group).backward(part, band, SCALE)[0]
    assert error(dq, a["dq"][:, 4:]) < 1e-13


def test_only_kernels_that_the_table_lists_can_drop() -> None:
    """The engine asks the chosen kernel for a kernel that drops, so it must have that method."""
    for name, traits in TRAITS.items():
        if "cpu" in traits.devices:
            assert hasattr(load_kernel(name), "dropping") == traits.dropout


def test_rows_laid_end_to_end_drop_what_rows_of_a_batch_drop() -> None:
    """Two rows of 5 in one row of 10, and in a batch of two."""
    one, five, ten = torch.arange(5), torch.arange(5, 10), torch.arange(10)
    joined = keep_mask(Dropout(0.5, seed=3, batch0=7, row_length=5), ten, ten, 1, 2)
    apart = keep_mask(Dropout(0.5, seed=3, batch0=7), one, one, 2, 2)
    assert torch.equal(joined[0, :, :5, :5], apart[0])
    assert torch.equal(joined[0, :, 5:, 5:], apart[1])
    assert not torch.equal(apart[0], apart[1])
    later = keep_mask(Dropout(0.5, seed=3, batch0=7, row_length=5), five, five, 1, 2)
    assert torch.equal(later[0], apart[1])
