"""Gated linear units against autograd on the plain formula, in float64."""

from __future__ import annotations

import importlib.util
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels import gated as seam
from cp_megatron.kernels.gated import GatedFunction, GatedKernels, activate, gated
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


def by_autograd(gate: Tensor, up: Tensor, grad: Tensor, function: GatedFunction) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    x, factor = leaves
    if function.clamp is not None:
        x, factor = x.clamp(max=function.clamp), factor.clamp(-function.clamp, function.clamp)
    factor = factor + function.offset
    if function.activation == "gelu":
        out = F.gelu(x, approximate="tanh") * factor
    else:
        out = x / (1 + torch.exp(-x * (1 if function.activation == "silu" else 1.702))) * factor
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


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


def test_backward_keeps_gate_and_up_alone() -> None:
    gate, up, _ = drawn(3, 4)
    out = gated(gate.requires_grad_(), up.requires_grad_(), GatedFunction())
    assert [x.data_ptr() for x in out.grad_fn.saved_tensors] == [gate.data_ptr(), up.data_ptr()]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's; exp(inf) is what sigmoid expects
@functions
@pytest.mark.parametrize("shape", [(5,), (1, 3, 1000)])
def test_the_fused_kernels_are_the_formula(
    fused: GatedKernels, function: GatedFunction, shape: tuple[int, ...]
) -> None:
    """Strided views too, over several programs."""
    gate, up, grad = drawn(*shape, 2)
    gate, up, grad = gate[..., 0], up[..., 1], grad[..., 0].contiguous()
    found = [fused.forward(gate, up, function), *fused.backward(grad, gate, up, function)]
    for mine, its in zip(found, by_autograd(gate, up, grad, function), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("function", FUNCTIONS[3:5], ids=str)
def test_bounds_let_nan_through(fused: GatedKernels, function: GatedFunction) -> None:
    nan = torch.full((2, 3), torch.nan, device=DEVICE)
    for kernels in (fused, seam.gated_kernels("cpu")):
        half = torch.full_like(nan, 0.5)
        for pair in ((nan, nan), (nan, half), (half, nan)):
            assert kernels.forward(*pair, function).isnan().all()
            assert torch.stack(kernels.backward(nan, *pair, function)).isnan().all()


@functions
def test_no_rows(fused: GatedKernels, function: GatedFunction) -> None:
    empty = torch.empty(0, 4, device=DEVICE)
    assert fused.forward(empty, empty, function).shape == (0, 4)
    assert [x.shape for x in fused.backward(empty, empty, empty, function)] == [(0, 4), (0, 4)]


@pytest.mark.filterwarnings("ignore:overflow")
@functions
def test_the_fused_kernels_round_once(fused: GatedKernels, function: GatedFunction) -> None:
    gate, up, grad = drawn(1, 3000, dtype=LOW)
    found = [fused.forward(gate, up, function), *fused.backward(grad, gate, up, function)]
    expected = by_autograd(gate.double(), up.double(), grad.double(), function)
    for mine, its in zip(found, expected, strict=True):
        assert mine.dtype == LOW
        torch.testing.assert_close(mine.double(), its, rtol=1.01 * ROUNDING, atol=1e-6)


def test_the_fused_kernels_are_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = GatedKernels(seam.forward_eager, seam.backward_eager)
    chosen = seam.gated_kernels.__wrapped__
    assert chosen("cpu") == eager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("cuda") == eager
