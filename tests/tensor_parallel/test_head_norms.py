"""Tests norms of heads over tp ranks against plain formulas on all heads, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_megatron.spec import HeadNormSpec, LinearSpec
from cp_megatron.tensor_parallel import (
    AllHeadsNorm,
    ColumnParallelLinear,
    EachHeadNorm,
    TensorParallel,
)
from tests.ranks import run_ranks
from tests.tensor_parallel.test_linear import (
    TOLERANCE,
    numbers,
    placed,
    tensor_parallel,
    whole_gradients,
)

BATCH, SEQ, IN, WIDTH = 2, 5, 6, 3
EPSILON = 0.1


def spec_of(heads: int, kind: str, together: bool) -> HeadNormSpec:
    """LayerNorms have a bias here, and factors of RMSNorms are stored minus 1."""
    layer_norm = kind == "LayerNorm"
    return HeadNormSpec(
        width=WIDTH,
        kind=kind,
        epsilon=EPSILON,
        used_on="heads",
        heads=heads,
        scope="all_heads" if together else "each_head",
        bias=layer_norm,
        one_plus=not layer_norm,
    )


def norm_of(spec: HeadNormSpec, tp: TensorParallel) -> AllHeadsNorm | EachHeadNorm:
    return (AllHeadsNorm if spec.scope == "all_heads" else EachHeadNorm)(spec, tp=tp)


def plain(x: Tensor, spec: HeadNormSpec, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[b, s, n, d] -> [b, s, n, d], by the definition."""
    vectors = x.flatten(2) if spec.scope == "all_heads" else x
    if spec.kind == "LayerNorm":
        vectors = vectors - vectors.mean(-1, keepdim=True)
    factor = 1 + weight if spec.one_plus else weight
    square = (vectors * vectors).sum(-1, keepdim=True) / vectors.shape[-1]
    out = vectors / torch.sqrt(square + EPSILON) * factor
    return (out if bias is None else out + bias).view_as(x)


def projected(
    rank: int, world_size: int, spec: HeadNormSpec
) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """This rank's normalized heads, the gradient of the input, and those of the parameters."""
    tp, features = tensor_parallel(False), spec.heads * WIDTH
    heads = LinearSpec(inputs=IN, outputs=features, bias=False, units=spec.heads, shares_units=True)
    linear = placed(ColumnParallelLinear(heads, tp=tp), world_size, 1)
    norm = placed(norm_of(spec, tp), world_size, *(2, 3)[: 1 + spec.bias])
    x = numbers(0, BATCH, SEQ, IN).requires_grad_()
    out = norm(linear(tp.enter(x)).unflatten(-1, (-1, WIDTH)))
    (out * numbers(10 + rank, *out.shape)).sum().backward()
    assert x.grad is not None
    return out.detach(), x.grad, whole_gradients(linear), whole_gradients(norm)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(("world_size", "heads"), [(1, 4), (2, 4), (2, 1), (4, 2)])
def test_equals_the_norm_of_all_heads(
    world_size: int, heads: int, kind: str, together: bool
) -> None:
    """With fewer heads than ranks, ranks that share a head use it for different things."""
    spec = spec_of(heads, kind, together)
    x, weight = numbers(0, BATCH, SEQ, IN), numbers(1, heads * WIDTH, IN)
    own = [numbers(2 + i, *p.shape) for i, p in enumerate(spec.own_parameters())]
    leaves = [t.requires_grad_() for t in (x, weight, *own)]
    expected = plain((x @ weight.T).unflatten(-1, (heads, WIDTH)), spec, *own, *[None][spec.bias :])
    held, parts = max(1, heads // world_size), []
    for rank in range(world_size):
        first = rank * heads // world_size
        parts.append(expected[:, :, first : first + held])
    total = sum((p * numbers(10 + rank, *p.shape)).sum() for rank, p in enumerate(parts))
    grads = torch.autograd.grad(total, leaves)

    for rank, (out, dx, linear, norm) in enumerate(run_ranks(projected, world_size, spec)):
        torch.testing.assert_close(out, parts[rank].detach(), **TOLERANCE)
        found = [dx, linear["weight"], *norm.values()]
        for actual, wanted in zip(found, grads, strict=True):
            torch.testing.assert_close(actual, wanted, **TOLERANCE)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_bfloat16_is_rounded_once(kind: str, together: bool) -> None:
    spec = spec_of(4, kind, together)
    norm = norm_of(spec, TensorParallel()).bfloat16()
    with torch.no_grad():
        for i, parameter in enumerate(norm.parameters()):
            parameter.copy_(numbers(2 + i, *parameter.shape))
    x = (numbers(1, BATCH, SEQ, 4, WIDTH) + 3).bfloat16().requires_grad_()
    cotangent = numbers(4, *x.shape).bfloat16()
    out = norm(x)
    assert out.dtype == torch.bfloat16
    leaves = [x, *norm.parameters()]
    found = torch.autograd.grad(out, leaves, cotangent)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = plain(exact[0], spec, *exact[1:], *[None][spec.bias :])
    assert torch.equal(out, expected.bfloat16())
    for actual, wanted in zip(
        found, torch.autograd.grad(expected, exact, cotangent.double()), strict=True
    ):
        assert torch.equal(actual, wanted.bfloat16())


def far_from_zero(rank: int, world_size: int) -> Tensor:
    norm = AllHeadsNorm(spec_of(world_size, "LayerNorm", True), tp=tensor_parallel(False))
    placed(norm, world_size, 2, 3)
    x = 1000 + numbers(1, BATCH, SEQ, world_size, WIDTH)
    return norm.float()(x[:, :, [rank]].float())


def test_variance_of_numbers_far_from_zero_is_not_lost() -> None:
    """The difference of the mean square and the squared mean would have no correct digit."""
    spec = spec_of(2, "LayerNorm", True)
    x = (1000 + numbers(1, BATCH, SEQ, 2, WIDTH)).float().double()
    expected = plain(x, spec, numbers(2, 2 * WIDTH), numbers(3, 2 * WIDTH))
    for rank, out in enumerate(run_ranks(far_from_zero, 2)):
        error = (out.double() - expected[:, :, [rank]]).norm() / expected.norm()
        assert error < 1e-4
