"""Linears of several experts against a loop over the experts, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import grouped as seam
from cp_megatron.kernels import grouped_mkl
from cp_megatron.kernels.grouped import grouped_linear, grouped_products
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


@pytest.fixture(params=["as it is", "without oneMKL"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's library, once as if it did not export what oneMKL has."""
    if request.param == "without oneMKL":
        hide_mkl(monkeypatch)


def hide_mkl(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grouped_mkl, "_routines", dict)


@pytest.mark.usefixtures("library")
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


@pytest.mark.usefixtures("library")
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
        "an expanded weight": (x, weight[:, :1].expand_as(weight), bias, dy),
        "equal columns of a weight": (x, weight[:, :, :1].expand_as(weight), bias, dy),
        "a weight that overlaps": (x, weight.as_strided(weight.shape, (20, 2, 1)), bias, dy),
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
    hide_mkl(monkeypatch)
    calls = counted(monkeypatch)
    found = by_function(given, counts)
    assert len(calls) == (3 if sum(counts) else 0)
    monkeypatch.setattr(seam, "_grouped_product_takes", lambda *tensors: False)
    for mine, its in zip(found, by_function(given, counts), strict=True):
        assert torch.equal(mine, its)
    assert len(calls) == (3 if sum(counts) else 0)


def test_one_call_of_onemkl_computes_all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights: a call for each result, each summand of x's gradient, each weight's gradient."""
    routines = grouped_mkl._routines()
    if not routines:
        pytest.skip(
            "PyTorch's library exports oneMKL only in its packages for Linux on x86-64; elsewhere "
            "the loop that other tests check computes all experts"
        )
    calls: list[torch.dtype] = []

    def counting(dtype: torch.dtype) -> Callable[..., None]:
        def call(*args: object) -> None:
            calls.append(dtype)
            routines[dtype](*args)

        return call

    monkeypatch.setattr(grouped_mkl, "_routines", lambda: {d: counting(d) for d in routines})
    counts = (30, 0, 1, 70)
    for dtype in (torch.float64, torch.float32):
        x, weight, _, dy = drawn(counts, 40, 24, dtype)
        leaves = [t.requires_grad_() for t in (x, weight, weight.detach().flip(0))]
        results = grouped_products(leaves[0], leaves[1:], counts)
        torch.autograd.grad(results, leaves, (dy, dy))
        assert calls == [dtype] * 6
        calls.clear()


def test_large_products_are_not_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = (30, 0, 1, 70)
    given = drawn(counts, 40, 24)
    if grouped_mkl.takes(given[0]):
        monkeypatch.setattr(grouped_mkl, "_LARGE", 30 * 40 * 24)
        y = given[3].clone()
        done = grouped_mkl.write_products(y, given[0], given[1].transpose(1, 2), counts, adds=False)
        assert done == {0, 2}
        assert torch.equal(y[31:], given[3][31:])
        assert grouped_mkl.write_outer(given[1].clone(), y, given[0], counts) == {0, 2}
    assert_near(by_function(given, counts), by_loop(given, counts), 1e-14)


@pytest.mark.usefixtures("library")
def test_types_are_not_mixed() -> None:
    x, weight, _, _ = drawn((2, 3), 16, 8, torch.float32)
    with pytest.raises(RuntimeError):
        grouped_linear(x, weight.double(), (2, 3))


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


@pytest.mark.usefixtures("library", "nan_in_new_memory")
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_products_that_share_their_input(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    first, second = drawn(counts, 16, 8, dtype), drawn(counts, 16, 24, dtype)
    x, rounding = first[0], ROUNDING[dtype]
    apart = [by_function([x, *given[1:]], counts) for given in (first, second)]
    leaves = [t.requires_grad_() for t in (x, first[1], second[1], first[2], second[2])]
    results = grouped_products(x, leaves[1:3], counts, leaves[3:])
    dx, *others = torch.autograd.grad(results, leaves, (first[3], second[3]))
    assert_near([dx], [(apart[0][1].double() + apart[1][1])], 2 * rounding)
    expected = [apart[0][0], apart[1][0], apart[0][2], apart[1][2], apart[0][3], apart[1][3]]
    assert all(map(torch.equal, [*results, *others], expected))


@pytest.mark.parametrize("used", range(2))
def test_products_of_which_one_is_used(used: int) -> None:
    counts = (2, 0, 3)
    x, weight, bias, dy = drawn(counts, 8, 8)
    weights = [weight.clone().requires_grad_() for _ in range(2)]
    y = grouped_products(x.requires_grad_(), weights, counts)[used]
    leaves = (x, weights[used], weights[1 - used])
    *found, unused = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    assert unused is None
    assert_near(found, by_loop([x, weight, torch.zeros_like(bias), dy], counts)[1:3], 1e-14)


def test_gradients_of_a_shared_input_are_added_up_in_one_tensor() -> None:
    counts = (200, 0, 120)
    x, weight, _, dy = drawn(counts, 64, 8)
    given = [weight.clone() for _ in range(3)]
    results = grouped_products(x.requires_grad_(), given, counts)
    with counting_memory() as count:
        torch.autograd.grad(results, x, [dy] * 3)
    assert [size for size in count.allocations if size >= x.nbytes] == [x.nbytes]
