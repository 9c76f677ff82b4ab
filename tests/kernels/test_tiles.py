"""The reference and the CPU kernel against autograd: every kind of tile, head and stride."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cp_megatron.kernels import cpu
from cp_megatron.kernels.cpu import CpuKernel, cut_band
from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.merge import merge_
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.plan.tiling import CAUSAL, FULL, Band
from tests.kernels.cases import HEADS, SCALE, TILES, allowed, error, oracle, worst_error
from tests.plan.cases import property_settings

KERNELS = pytest.mark.parametrize("kernel", [ReferenceKernel(), CpuKernel()], ids=["ref", "cpu"])


@KERNELS
@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile(kernel: Kernel, tile: str) -> None:
    band, rows, columns = TILES[tile]
    for heads in HEADS:
        attention = oracle(allowed(band, rows, columns), heads)
        assert worst_error(kernel, band, attention, torch.float64) < 1e-13, heads


@pytest.mark.parametrize("tile", TILES)
def test_softcap(tile: str) -> None:
    band, rows, columns = TILES[tile]
    for heads, softcap in ((HEADS[1], 0.5), (HEADS[3], 3.0)):
        attention = oracle(allowed(band, rows, columns), heads, softcap=softcap)
        kernel = load_kernel("reference", softcap=softcap)
        assert worst_error(kernel, band, attention, torch.float64) < 1e-13


@KERNELS
@pytest.mark.parametrize("dim", [1, 40, 64, 128, 192, 256])
def test_every_head_dim(kernel: Kernel, dim: int) -> None:
    """Value heads of the same width and of another one."""
    for v_dim in (dim, 24, 128):
        a = oracle(allowed(CAUSAL, 5, 5), (2, 1, dim, v_dim))
        assert worst_error(kernel, CAUSAL, a, torch.float64) < 1e-13


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.none() | st.integers(0, 45),
    st.none() | st.integers(0, 45),
)
@property_settings(100)
def test_strips_are_the_band(rows: int, columns: int, left: int | None, right: int | None) -> None:
    """Each pair of the band is in exactly one strip; strips have no other pairs and all rows."""
    band = Band(left, right)
    mask = allowed(band, rows, columns)
    if not (mask.any(1).all() and mask.any(0).all()):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "STRIP_ROWS", 4)
        strips = list(cut_band(band, columns, 0, rows))
    assert [strip.q0 for strip in strips[1:]] == [strip.q1 for strip in strips[:-1]]
    assert (strips[0].q0, strips[-1].q1) == (0, rows)
    found = torch.zeros(rows, columns, dtype=torch.bool)
    for q0, q1, k0, k1, strip_band in strips:
        part = allowed(strip_band, q1 - q0, k1 - k0)
        assert part.any(1).all()
        found[q0:q1, k0:k1] = part
        causal_square = strip_band.is_causal and q1 - q0 == k1 - k0
        assert q1 - q0 <= 4 or strip_band.is_full or causal_square
    assert torch.equal(found, mask)


@KERNELS
def test_keys_that_no_row_reads_get_zeros(kernel: Kernel) -> None:
    """Before the first strip and behind the last; torch fills new memory with NaN meanwhile."""
    band = Band(left=-20, right=60)
    attention = oracle(allowed(band, 300, 400), (2, 1, 8, 8))
    torch.use_deterministic_algorithms(True)
    try:
        assert worst_error(kernel, band, attention, torch.float64) < 1e-12
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_window_costs_its_area() -> None:
    """8,192 rows under a window of 512 cost a fifth more than the pairs, not 16 times as much."""
    strips = list(cut_band(Band(left=511, right=0), 8192, 0, 8192))
    cells = sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1, _ in strips)
    assert cells < 1.25 * 8192 * 512
    # All strips but the first (causal) are equal, so one bias serves them.
    assert len({(q1 - q0, k1 - k0, band) for q0, q1, k0, k1, band in strips}) <= 5


REFERENCE, CPU = ReferenceKernel(), CpuKernel()


@pytest.mark.parametrize(
    ("kernel", "scale"),
    [
        *((kernel, scale) for kernel in (REFERENCE, CPU) for scale in (1e-3, 20.0)),
        *((REFERENCE, scale) for scale in (0.0, -0.5)),
    ],
)
def test_any_scale(kernel: Kernel, scale: float) -> None:
    attention = oracle(allowed(CAUSAL, 6, 6), (4, 2, 8, 8), scale=scale)
    assert worst_error(kernel, CAUSAL, attention, torch.float64, scale=scale) < 1e-12


@KERNELS
def test_sequences_longer_than_a_block(kernel: Kernel) -> None:
    """The fused op works in blocks of rows and columns."""
    for band, rows, columns in (
        (CAUSAL, 700, 700),
        (CAUSAL, 257, 257),
        (CAUSAL, 400, 400),
        (CAUSAL, 512, 512),
        (FULL, 33, 1100),
        (Band(left=90, right=40), 600, 640),
        (Band(left=300), 500, 420),
        (Band(left=130, right=0), 400, 400),
    ):
        attention = oracle(allowed(band, rows, columns), (2, 1, 8, 8))
        assert worst_error(kernel, band, attention, torch.float64) < 1e-12


@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_computed_in_float32(kernel: Kernel, dtype: torch.dtype) -> None:
    compute = kernel.compute_dtype(dtype)
    assert compute == torch.float32
    assert kernel.compute_dtype(torch.float64) == torch.float64
    band = Band(left=9, right=3)
    attention = oracle(allowed(band, 24, 27), (6, 2, 16, 16), dtype=dtype)
    assert worst_error(kernel, band, attention, compute) < 1e-6


def strided(x: Tensor) -> Tensor:
    """The same values as a view into a message: tokens outermost, heads cut from wider ones."""
    wide = torch.full((x.shape[1], x.shape[0], x.shape[2] + 2, x.shape[3] + 5), torch.nan).to(x)
    view = wide.transpose(0, 1)[:, :, 1:-1, 2:-3]
    view.copy_(x)
    assert not view.is_contiguous()
    return view


@KERNELS
@pytest.mark.parametrize("band", [FULL, CAUSAL, Band(left=2, right=1)], ids=["full", "causal", "w"])
def test_operands_may_be_views(kernel: Kernel, band: Band) -> None:
    a = oracle(allowed(band, 6, 6), (4, 2, 8, 8))
    q, k, v, dout = (strided(x) for x in (a.q, a.k, a.v, a.dout))
    out, lse = kernel.forward(q, k, v, band, SCALE)
    assert error(out, a.out) < 1e-13
    lse = strided(lse.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    grads = kernel.backward(BackwardInputs(dout, q, k, v, strided(out), lse), band, SCALE)
    assert max(error(x, y) for x, y in zip(grads, (a.dq, a.dk, a.dv))) < 1e-13


@KERNELS
def test_tiles_of_a_merged_row_give_exact_gradients(kernel: Kernel) -> None:
    """Rows 0 .. 5 with their own six keys, causal, and with eight earlier keys in two tiles."""
    mask = torch.cat([torch.ones(6, 8, dtype=torch.bool), allowed(CAUSAL, 6, 6)], dim=1)
    a = oracle(mask, (4, 2, 8, 8))
    tiles = [(CAUSAL, slice(8, 14)), (FULL, slice(0, 3)), (FULL, slice(3, 8))]
    out, lse = kernel.forward(a.q, a.k[:, 8:], a.v[:, 8:], CAUSAL, SCALE)
    out, lse = out.clone(), lse.clone()
    for band, columns in tiles[1:]:
        merge_(out, lse, *kernel.forward(a.q, a.k[:, columns], a.v[:, columns], band, SCALE))
    assert max(error(out, a.out), error(lse, a.lse)) < 1e-13
    dq = torch.zeros_like(a.q)
    for band, columns in tiles:
        k, v = a.k[:, columns], a.v[:, columns]
        tile_dq, dk, dv = kernel.backward(BackwardInputs(a.dout, a.q, k, v, out, lse), band, SCALE)
        dq += tile_dq
        assert max(error(dk, a.dk[:, columns]), error(dv, a.dv[:, columns])) < 1e-12
    assert error(dq, a.dq) < 1e-12


def test_kernels_are_loaded_by_name() -> None:
    assert isinstance(load_kernel("reference"), ReferenceKernel)
    assert isinstance(load_kernel("cpu"), CpuKernel)
