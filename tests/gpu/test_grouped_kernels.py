"""Compares products of several experts on a GPU with a loop over experts in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cp_megatron.kernels.grouped import grouped_products

pytestmark = pytest.mark.gpu

COUNTS = {"uneven": [300, 0, 17, 1000, 1, 0, 128, 602], "none": [0] * 8, "one": [0] * 7 + [64]}
INPUTS, OUTPUTS = 512, (256, 384)


def drawn(*shape: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)


def problem(counts: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Rows, weights, biases and gradients of the results."""
    rows, experts = sum(counts), len(counts)
    weights = [drawn(experts, outputs, INPUTS) for outputs in OUTPUTS]
    biases = [drawn(experts, outputs) for outputs in OUTPUTS]
    return drawn(rows, INPUTS), weights, biases, [drawn(rows, outputs) for outputs in OUTPUTS]


def loop(x: Tensor, weight: Tensor, bias: Tensor, counts: list[int]) -> Tensor:
    rows = [
        part @ matrix.t() + row
        for part, matrix, row in zip(x.split(counts), weight, bias, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_and_gradients(counts: list[int]) -> None:
    x, weights, biases, grads = problem(counts)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]
    found = grouped_products(x, weights, counts, biases)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    pairs = zip(exact[1:3], exact[3:], strict=True)
    expected = [loop(exact[0], weight, bias, counts) for weight, bias in pairs]
    here = [*found, *torch.autograd.grad(found, leaves, grads)]
    doubles = [grad.double() for grad in grads]
    there = [*expected, *torch.autograd.grad(expected, exact, doubles)]
    for mine, its in zip(here, there, strict=True):
        assert mine.dtype == torch.bfloat16
        scale = its.norm() if its.numel() else 1.0
        assert float((mine.double() - its).norm()) <= 4e-3 * float(scale)


def test_launches_do_not_follow_the_number_of_experts() -> None:
    counts = [16] * 64
    x, weights, biases, grads = problem(counts)
    leaves = [tensor.requires_grad_() for tensor in (x, *weights, *biases)]

    def run() -> None:
        torch.autograd.grad(grouped_products(x, weights, counts, biases), leaves, grads)

    run()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        run()
        torch.cuda.synchronize()
    assert sum(row.count for row in recorded.key_averages()) < 48
