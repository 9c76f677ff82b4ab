"""The kernels of recurrences agree, method by method, whatever enters and leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels.linear_blocks import LinearBlocks
from cp_megatron.kernels.linear_fla import LinearFla
from cp_megatron.kernels.linear_interface import LinearInputs, LinearKernel
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.states import Piece, StatePlan
from tests.context_parallel.recurrences import KINDS, inputs_of
from tests.kernels.double_fla import FlaDouble

LENGTHS = (50, 3, 1, 30, 44)
CPU = torch.device("cpu")


def pieces_of(lengths: tuple[int, ...], rank: int) -> tuple[Mask, list[Piece]]:
    """One of two ranks, zigzag."""
    mask = Mask.documents(lengths)
    plan = StatePlan.of(mask, SequenceLayout.make(mask, 2, "zigzag"), 1)
    return mask, [piece for piece in plan.pieces if piece.rank == rank]


def problem(
    kind: str, pieces: list[Piece], dims: tuple[int, int], dtype: torch.dtype = torch.float64
) -> tuple[LinearInputs, tuple[Tensor, Tensor, Tensor]]:
    """Inputs; and the gradient of the output, what enters and the gradients of what leaves."""
    tokens = sum(piece.stop - piece.start for piece in pieces)
    q, k, v, g, beta = inputs_of(kind, 2, tokens, heads=(2, 4), dims=dims)
    assert q is not None
    q, k, v = (x.to(dtype) for x in (q, k, v) if x is not None)
    assert g is not None
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    g, rate = g.to(exact), None if beta is None else beta.to(exact)
    generator = torch.Generator().manual_seed(3)
    dout = torch.randn(v.shape, generator=generator).to(dtype)
    counts = sum(piece.enters for piece in pieces), sum(piece.leaves for piece in pieces)
    entering, leaving = (
        torch.randn(2, count, 4, *dims, generator=generator).to(exact) for count in counts
    )
    return LinearInputs(q, k, v, g, rate, dims[0] ** -0.5), (dout, entering, leaving)


def results(
    kernel: LinearKernel, x: LinearInputs, given: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """U, M, out, the gradients of what enters, and those of the inputs, in float64 on the CPU."""
    dout, entering, leaving = given
    with torch.no_grad():
        summary = kernel.summarize(x)
        states = [summary.increments.clone(), summary.transitions.clone()]
        found = [*states, kernel.apply(x, summary, entering), kernel.adjoint(x, dout)]
        found += kernel.backward(x, dout, entering, leaving)
    return [y.double().cpu() for y in found]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
    errors = [(x - y).norm() / y.norm() for x, y in zip(found, expected) if y.numel()]
    return float(max(errors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [LENGTHS, (128,)], ids=str)
def test_fla_agrees_with_the_reference(kind: str, lengths: tuple[int, ...]) -> None:
    for rank in range(2):
        mask, pieces = pieces_of(lengths, rank)
        x, given = problem(kind, pieces, (6, 5))
        found = results(LinearFla(FlaDouble().functions, mask, pieces, CPU), x, given)
        assert worst(found, results(LinearBlocks(mask, pieces, CPU), x, given)) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_hold_no_denormal_numbers(kind: str) -> None:
    """In a piece of 256 tokens, e^(-0.35 * 256) is 1e-39, which float32 holds as denormal."""
    mask, pieces = pieces_of((64, 384, 64), 1)
    x, _ = problem(kind, pieces, (6, 5), torch.float32)
    x = x._replace(g=torch.full_like(x.g, -0.35), k=x.k * 0.01)
    transitions = LinearBlocks(mask, pieces, CPU).summarize(x).transitions
    assert transitions.shape[1] == 1
    assert not ((transitions != 0) & (transitions.abs() < torch.finfo(torch.float32).tiny)).any()
