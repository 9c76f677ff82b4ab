"""Norms whose factor is 1 + weight, in low precision."""

from __future__ import annotations

import pytest
import torch

from cp_megatron.config import ModelConfig
from cp_megatron.model.norm import Norm
from cp_megatron.spec import NormSpec
from cp_megatron.tensor_parallel import TensorParallel

WIDTH = 16


@pytest.mark.parametrize("norm_bias", ["all", "none"])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_small_weight_is_added_to_one_in_float32(kind: str, norm_bias: str) -> None:
    """In bfloat16, 1 + 0.003 would be 1. Only the result and the gradients are rounded."""
    model = ModelConfig(
        hidden_size=WIDTH, normalization=kind, apply_layernorm_1p=True, norm_bias=norm_bias
    )
    norm = Norm(NormSpec.of(model), tp=TensorParallel()).bfloat16()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(0.003 * torch.randn(WIDTH, generator=generator))
    x = torch.randn(2, 3, WIDTH, generator=generator).bfloat16().requires_grad_()
    leaves = [x, *norm.parameters()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    centered = exact[0] - exact[0].mean(-1, keepdim=True) if kind == "LayerNorm" else exact[0]
    square = centered.square().mean(-1, keepdim=True) + model.norm_epsilon
    expected = centered / square.sqrt() * (1 + exact[1]) + sum(exact[2:])
    out = norm(x)
    assert out.dtype == torch.bfloat16
    ulp = {"rtol": 2.0**-8, "atol": 2.0**-12}
    torch.testing.assert_close(out.double(), expected, **ulp)
    cotangent = torch.randn(x.shape, generator=generator).bfloat16()
    found = torch.autograd.grad(out, leaves, cotangent)
    wanted = torch.autograd.grad(expected, exact, cotangent.double())
    for actual, grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), grad, **ulp)
