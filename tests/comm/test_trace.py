"""Names in a profile, in forward and in autograd's own thread, and no cost without a profile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from cp_megatron.comm import trace
from cp_megatron.comm.trace import traced


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with traced("there"):
            return 2 * x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        with traced("and back"):
            return 2 * dout


def test_ranges_are_in_the_profile() -> None:
    with profile() as found:
        Twice.apply(torch.ones(2, requires_grad=True)).sum().backward()
    names = {event.name for event in found.events() or ()}
    assert {"there", "and back"} <= names


def test_nothing_is_made_outside_a_profile() -> None:
    assert traced("a") is traced("b") is trace._OFF
    with profile():
        assert traced("a") is not trace._OFF
    assert traced("a") is trace._OFF
