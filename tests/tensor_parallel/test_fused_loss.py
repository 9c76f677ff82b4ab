"""Tests head and loss in chunks against torch's own on whole logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.tensor_parallel import (
    LogitTransform,
    LossRule,
    TensorParallel,
    vocab_parallel_fused_loss,
)
from tests.ranks import run_ranks
from tests.tensor_parallel.test_linear import TOLERANCE, numbers

BATCH, SEQ, HIDDEN = 2, 8, 6
VOCAB, PADDED = 257, 384
TIMES = 0.37  # what backward multiplies with


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss."""

    chunk_size: int | None = None
    z_loss_coeff: float = 0.0
    masked: str = "some"
    sequence_parallel: bool = False
    dtype: torch.dtype = torch.float64
    scale: float = 3.0
    multiplier: float = 1.0
    softcap: float | None = None


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x [2, 8, 6], weight [384, 6], labels [2, 8]."""
    x, weight = numbers(1, BATCH, SEQ, HIDDEN) * case.scale, numbers(2, PADDED, HIDDEN)
    labels = torch.tensor([0, 95, 96, 191, 192, 256, 255, 128] * 2).view(BATCH, SEQ).flip(0)
    if case.masked == "some":
        labels[0, 1:6] = -100
    if case.masked == "all":
        labels[:] = -100
    return x.to(case.dtype), weight.to(case.dtype), labels


def split(rank: int, world_size: int, case: Case) -> tuple[Tensor, ...]:
    """Sum, token losses, gradient of the whole x (equal on all ranks) and of the whole weight."""
    group = torch.distributed.group.WORLD
    tp = TensorParallel(group=group, sequence_parallel=case.sequence_parallel)
    x, weight, labels = inputs(case)
    own = x.chunk(world_size, 1)[rank] if tp.splits_sequence else x
    own = own.clone().requires_grad_()
    part = weight.chunk(world_size)[rank].clone().requires_grad_()
    rule = LossRule(chunk_size=case.chunk_size, z_loss_coeff=case.z_loss_coeff)
    transform = LogitTransform(multiplier=case.multiplier, softcap=case.softcap)
    total, losses = vocab_parallel_fused_loss(
        own, part, labels, vocab_size=VOCAB, tp=tp, rule=rule, transform=transform
    )
    assert not losses.requires_grad
    (total * TIMES).backward()
    assert own.grad is not None
    assert part.grad is not None
    assert own.grad.dtype == part.grad.dtype == case.dtype
    dx = all_gather_dim(own.grad, 1, group) if tp.splits_sequence else own.grad
    return total.detach(), losses, dx, all_gather_dim(part.grad, 0, group)


def plain(case: Case) -> tuple[Tensor, ...]:
    """The same, computed by torch alone in float64."""
    x, weight, labels = inputs(case)
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    logits = (x @ weight.T)[..., :VOCAB].flatten(0, 1) * case.multiplier
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    flat = labels.flatten()
    losses = F.cross_entropy(logits, flat, reduction="none")
    squares = logits.logsumexp(-1).square()[flat != -100].sum()
    total = losses.sum() + case.z_loss_coeff * squares
    (total * TIMES).backward()
    assert x.grad is not None
    assert weight.grad is not None
    return total.detach(), losses.detach().view(labels.shape), x.grad, weight.grad


def check(world_size: int, case: Case) -> None:
    expected, ignored = plain(case), inputs(case)[2] == -100
    for found in run_ranks(split, world_size, case):
        for actual, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(actual, wanted, **TOLERANCE)
        assert not found[3][VOCAB:].any()
        assert not found[1][ignored].any()
        assert not found[2][ignored].any()


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("chunk_size", [pytest.param(1, marks=pytest.mark.slow), 6, None])
@pytest.mark.parametrize("masked", ["none", "some", "all"])
def test_equals_torch(
    world_size: int, sequence_parallel: bool, chunk_size: int | None, masked: str
) -> None:
    case = Case(sequence_parallel=sequence_parallel, chunk_size=chunk_size, masked=masked)
    check(world_size, case)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_z_loss(world_size: int, scale: float) -> None:
    check(world_size, Case(z_loss_coeff=1e-2, chunk_size=4, scale=scale, sequence_parallel=True))


@pytest.mark.parametrize(
    "world_size",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("chunk_size", [6, None])
@pytest.mark.parametrize(
    ("multiplier", "softcap"), [(0.3, None), (1.0, 5.0), (-1.7, 5.0), (0.5, 300.0)]
)
def test_multiplied_and_capped_logits(
    world_size: int, chunk_size: int | None, multiplier: float, softcap: float | None
) -> None:
    """Products have a deviation of 7, so that a cap of 5 holds most of them and one of 300 none."""
    case = Case(chunk_size=chunk_size, multiplier=multiplier, softcap=softcap)
    check(world_size, replace(case, sequence_parallel=chunk_size is not None))
    check(world_size, replace(case, z_loss_coeff=1e-2, masked="none"))


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_size", [1, None])
def test_lower_precision_sums_in_float32(
    dtype: torch.dtype, chunk_size: int | None, softcap: float | None
) -> None:
    case = Case(dtype=dtype, chunk_size=chunk_size, z_loss_coeff=1e-3, softcap=softcap)
    expected = plain(case)
    resolution = 1e-5 if dtype == torch.float32 else 2e-2
    for found in run_ranks(split, 2, case):
        assert found[0].dtype == found[1].dtype == torch.float32
        for actual, wanted in zip(found, expected, strict=True):
            error = (actual.double() - wanted).norm() / wanted.norm()
            assert error < resolution


def test_weights_gradient_of_many_chunks_is_as_exact_as_of_one() -> None:
    """Sums are float32: in bfloat16 four hundred summands would cost two digits."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 400, HIDDEN, generator=generator).bfloat16() + 1
    weight = torch.randn(16, HIDDEN, generator=generator).bfloat16()
    labels = torch.randint(0, 16, (1, 400), generator=generator)
    errors = []
    exact = weight.double().requires_grad_()
    F.cross_entropy(x[0].double() @ exact.T, labels[0], reduction="sum").backward()
    assert exact.grad is not None
    for chunk_size in (1, 400):
        leaf = weight.clone().requires_grad_()
        rule = LossRule(chunk_size=chunk_size)
        total, _ = vocab_parallel_fused_loss(
            x, leaf, labels, vocab_size=16, tp=TensorParallel(), rule=rule
        )
        total.backward()
        assert leaf.grad is not None
        errors.append(((leaf.grad.double() - exact.grad).norm() / exact.grad.norm()).item())
    assert errors[0] < 1.5 * errors[1]


def test_padding_of_a_capped_vocabulary_counts_for_nothing_whatever_its_weights() -> None:
    x, weight, labels = inputs(Case())
    weight[VOCAB:] = 1e30  # tanh is 1 there, and a cap would make it an ordinary logit
    transform = LogitTransform(multiplier=0.5, softcap=5.0)
    call = {"vocab_size": VOCAB, "tp": TensorParallel(), "rule": LossRule(chunk_size=3)}
    weight.requires_grad_()
    total, losses = vocab_parallel_fused_loss(x, weight, labels, transform=transform, **call)
    total.backward()
    torch.testing.assert_close(losses, plain(Case(multiplier=0.5, softcap=5.0))[1], **TOLERANCE)
    assert weight.grad is not None
    assert not weight.grad[VOCAB:].any()


def test_nothing_is_differentiated_where_nobody_wants_it() -> None:
    x, weight, labels = inputs(Case())
    call = {"vocab_size": VOCAB, "tp": TensorParallel(), "rule": LossRule(chunk_size=3)}
    with torch.no_grad():
        total, losses = vocab_parallel_fused_loss(x.requires_grad_(), weight, labels, **call)
    assert not total.requires_grad
    torch.testing.assert_close(losses, plain(Case())[1], **TOLERANCE)
