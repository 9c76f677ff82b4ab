"""The kernels of recurrences on a GPU against the reference in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from cp_megatron.kernels.linear_blocks import LinearBlocks
from cp_megatron.kernels.linear_interface import LinearInputs
from cp_megatron.kernels.load_kernel import load_linear_kernel
from tests.context_parallel.recurrences import KINDS
from tests.kernels.test_linear_kernels import CPU, pieces_of, problem, results, worst

pytestmark = pytest.mark.gpu

LENGTHS = (700, 3, 1, 63, 257)
ROUNDING = 0.02
"""A few roundings to bfloat16, each at most 2^-9 relative."""


def error(name: str, kind: str, dims: tuple[int, int], dtype: torch.dtype) -> float:
    """The worst of all results of the second of two ranks."""
    mask, pieces = pieces_of(LENGTHS, 1)
    x, given = problem(kind, pieces, dims, dtype)
    exact = LinearInputs(*(y.double() if isinstance(y, torch.Tensor) else y for y in x))  # type: ignore[arg-type]
    first, second, third = (y.double() for y in given)
    expected = results(LinearBlocks(mask, pieces, CPU), exact, (first, second, third))
    device = torch.device("cuda")
    moved = LinearInputs(*(y.to(device) if isinstance(y, torch.Tensor) else y for y in x))  # type: ignore[arg-type]
    first, second, third = (y.to(device) for y in given)
    kernel = load_linear_kernel(name, mask, pieces, device)
    return worst(results(kernel, moved, (first, second, third)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_exact_on_a_gpu(kind: str) -> None:
    assert error("reference", kind, (16, 8), torch.float64) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_fla_in_bfloat16(kind: str) -> None:
    pytest.importorskip("fla")
    assert error("fla", kind, (64, 64), torch.bfloat16) < ROUNDING
