"""Gated linear units against autograd on the plain formula, in float64."""

from __future__ import annotations

import importlib.util
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels import gated as seam
from cp_megatron.kernels.gated import GatedFunction, GatedKernels, activate, gated, weighted
from tests.kernels.interpreted import DEVICE, LOW, ROUNDING, triton_file

FUNCTIONS = [
    GatedFunction("silu"),
    GatedFunction("gelu"),
    GatedFunction("quick_gelu"),
    GatedFunction("quick_gelu", clamp=1.5, offset=1.0),
    GatedFunction("silu", clamp=0.75),
    GatedFunction("gelu", offset=-0.5),
]
functions = pytest.mark.parametrize("function", FUNCTIONS, ids=str)


@pytest.fixture
def fused() -> GatedKernels:
    file = triton_file("gated_triton")
    return GatedKernels(file.forward_triton, file.backward_triton)


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gate, up and the gradient of the result; the gate has large numbers of both signs."""
    generator = torch.Generator().manual_seed(len(shape))
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    draws[0] *= 30 * torch.rand(shape, generator=generator, dtype=torch.float64).pow(4)
    return [x.to(DEVICE, dtype) for x in draws]


def by_autograd(
    gate: Tensor, up: Tensor, grad: Tensor, function: GatedFunction, weights: Tensor | None = None
) -> list[Tensor]:
    """The result and the gradients of gate, up and weights."""
    given = [gate, up, *([] if weights is None else [weights])]
    leaves = [x.detach().requires_grad_() for x in given]
    x, factor = leaves[:2]
    if function.clamp is not None:
        x, factor = x.clamp(max=function.clamp), factor.clamp(-function.clamp, function.clamp)
    factor = factor + function.offset
    if function.activation == "gelu":
        out = F.gelu(x, approximate="tanh") * factor
    else:
        out = x / (1 + torch.exp(-x * (1 if function.activation == "silu" else 1.702))) * factor
    if weights is not None:
        out = out * leaves[2][:, None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def by_kernels(
    kernels: GatedKernels,
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    function: GatedFunction,
    weights: Tensor | None = None,
) -> list[Tensor]:
    """What ``by_autograd`` returns."""
    gradients = kernels.backward(grad, gate, up, function, weights)
    assert (gradients[2] is None) == (weights is None)
    out = kernels.forward(gate, up, function, weights)
    return [out, *(x for x in gradients if x is not None)]


@functions
def test_the_result_and_its_gradients(function: GatedFunction) -> None:
    gate, up, grad = drawn(2, 7, 5)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = gated(gate, up, function)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    for mine, its in zip(found, by_autograd(gate, up, grad, function), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


@functions
def test_gradients(function: GatedFunction) -> None:
    gate, up, _ = drawn(3, 5)
    torch.autograd.gradcheck(
        lambda x, y: gated(x, y, function), (gate.requires_grad_(), up.requires_grad_())
    )


@functions
def test_weights_multiply_rows(function: GatedFunction) -> None:
    gate, up, grad = drawn(6, 5)
    leaves = [gate, up, drawn(6)[1]]
    leaves = [x.requires_grad_() for x in leaves]
    out = gated(gate, up, function, leaves[2])
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    for mine, its in zip(found, by_autograd(gate, up, grad, function, leaves[2]), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weighted_rows(dtype: torch.dtype) -> None:
    """Rows of few bits are multiplied in the type of the weights, and rounded once."""
    rows, _, grad = drawn(6, 5, dtype=dtype)
    weights = drawn(6)[1].requires_grad_()
    out = weighted(rows.requires_grad_(), weights)
    found = torch.autograd.grad(out, (rows, weights), grad)
    factors = weights.detach()[:, None]
    products = (grad.double() * rows.detach().double()).sum(1)
    assert torch.equal(out, (rows.double() * factors).to(dtype))
    assert torch.equal(found[0], (grad.double() * factors).to(dtype))
    torch.testing.assert_close(found[1], products)


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_plain_functions_have_the_bits_of_a_product(activation: Literal["silu", "gelu"]) -> None:
    """The bounds and the offset of other functions do not change them."""
    gate, up, grad = drawn(4, 33, dtype=torch.float32)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out, plain = gated(gate, up, GatedFunction(activation)), activate(gate, activation) * up
    assert torch.equal(out, plain)
    found, expected = (torch.autograd.grad(y, leaves, grad) for y in (out, plain))
    assert all(map(torch.equal, found, expected))


def test_the_gated_unit_of_gpt_oss() -> None:
    """Bits of transformers' float32, beyond both bounds too."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts

    config = GptOssConfig(hidden_size=4, intermediate_size=4, num_local_experts=1)
    gate, up, _ = (10 * x for x in drawn(20, 30, dtype=torch.float32))
    theirs = GptOssExperts(config)._apply_gate(torch.stack((gate, up), -1).flatten(1))
    mine = gated(gate, up, GatedFunction("quick_gelu", clamp=7.0, offset=1.0))
    assert up.abs().max() > 7
    assert torch.equal(mine, theirs)


def test_backward_keeps_what_it_was_given_alone() -> None:
    gate, up, _ = drawn(3, 4)
    given = [gate.requires_grad_(), up.requires_grad_(), torch.ones(3, device=DEVICE)]
    out = gated(gate, up, GatedFunction(), given[2])
    kept = out.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in given]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's; exp(inf) is what sigmoid expects
@functions
@pytest.mark.parametrize("shape", [(5,), (1, 3, 1000)])
def test_the_fused_kernels_are_the_formula(
    fused: GatedKernels, function: GatedFunction, shape: tuple[int, ...]
) -> None:
    """Strided views too, over several programs."""
    gate, up, grad = drawn(*shape, 2)
    gate, up, grad = gate[..., 0], up[..., 1], grad[..., 0].contiguous()
    found = by_kernels(fused, gate, up, grad, function)
    for mine, its in zip(found, by_autograd(gate, up, grad, function), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow")
@functions
@pytest.mark.parametrize("shape", [(3, 5), (2, 4100)])
def test_the_fused_kernels_multiply_rows(
    fused: GatedKernels, function: GatedFunction, shape: tuple[int, ...]
) -> None:
    """A row is shorter than a block, and longer than two."""
    gate, up, grad = drawn(*shape)
    weights = drawn(*shape)[1][:, 0]
    found = by_kernels(fused, gate, up, grad, function, weights)
    for mine, its in zip(found, by_autograd(gate, up, grad, function, weights), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("function", FUNCTIONS[3:5], ids=str)
def test_bounds_let_nan_through(fused: GatedKernels, function: GatedFunction) -> None:
    nan = torch.full((2, 3), torch.nan, device=DEVICE)
    for kernels in (fused, seam.gated_kernels("cpu")):
        half = torch.full_like(nan, 0.5)
        for pair in ((nan, nan), (nan, half), (half, nan)):
            for weights in (None, torch.ones(2, device=DEVICE)):
                found = by_kernels(kernels, *pair, nan, function, weights)
                assert all(x.isnan().all() for x in found)


@functions
def test_no_rows(fused: GatedKernels, function: GatedFunction) -> None:
    empty = torch.empty(0, 4, device=DEVICE)
    found = by_kernels(fused, empty, empty, empty, function)
    assert [x.shape for x in found] == [(0, 4)] * 3
    found = by_kernels(fused, empty, empty, empty, function, empty[:, 0])
    assert [x.shape for x in found] == [(0, 4)] * 3 + [(0,)]


@pytest.mark.filterwarnings("ignore:overflow")
@functions
def test_the_fused_kernels_round_once(fused: GatedKernels, function: GatedFunction) -> None:
    gate, up, grad = drawn(1, 3000, dtype=LOW)
    exact = [x.double() for x in (gate, up, grad)]
    for weights in (None, torch.full((1,), 0.7, device=DEVICE)):
        found = by_kernels(fused, gate, up, grad, function, weights)
        its = by_autograd(*exact, function, None if weights is None else weights.double())
        for mine, expected in zip(found[:3], its[:3], strict=True):
            assert mine.dtype == LOW
            torch.testing.assert_close(mine.double(), expected, rtol=1.01 * ROUNDING, atol=1e-6)
        if weights is not None:
            assert found[3].dtype == torch.float32
            torch.testing.assert_close(found[3].double(), its[3], rtol=1e-5, atol=1e-5)


def test_the_fused_kernels_are_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = GatedKernels(seam.forward_eager, seam.backward_eager)
    chosen = seam.gated_kernels.__wrapped__
    assert chosen("cpu") == eager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("cuda") == eager
