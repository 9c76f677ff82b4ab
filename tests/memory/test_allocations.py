"""Tests that the counter of bytes is exact."""

from __future__ import annotations

import torch

from tests.allocations import counting_memory


def test_peak_and_rest_are_exact() -> None:
    before = torch.zeros(1000, dtype=torch.uint8)
    with counting_memory() as count:
        first = torch.empty(300, dtype=torch.uint8)
        second = torch.empty(500, dtype=torch.uint8)
        del first
        third = torch.empty(100, dtype=torch.float32)
        del second
    assert (count.peak, count.held) == (900, 400)
    assert count.allocations == (300, 500, 400)
    assert before.numel() + third.numel() == 1100


def test_what_a_backward_pass_allocates_is_seen() -> None:
    x = torch.ones(1000, requires_grad=True)
    out = x.exp().sum()
    with counting_memory() as count:
        (grad,) = torch.autograd.grad(out, x)
    assert grad.shape == x.shape
    assert count.held == 4000
    assert count.peak >= 4000
    with counting_memory() as nothing:
        pass
    assert (nothing.peak, nothing.held, nothing.allocations) == (0, 0, ())
