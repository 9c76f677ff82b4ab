"""Merging partial attentions: any sizes, rows without keys, many merges."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import merge
from cp_megatron.kernels.merge import Merge, merge_, merge_eager_
from tests.kernels.interpreted import DEVICE, triton_file

INF = float("inf")


def merged(
    lse: float, new_lse: float, *, out: float = 1.0, new: float = 3.0
) -> tuple[float, float]:
    """One row, one head, one column."""
    a, b = (torch.full((1, 1, 1, 1), x, dtype=torch.float64) for x in (out, new))
    c, d = (torch.full((1, 1, 1), x, dtype=torch.float64) for x in (lse, new_lse))
    merge_(a, c, b, d)
    return a.item(), c.item()


def test_equal_weights_are_the_mean() -> None:
    out, lse = merged(5.0, 5.0)
    assert out == 2.0
    assert lse == pytest.approx(5.0 + math.log(2.0), rel=1e-15)


@pytest.mark.parametrize("size", [50.0, 1e3, 1e6, 1e300])
def test_huge_differences_take_one_side(size: float) -> None:
    assert merged(-size, size) == (3.0, size)
    assert merged(size, -size) == (1.0, size)


@pytest.mark.parametrize("size", [1e3, 1e6, 1e300])
def test_huge_and_equal_is_still_the_mean(size: float) -> None:
    assert merged(size, size)[0] == 2.0
    assert merged(-size, -size)[0] == 2.0


def test_a_row_without_keys_has_no_weight() -> None:
    assert merged(0.5, -INF) == (1.0, 0.5)
    assert merged(-INF, 0.5, out=0.0) == (3.0, 0.5)
    assert merged(-INF, -INF, out=0.0, new=0.0) == (0.0, -INF)
    assert merged(-INF, -INF, out=0.0, new=7.0) == (0.0, -INF)


def test_nan_stays_visible() -> None:
    out, lse = merged(0.5, float("nan"), new=float("nan"))
    assert out != out
    assert lse != lse


def parts(pieces: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Whole out [2, 5, 3, 4] and lse [2, 3, 5], and the same over disjoint slices of the keys."""
    generator = torch.Generator().manual_seed(pieces)
    scores = 30 * torch.randn(2, 3, 5, 8 * pieces, generator=generator, dtype=torch.float64)
    v = torch.randn(2, 8 * pieces, 3, 4, generator=generator, dtype=torch.float64)

    def attend(s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("bhqk,bkhe->bqhe", s.softmax(-1), x), s.logsumexp(-1)

    cut = zip(scores.chunk(pieces, dim=3), v.chunk(pieces, dim=1))
    return (*attend(scores, v), [attend(s, x) for s, x in cut])


@pytest.mark.parametrize("pieces", [1, 2, 7, 64])
@pytest.mark.parametrize("start_empty", [False, True])
def test_many_merges_are_one_softmax(pieces: int, start_empty: bool) -> None:
    whole_out, whole_lse, cut = parts(pieces)
    if start_empty:
        cut.insert(0, (torch.zeros_like(whole_out), torch.full_like(whole_lse, -INF)))
    out, lse = (x.clone() for x in cut[0])
    for piece in cut[1:]:
        merge_(out, lse, *piece)
    torch.testing.assert_close(out, whole_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-14, atol=1e-12)


def test_merging_into_some_rows_leaves_the_others() -> None:
    whole_out, whole_lse, cut = parts(2)
    out, lse = (x.clone() for x in cut[0])
    merge_(out[:, 1:3], lse[:, :, 1:3], cut[1][0][:, 1:3], cut[1][1][:, :, 1:3])
    torch.testing.assert_close(out[:, 1:3], whole_out[:, 1:3])
    torch.testing.assert_close(lse[:, :, 1:3], whole_lse[:, :, 1:3])
    assert torch.equal(out[:, 3:], cut[0][0][:, 3:])
    assert torch.equal(lse[:, :, :1], cut[0][1][:, :, :1])


def test_half_precision_results_accumulate_in_float32() -> None:
    out, lse = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    new = torch.full((1, 1, 1, 1), 2.0, dtype=torch.bfloat16)
    merge_(out, lse, new, torch.full((1, 1, 1), -7.0))
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(1 + torch.sigmoid(torch.tensor(-7.0)).item(), rel=1e-6)


@pytest.fixture
def fused() -> Merge:
    merge_triton: Merge = triton_file("merge_triton").merge_triton_
    return merge_triton


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of infinities
@pytest.mark.parametrize(
    ("shape", "dtype", "new_dtype"),
    [
        ((2, 5, 3, 4), torch.float32, torch.bfloat16),
        ((1, 37, 2, 80), torch.float32, torch.float32),
        ((1, 9, 4, 256), torch.float32, torch.bfloat16),
        ((2, 3, 1, 1), torch.float64, torch.float64),
    ],
)
def test_the_fused_merge_is_the_eager_one(
    shape: tuple[int, int, int, int], dtype: torch.dtype, new_dtype: torch.dtype, fused: Merge
) -> None:
    """On views with strides of their own, including rows that have no key on either side."""
    batch, rows, heads, width = shape
    generator = torch.Generator().manual_seed(rows)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    shard = draw(batch, rows + 4, heads + 2, width + 3).to(DEVICE, dtype)
    shard_lse = (30 * draw(batch, heads + 2, rows + 4)).to(DEVICE, dtype)
    new_out = draw(batch, rows, heads, width).to(DEVICE, new_dtype)
    new_lse = (30 * draw(batch, heads, rows)).to(DEVICE, torch.float32)
    shard_lse[:, :, 2:4], new_lse[:, :, 1:3] = -INF, -INF
    results = []
    for one in (fused, merge_eager_):
        out, lse = shard.clone(), shard_lse.clone()
        one(out[:, 2:-2, 1:-1, :-3], lse[:, 1:-1, 2:-2], new_out, new_lse)
        results.append((out, lse))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(*(r[0] for r in results), rtol=8 * eps, atol=8 * eps)
    torch.testing.assert_close(*(r[1] for r in results), rtol=2 * eps, atol=2 * eps)


def test_the_fused_merge_keeps_nan(fused: Merge) -> None:
    out, lse = torch.ones(1, 2, 1, 8, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    new_lse = torch.tensor([[[torch.nan, 0.0]]], device=DEVICE)
    fused(out, lse, torch.full_like(out, torch.nan), new_lse)
    assert out.isnan().all()
    assert lse.isnan().flatten().tolist() == [True, False]


def test_the_fused_merge_is_for_gpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(merge, "_fused", lambda: lambda *tensors: called.append("fused"))
    monkeypatch.setattr(merge, "merge_eager_", lambda *tensors: called.append("eager"))
    tensors = [torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1)] * 2
    merge_(*tensors)
    if torch.cuda.is_available():
        merge_(*(x.cuda() for x in tensors))
    assert called == ["eager", "fused"][: 1 + torch.cuda.is_available()]


def test_without_triton_a_gpu_merges_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert merge._fused.__wrapped__() is None
