"""Gated linear units against autograd on the plain formula, in float64."""

from __future__ import annotations

import importlib.util
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels import gated as seam
from cp_megatron.kernels.gated import Activation, GatedKernels, gated
from tests.kernels.interpreted import DEVICE, LOW, ROUNDING, triton_file

ACTIVATIONS = get_args(Activation)


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


def by_autograd(gate: Tensor, up: Tensor, grad: Tensor, activation: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (gate, up)]
    x = leaves[0]
    act = x / (1 + torch.exp(-x)) if activation == "silu" else F.gelu(x, approximate="tanh")
    out = act * leaves[1]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_result_and_its_gradients(activation: Activation) -> None:
    gate, up, grad = drawn(2, 7, 5)
    leaves = [gate.requires_grad_(), up.requires_grad_()]
    out = gated(gate, up, activation)
    found = [out, *torch.autograd.grad(out, leaves, grad)]
    for mine, its in zip(found, by_autograd(gate, up, grad, activation), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


def test_backward_keeps_gate_and_up_alone() -> None:
    gate, up, _ = drawn(3, 4)
    out = gated(gate.requires_grad_(), up.requires_grad_(), "silu")
    assert [x.data_ptr() for x in out.grad_fn.saved_tensors] == [gate.data_ptr(), up.data_ptr()]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's; exp(inf) is what sigmoid expects
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5,), (1, 3, 1000)])
def test_the_fused_kernels_are_the_formula(
    fused: GatedKernels, activation: Activation, shape: tuple[int, ...]
) -> None:
    """Strided views too, over several programs."""
    gate, up, grad = drawn(*shape, 2)
    gate, up, grad = gate[..., 0], up[..., 1], grad[..., 0].contiguous()
    found = [fused.forward(gate, up, activation), *fused.backward(grad, gate, up, activation)]
    for mine, its in zip(found, by_autograd(gate, up, grad, activation), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_fused_kernels_round_once(fused: GatedKernels, activation: Activation) -> None:
    low = drawn(1, 3000, dtype=LOW)
    gate, up, grad = low
    found = [fused.forward(gate, up, activation), *fused.backward(grad, gate, up, activation)]
    for mine, its in zip(found, by_autograd(*(x.double() for x in low), activation), strict=True):
        assert mine.dtype == LOW
        torch.testing.assert_close(mine.double(), its, rtol=1.01 * ROUNDING, atol=1e-6)


def test_the_fused_kernels_are_for_gpus_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    eager = GatedKernels(seam.forward_eager, seam.backward_eager)
    chosen = seam.gated_kernels.__wrapped__
    assert chosen("cpu") == eager
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert chosen("cuda") == eager
