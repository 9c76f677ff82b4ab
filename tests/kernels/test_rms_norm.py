"""RMSNorm against autograd on its definition, in float64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import rms_norm as seam
from cp_megatron.kernels.rms_norm import NormKernels, add_rms_norm, rms_norm
from tests.kernels.interpreted import DEVICE, LOW, ROUNDING, triton_file

EPSILON = 1e-3
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPES = [(1, 1, 1), (2, 3, 5), (1, 45, 64), (1, 3, 1200)]


@pytest.fixture
def fused() -> NormKernels:
    file = triton_file("rms_norm_triton")
    return NormKernels(file.forward_triton, file.backward_triton)


class Case:
    """Drawn tensors [.., h], and what autograd makes of x + added and of its norm."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(shape[-1])

        def draw(*size: int) -> Tensor:
            number = torch.randn(size, generator=generator, dtype=torch.float64)
            return number.to(DEVICE, dtype)

        # A mean that is not 0 would be seen if it were subtracted.
        self.x, self.added, self.weight = 2 + draw(*shape), draw(*shape), 1 + draw(shape[-1])
        self.dstream, self.dout = draw(*shape), draw(*shape)
        self.leaves = [t.detach().requires_grad_() for t in (self.x, self.added, self.weight)]

    def expected(self, adds: bool, reads_sum: bool) -> list[Tensor]:
        """The sum and its norm, then the gradients of x (and the same of added) and weight."""
        x, added, weight = (t.double().detach().requires_grad_() for t in self.leaves)
        # A sum is rounded before it is normalized.
        total = (x + added).to(self.x.dtype).double() if adds else x
        out = total / (total.square().mean(-1, keepdim=True) + EPSILON).sqrt() * weight
        loss = (out * self.dout.double()).sum()
        if reads_sum:
            loss = loss + (total * self.dstream.double()).sum()
        return [total.detach(), out.detach(), *torch.autograd.grad(loss, (x, weight))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("reads_sum", [False, True])
def test_a_norm_of_a_sum_and_its_gradients(shape: tuple[int, ...], reads_sum: bool) -> None:
    case = Case(shape)
    total, out = add_rms_norm(*case.leaves, EPSILON)
    loss = (out * case.dout).sum() + ((total * case.dstream).sum() if reads_sum else 0)
    dx, dadded, dweight = torch.autograd.grad(loss, case.leaves)
    assert torch.equal(dx, dadded)
    for mine, its in zip((total, out, dx, dweight), case.expected(True, reads_sum), strict=True):
        torch.testing.assert_close(mine, its, **EXACT)


def test_a_norm_alone_and_its_gradients() -> None:
    case = Case((2, 3, 5))
    x, _, weight = case.leaves
    out = rms_norm(x, weight, EPSILON)
    found = [x, out, *torch.autograd.grad(out, (x, weight), case.dout)]
    for mine, its in zip(found, case.expected(False, False), strict=True):
        torch.testing.assert_close(mine, its, **EXACT)


def test_a_sum_can_be_read_alone_and_weights_frozen() -> None:
    case = Case((2, 3, 5))
    x, added, weight = case.leaves
    total, _ = add_rms_norm(x, added, weight, EPSILON)
    for grad in torch.autograd.grad(total, (x, added), case.dstream):
        assert torch.equal(grad, case.dstream)
    out = rms_norm(x, weight.detach(), EPSILON)
    torch.testing.assert_close(
        *torch.autograd.grad(out, (x,), case.dout), case.expected(False, False)[2], **EXACT
    )


def test_a_weight_may_be_wider_than_its_input() -> None:
    """bfloat16 with a float32 factor: everything is computed in float32 and rounded once."""
    case = Case((1, 6, 40), torch.bfloat16)
    x, weight = case.leaves[0], case.weight.float().requires_grad_()
    out = rms_norm(x, weight, EPSILON)
    found = [x, out, *torch.autograd.grad(out, (x, weight), case.dout)]
    assert [t.dtype for t in found] == [torch.bfloat16] * 3 + [torch.float32]
    for mine, its in zip(found, case.expected(False, False), strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=2.0**-8, atol=2.0**-10)


def by_kernels(case: Case, kernels: NormKernels, adds: bool, reads_sum: bool) -> list[Tensor]:
    added = case.added if adds else None
    total, out, scale = kernels.forward(case.x, added, case.weight, EPSILON)
    dstream = case.dstream if reads_sum else None
    return [total, out, *kernels.backward(dstream, case.dout, total, case.weight, scale)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("reads_sum", [False, True])
def test_the_fused_kernels_are_the_definition(
    fused: NormKernels, shape: tuple[int, ...], adds: bool, reads_sum: bool
) -> None:
    case = Case(shape)
    found = by_kernels(case, fused, adds, reads_sum)
    for mine, its in zip(found, case.expected(adds, reads_sum), strict=True):
        torch.testing.assert_close(mine, its, **EXACT)


def test_the_fused_kernels_round_once(fused: NormKernels) -> None:
    case = Case((1, 45, 64), LOW)
    found = by_kernels(case, fused, adds=True, reads_sum=True)
    for mine, its in zip(found, case.expected(True, True), strict=True):
        assert mine.dtype == LOW
        torch.testing.assert_close(mine.double(), its, rtol=1.01 * ROUNDING, atol=1e-4)


def test_the_fused_kernels_are_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = NormKernels(seam.forward_eager, seam.backward_eager)
    chosen = seam.rms_norm_kernels.__wrapped__
    assert chosen("cpu", 64) == eager
    assert chosen("cuda", 1 << 20) == eager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("cuda", 64) == eager
