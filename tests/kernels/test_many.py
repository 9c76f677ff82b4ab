"""Several tiles in one call, against the reference tile by tile: layouts, edges and masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import cuda
from cp_megatron.kernels.cpu import CpuKernel
from cp_megatron.kernels.cuda import CudaKernel
from cp_megatron.kernels.interface import BackwardInputs, JoiningKernel, Kernel
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.kernels.segments import Segments
from cp_megatron.plan.joining import TileRun, join
from cp_megatron.plan.tiling import CAUSAL, FULL, Band, Tile
from tests.kernels import double_many
from tests.kernels.cases import HEADS, SCALE, error
from tests.kernels.test_flash_attn import BF16, kernel_of


def squares(band: Band, *lengths: int) -> TileRun:
    """Tiles of these lengths under what is left of ``band`` in each."""
    tiles, start = [], 0
    for n in lengths:
        tiles.append(Tile(start, start + n, start, start + n, band.within(0, n, 0, n)))
        start += n
    (run,) = join(tiles)
    return run


RUNS = {
    "causal": squares(CAUSAL, 1, 13, 2, 1, 29),
    "full": squares(FULL, 5, 1, 17),
    "single tokens": squares(CAUSAL, 1, 1, 1),
    "window": squares(Band(left=4, right=0), 3, 1, 19, 5, 11),
    "both sides": squares(Band(left=2, right=5), 7, 23, 1),
    "rectangles": TileRun((Tile(0, 3, 0, 11), Tile(3, 10, 11, 12), Tile(10, 12, 12, 19)), FULL),
}


def inputs(run: TileRun, batch: int, heads: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """q, k, v and dout in float64, with values that bfloat16 represents."""
    num_heads, num_groups, dim, v_dim = heads
    rows, columns = run.rows[1], run.columns[1]
    generator = torch.Generator().manual_seed(rows)
    shapes = (rows, num_heads, dim), (columns, num_groups, dim), (columns, num_groups, v_dim)
    return tuple(
        torch.randn(batch, *shape, generator=generator).to(BF16).double()
        for shape in (*shapes, (rows, num_heads, v_dim))
    )


def tile_by_tile(run: TileRun, *tensors: Tensor) -> tuple[Tensor, ...]:
    """out, lse, dq, dk and dv by the reference."""
    q, k, v, dout = tensors
    found = []
    for tile in run.tiles:
        rows, columns = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        part = q[:, rows], k[:, columns], v[:, columns]
        results = ReferenceKernel().forward(*part, tile.band, SCALE)
        x = BackwardInputs(dout[:, rows], *part, *results)
        found.append((*results, *ReferenceKernel().backward(x, tile.band, SCALE)))
    return tuple(torch.cat(x, 2 if i == 1 else 1) for i, x in enumerate(zip(*found)))


def together(kernel: Any, run: TileRun, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The same by one call forward and one backward."""
    joining: JoiningKernel = kernel
    q, k, v, dout = tensors
    segments = Segments(run)
    results = joining.forward_many(q, k, v, segments, SCALE)
    grads = joining.backward_many(BackwardInputs(dout, q, k, v, *results), segments, SCALE)
    return *results, *grads


def gaps(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    assert [x.shape for x in found] == [x.shape for x in expected]
    return [error(x, y) for x, y in zip(found, expected, strict=True)]


@pytest.fixture
def aten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_forward", double_many.aten_forward)
    monkeypatch.setattr(cuda, "_backward", double_many.aten_backward)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("aten")
def test_cuda_in_float64(run: str, batch: int) -> None:
    for heads in HEADS:
        tensors = inputs(RUNS[run], batch, heads)
        expected = tile_by_tile(RUNS[run], *tensors)
        assert max(gaps(together(CudaKernel(), RUNS[run], *tensors), expected)) < 1e-13


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", ["2", "3", "4"])
def test_the_packages(run: str, name: str) -> None:
    kernel: Kernel = kernel_of(name)
    assert kernel.joins
    for batch in (1, 2):
        tensors = inputs(RUNS[run], batch, (4, 2, 16, 8))
        found = together(kernel, RUNS[run], *(x.to(BF16) for x in tensors))
        assert [x.dtype for x in found] == [BF16, torch.float32, BF16, BF16, BF16]
        assert max(gaps(found, tile_by_tile(RUNS[run], *tensors))) < 1e-2


def test_older_packages_get_one_tile_after_the_other() -> None:
    """Before 2.7 the lse of several lengths was padded, and the beta of 3 is as old."""
    assert not kernel_of("2 old").joins
    assert not kernel_of("3 beta").joins
    assert not ReferenceKernel().joins


@pytest.mark.usefixtures("aten")
def test_inputs_may_be_views() -> None:
    """Heads of a shard, keys of a message, and the lse of some of the heads."""
    run = RUNS["causal"]
    q, k, v, dout = inputs(run, 2, (6, 2, 8, 8))
    kernel, segments = CudaKernel(), Segments(run)
    message = torch.cat([k.flatten(2), v.flatten(2)], -1).transpose(0, 1).contiguous()
    keys, values = (x.transpose(0, 1).unflatten(2, (2, 8)) for x in message.chunk(2, -1))
    out, lse = kernel.forward_many(q, keys, values, segments, SCALE)
    whole = BackwardInputs(dout, q, keys, values, out, lse)
    expected = kernel.backward_many(whole, segments, SCALE)
    half = whole.part(slice(None), slice(None), slice(3, 6), slice(1, 2))
    found = kernel.backward_many(half, segments, SCALE)
    assert torch.equal(found[0], expected[0][:, :, 3:])
    assert torch.equal(found[1], expected[1][:, :, 1:])
    assert torch.equal(found[2], expected[2][:, :, 1:])


def test_edges_are_made_once_for_each_batch() -> None:
    segments = Segments(RUNS["rectangles"])
    one, two = (segments.lengths(batch, torch.device("cpu")) for batch in (1, 2))
    assert one.q_edges.tolist() == [0, 3, 10, 12]
    assert one.k_edges.tolist() == [0, 11, 12, 19]
    assert two.q_edges.tolist() == [0, 3, 10, 12, 15, 22, 24]
    assert (one.max_q, one.max_k) == (7, 11)
    assert segments.lengths(1, torch.device("cpu")) is one
    # With one row in each tile, flash attention would keep the lse in another layout.
    assert Segments(RUNS["single tokens"]).lengths(1, torch.device("cpu")).max_q == 2


@pytest.mark.parametrize("run", [*RUNS, "mixed"])
def test_the_cpu_joins_short_squares(run: str) -> None:
    """Tiles of every length: joined, alone, halved (causal) or cut into strips (windows)."""
    mixed = squares(CAUSAL, 30, 3, 32, 1, 33, 5, 300, 31, 31, 2)
    chosen = mixed if run == "mixed" else RUNS[run]
    for heads in HEADS[:3]:
        tensors = inputs(chosen, 2, heads)
        found = together(CpuKernel(), chosen, *tensors)
        assert max(gaps(found, tile_by_tile(chosen, *tensors))) < 1e-13


def test_the_cpu_cuts_long_windows() -> None:
    run = squares(Band(left=40, right=0), 9, 200, 20, 30, 150)
    tensors = inputs(run, 1, (4, 2, 8, 8))
    assert max(gaps(together(CpuKernel(), run, *tensors), tile_by_tile(run, *tensors))) < 1e-13
