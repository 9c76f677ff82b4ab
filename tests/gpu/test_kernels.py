"""Compares the CUDA kernels on a GPU with autograd in float64, on every kind of tile."""

from __future__ import annotations

import pytest
import torch

from cp_megatron.kernels.interface import BackwardInputs, Kernel
from cp_megatron.kernels.load_kernel import load_kernel
from cp_megatron.kernels.reference import ReferenceKernel
from cp_megatron.plan.tiling import CAUSAL, FULL, Band
from tests.kernels.cases import SCALE, TILES, Attention, allowed, error, oracle
from tests.kernels.test_many import RUNS, inputs, squares, tile_by_tile, together

pytestmark = pytest.mark.gpu

HEADS = [(4, 4, 64, 64), (6, 2, 128, 128), (4, 1, 40, 40), (4, 2, 64, 32), (4, 2, 24, 96)]
LARGE = {
    "full": (FULL, 300, 700),
    "causal": (CAUSAL, 640, 640),
    "window": (Band(left=90, right=40), 600, 640),
    "left": (Band(left=300), 500, 420),
    "sliding": (Band(left=130, right=0), 400, 400),
}
ROUNDING = 0.01
"""bfloat16 has 8 significant bits, so that each of the few roundings is at most 2^-9 relative."""


def errors(kernel: Kernel, band: Band, a: Attention, dtype: torch.dtype) -> list[float]:
    """Errors of out, lse, dq, dk and dv."""
    q, k, v, dout = (x.to("cuda", dtype) for x in (a.q, a.k, a.v, a.dout))
    out, lse = kernel.forward(q, k, v, band, SCALE)
    grads = kernel.backward(BackwardInputs(dout, q, k, v, out, lse), band, SCALE)
    expected = (a.out, a.lse, a.dq, a.dk, a.dv)
    return [error(x.cpu(), y) for x, y in zip((out, lse, *grads), expected, strict=True)]


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", ["cuda", "cudnn"])
def test_every_kind_of_tile(name: str, heads: tuple[int, int, int, int]) -> None:
    for tile, (band, rows, columns) in {**TILES, **{f"large {x}": LARGE[x] for x in LARGE}}.items():
        windowed = not (band.is_full or (band.is_causal and rows == columns))
        if name == "cudnn" and windowed:
            continue  # refused, see tests/kernels/test_cudnn.py
        a = oracle(allowed(band, rows, columns), heads, dtype=torch.bfloat16)
        found = errors(load_kernel(name), band, a, torch.bfloat16)
        # A gradient that is a difference of similar numbers has few exact bits in any kernel.
        plain = errors(ReferenceKernel(), band, a, torch.bfloat16)
        for mine, its in zip(found, plain, strict=True):
            assert mine < max(ROUNDING, its), (tile, found, plain)


LONG_RUNS = {
    "primes": squares(CAUSAL, 1, 127, 2, 509, 1, 331, 13),
    "single tokens": squares(CAUSAL, *[1] * 300),
    "one long": squares(CAUSAL, 3, 1021, 5),
    "window": squares(Band(left=100, right=0), 211, 1, 503, 101),
    "both sides": squares(Band(left=20, right=70), 307, 7, 64),
}


@pytest.mark.parametrize("heads", [*HEADS[:2], (4, 1, 128, 128), (4, 2, 64, 32)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_several_tiles_in_one_call(batch: int, heads: tuple[int, int, int, int]) -> None:
    """A gradient that is exactly 0, as those of single tokens are, is compared with 1."""
    for name, run in {**RUNS, **{f"long {x}": LONG_RUNS[x] for x in LONG_RUNS}}.items():
        tensors = inputs(run, batch, heads)
        on_gpu = [x.to("cuda", torch.bfloat16) for x in tensors]
        found = together(load_kernel("cuda"), run, *on_gpu)
        for x, exact in zip(found, tile_by_tile(run, *tensors), strict=True):
            assert error(x.cpu(), exact) < 2 * ROUNDING, name


def test_several_tiles_in_one_deterministic_call() -> None:
    run = LONG_RUNS["primes"]
    kernel = load_kernel("cuda", deterministic=True)
    q, k, v, dout = (x.to("cuda", torch.bfloat16) for x in inputs(run, 1, (6, 2, 128, 128)))
    first = together(kernel, run, q, k, v, dout)
    for _ in range(5):
        again = together(kernel, run, q, k, v, dout)
        assert all(torch.equal(x, y) for x, y in zip(first, again))


def test_the_oracle_is_exact_on_a_gpu() -> None:
    for band, rows, columns in TILES.values():
        a = oracle(allowed(band, rows, columns), (4, 2, 16, 8))
        assert max(errors(ReferenceKernel(), band, a, torch.float64)) < 1e-13


def test_deterministic_backward_repeats_its_bits() -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(num_heads: int) -> torch.Tensor:
        shape = (1, 4096, num_heads, 64)
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    q, k, v, dout = draw(8), draw(2), draw(2), draw(8)
    kernel = load_kernel("cuda", deterministic=True)
    out, lse = kernel.forward(q, k, v, CAUSAL, 0.1)
    x = BackwardInputs(dout, q, k, v, out, lse)
    first = kernel.backward(x, CAUSAL, 0.1)
    for _ in range(5):
        again = kernel.backward(x, CAUSAL, 0.1)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
