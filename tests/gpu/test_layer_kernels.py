"""Compares the Triton kernels of a layer on a GPU with the formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import gated as gated_seam
from cp_megatron.kernels import rms_norm as norm_seam
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.kernels.gated import GatedFunction, gated
from cp_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from cp_megatron.kernels.stream_dropout import StreamDropout

pytestmark = pytest.mark.gpu

ROUNDING = 2.0**-8
"""The relative error of one rounding to bfloat16; results are rounded once."""
EPSILON = 1e-5
SHAPES = [(1, 4096, 2048), (2, 1000, 5120), (1, 300, 8, 128), (3, 7, 1000)]


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def assert_rounded(found: Tensor, exact: Tensor, *, atol: float) -> None:
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=1.01 * ROUNDING, atol=atol)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_a_gpu_has_the_fused_kernels() -> None:
    assert gated_seam.gated_kernels("cuda").forward is not gated_seam.forward_eager
    assert norm_seam.rms_norm_kernels("cuda", 2048).forward is not norm_seam.forward_eager


FUNCTIONS = [
    GatedFunction("silu"),
    GatedFunction("gelu"),
    GatedFunction("quick_gelu", clamp=7.0, offset=1.0),
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 8192), (2, 33, 1001)], ids=str)
def test_gated_units(shape: tuple[int, ...], function: GatedFunction) -> None:
    gate, up, grad = (4 * drawn(*shape), drawn(*shape).flip(1), drawn(*shape).roll(1, 2))
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = gated(gate, up, function)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    bound = torch.inf if function.clamp is None else function.clamp
    x, factor = exact[0].clamp(max=bound), exact[1].clamp(-bound, bound) + function.offset
    plain = gated_seam.activate(x, function.activation) * factor
    expected = [plain, *torch.autograd.grad(plain, exact, grad.double())]
    for mine, its in zip(found, expected, strict=True):
        assert_rounded(mine, its, atol=1e-5)


@pytest.mark.parametrize("width", [768, 5000])
def test_gated_units_of_experts(width: int) -> None:
    """A router weighs the rows, in float32."""
    gate, up, grad = (4 * drawn(300, width), drawn(300, width).flip(1), drawn(300, width).roll(1))
    weights = torch.rand(300, device="cuda")
    leaves = [x.requires_grad_() for x in (gate, up, weights)]
    out = gated(gate, up, GatedFunction(), weights)
    *found, dweights = [out, *torch.autograd.grad(out, leaves, grad)]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    plain = torch.nn.functional.silu(exact[0]) * exact[1] * exact[2][:, None]
    *expected, dexact = [plain, *torch.autograd.grad(plain, exact, grad.double())]
    for mine, its in zip(found, expected, strict=True):
        assert_rounded(mine, its, atol=1e-5)
    assert error(dweights, dexact) < 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_norms_and_their_gradients(shape: tuple[int, ...], adds: bool) -> None:
    x, added, dout, dtotal = (drawn(*shape).roll(i, 1) for i in range(4))
    weight = drawn(shape[-1])
    leaves = [t.requires_grad_() for t in (x, added, weight)]
    if adds:
        total, out = add_rms_norm(*leaves, EPSILON)
        found = torch.autograd.grad((total, out), leaves, (dtotal, dout))
        assert torch.equal(total, x + added)
        assert torch.equal(found[0], found[1])
    else:
        total, out = x, rms_norm(x, weight, EPSILON)
        found = torch.autograd.grad(out, (x, x, weight), dout)
    exact, factor = (t.detach().double().requires_grad_() for t in (total, weight))
    plain = exact / (exact.square().mean(-1, keepdim=True) + EPSILON).sqrt() * factor
    loss = (plain * dout.double()).sum() + (exact * dtotal.double() * adds).sum()
    dx, dweight = torch.autograd.grad(loss, (exact, factor))
    assert_rounded(out, plain.detach(), atol=1e-5)
    assert_rounded(found[0], dx, atol=1e-4)
    assert error(found[2], dweight) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 300, 1000), (1, 33, 5120)], ids=str)
def test_hidden_dropout_drops_what_the_cpu_drops(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    x, dropout = drawn(*shape).to(dtype), Dropout(0.3, seed=(1 << 62) + 5, batch0=7)
    found = []
    for device in ("cuda", "cpu"):
        leaf = x.to(device).requires_grad_()
        made = StreamDropout.of(dropout, torch.arange(shape[1], device=device), shape[0])
        out = made.in_layer(3)[1](leaf)
        out.backward(x.to(device).flip(2))
        assert leaf.grad is not None
        found.append((out.cpu(), leaf.grad.cpu()))
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its)
