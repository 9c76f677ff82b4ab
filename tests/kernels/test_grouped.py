"""Linears of several experts against a loop over the experts, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import grouped as seam
from cp_megatron.kernels.grouped import grouped_linear
from tests.allocations import counting_memory

COUNTS = {
    "several": (3, 1, 7),
    "empty experts": (0, 5, 0, 0, 6, 0),
    "one": (9,),
    "no rows": (0, 0, 0),
}
WIDTHS = [(16, 8), (5, 3), (1, 1)]
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def drawn(
    counts: tuple[int, ...], inputs: int, outputs: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """x, weight, bias and the gradient of y."""
    generator = torch.Generator().manual_seed(inputs)
    rows, experts = sum(counts), len(counts)
    shapes = (rows, inputs), (experts, outputs, inputs), (experts, outputs), (rows, outputs)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def by_loop(given: Sequence[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
    """y and the gradients of x, weight and bias; autograd differentiates a loop, in float64."""
    x, weight, bias, dy = given
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    rows = leaves[0].split(counts)
    y = torch.cat([r @ leaves[1][e].T + leaves[2][e] for e, r in enumerate(rows)])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def by_function(given: Sequence[Tensor], counts: tuple[int, ...]) -> list[Tensor]:
    x, weight, bias, dy = given
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    y = grouped_linear(leaves[0], leaves[1], counts, leaves[2])
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def assert_near(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for mine, its in zip(found, expected, strict=True):
        assert mine.shape == its.shape
        assert (mine.double() - its).norm() <= bound * its.norm()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_results_and_gradients(
    counts: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    given = drawn(counts, *widths, dtype)
    found = by_function(given, counts)
    assert all(x.dtype == dtype for x in found)
    assert_near(found, by_loop(given, counts), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", ROUNDING)
def test_tensors_of_any_strides(dtype: torch.dtype) -> None:
    counts = (3, 0, 2)
    x, weight, bias, dy = drawn(counts, 16, 8, dtype)
    strided = {
        "columns of a wider x": (x.repeat(1, 2)[:, 16:], weight, bias, dy),
        "every second column of x": (x.repeat_interleave(2, 1)[:, ::2], weight, bias, dy),
        "a transposed weight": (x, weight.transpose(1, 2).contiguous().transpose(1, 2), bias, dy),
        "columns of a wider weight": (x, weight.repeat(1, 1, 2)[:, :, 16:], bias, dy),
        "a weight at an odd byte": (x, odd(weight), bias, dy),
        "an expanded gradient": (x, weight, bias, dy[:1, :1].expand(5, 8)),
        "a transposed gradient": (x, weight, bias, dy.t().contiguous().t()),
    }
    for given in strided.values():
        expected = by_loop(given, counts)
        assert_near(by_function(given, counts), expected, 2 * ROUNDING[dtype])


def odd(x: Tensor) -> Tensor:
    """The same numbers, beginning one number after a boundary of 16 bytes."""
    memory = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    return memory.copy_(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_one_product_and_the_loop_give_the_same_bits(
    counts: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = drawn(counts, 24, 16, dtype)
    calls = counted(monkeypatch)
    found = by_function(given, counts)
    assert len(calls) == (3 if sum(counts) else 0)
    monkeypatch.setattr(seam, "_grouped_product_takes", lambda *tensors: False)
    for mine, its in zip(found, by_function(given, counts), strict=True):
        assert torch.equal(mine, its)
    assert len(calls) == (3 if sum(counts) else 0)


def counted(patch: pytest.MonkeyPatch) -> list[object]:
    """The calls of the grouped product from now on."""
    calls: list[object] = []
    product: Callable[..., Tensor] = torch.nn.functional.grouped_mm

    def call(*args: Tensor, **options: Tensor) -> Tensor:
        calls.append(args)
        return product(*args, **options)

    patch.setattr(torch.nn.functional, "grouped_mm", call)
    return calls


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """New tensors that nothing is written to hold NaN, not what was there before."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 5, 0, 0, 6, 0)], ids=str)
def test_experts_without_rows_have_zero_gradients(
    counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    _, _, dweight, dbias = by_function(drawn(counts, 16, 8, dtype), counts)
    for gradient in (dweight, dbias):
        assert gradient.flatten(1).any(1).tolist() == [count > 0 for count in counts]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_backward_allocates_one_gradient_of_the_weight(dtype: torch.dtype) -> None:
    counts = (2, 0, 3, 1, 0, 2, 4, 1)
    x, weight, bias, dy = drawn(counts, 64, 48, dtype)
    y = grouped_linear(x.requires_grad_(), weight.requires_grad_(), counts, bias.requires_grad_())
    with counting_memory() as count:
        gradients = torch.autograd.grad(y, (x, weight, bias), dy)
    large = [size for size in count.allocations if size >= weight[0].nbytes]
    assert large == [weight.nbytes]
    assert count.peak <= sum(t.nbytes for t in gradients) + 4096


@pytest.mark.parametrize("needed", range(3))
def test_only_the_needed_gradients_are_computed(needed: int) -> None:
    counts = (2, 3)
    x, weight, bias, dy = drawn(counts, 8, 8)
    leaves = [x, weight, bias]
    leaves[needed].requires_grad_()
    y = grouped_linear(x, weight, counts, bias)
    (found,) = torch.autograd.grad(y, leaves[needed : needed + 1], dy)
    assert_near([found], [by_loop([x, weight, bias, dy], counts)[1 + needed]], 1e-14)


def test_a_linear_without_a_bias() -> None:
    counts = (2, 3)
    x, weight, bias, dy = drawn(counts, 8, 8)
    x.requires_grad_()
    y = grouped_linear(x, weight, counts)
    found = [y.detach(), *torch.autograd.grad(y, [x], dy)]
    assert_near(found, by_loop([x, weight, torch.zeros_like(bias), dy], counts)[:2], 1e-14)
