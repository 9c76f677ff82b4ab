"""The two passes of the cross-entropy against autograd in float64, eager and by Triton."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from cp_megatron.kernels import cross_entropy as seam
from cp_megatron.kernels.cross_entropy import (
    CrossEntropyKernels,
    gradient_eager,
    statistics_eager,
)
from cp_megatron.kernels.logit_transform import LogitTransform, VocabularyPart
from tests.kernels.interpreted import DEVICE, LOW, ROUNDING, triton_file

ROWS = 6
TRANSFORMS = [
    LogitTransform(),
    LogitTransform(multiplier=0.3),
    LogitTransform(multiplier=-1.7, softcap=5.3),
]


@pytest.fixture(params=["eager", "triton"])
def kernels(request: pytest.FixtureRequest) -> CrossEntropyKernels:
    if request.param == "eager":
        return CrossEntropyKernels(statistics_eager, gradient_eager)
    file = triton_file("cross_entropy_triton")
    return CrossEntropyKernels(file.statistics_triton, file.gradient_triton)


def drawn(width: int, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Products [6, width] with strides of their own, labels [6] and scale [6]."""
    generator = torch.Generator().manual_seed(width)
    products = 4 * torch.randn(ROWS, width + 3, generator=generator, dtype=torch.float64)
    labels = first + torch.tensor([0, width // 2, -100 - first, -1, width, width // 3])
    scale = torch.tensor([1.0, 0.7, 0.0, 1.0, -0.2, 1.0], dtype=torch.float64)
    return products.to(DEVICE, dtype)[:, :width], labels.to(DEVICE), scale.to(DEVICE)


def plain(
    products: Tensor, labels: Tensor, scale: Tensor, part: VocabularyPart, elsewhere: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp and target of the part, and the gradient if others' log-sum-exp is given."""
    x = products.double().detach().requires_grad_()
    softcap = part.transform.softcap
    logits = x[:, : part.num_valid] * part.transform.multiplier
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    local = labels - part.first
    here = (local >= 0) & (local < part.num_valid)
    picked = logits.gather(1, local.clamp(0, part.num_valid - 1).unsqueeze(1)).squeeze(1)
    target = torch.where(here, picked, 0.0)
    # d logaddexp(lse, elsewhere) = softmax over all; the multiplier is part of scale
    weight = scale / part.transform.multiplier
    loss = (torch.logaddexp(lse, elsewhere) * weight - target).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return lse.detach(), target.detach(), grad


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy warns of infinities
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    ("width", "num_valid", "first"), [(5, 5, 0), (64, 33, 128), (5000, 4500, 0), (8192, 8192, 8192)]
)
def test_both_passes(
    width: int, num_valid: int, first: int, transform: LogitTransform, kernels: CrossEntropyKernels
) -> None:
    part = VocabularyPart(first=first, num_valid=num_valid, transform=transform)
    products, labels, scale = drawn(width, torch.float64, first)
    labels[labels >= first + num_valid] = first + width  # that of another rank, not padding
    elsewhere = torch.full((ROWS,), 3.0, dtype=torch.float64, device=DEVICE)
    expected = plain(products, labels, scale, part, elsewhere)
    products[:, num_valid:] = 1e30
    lse, target, kept = kernels.statistics(products, labels, part)
    whole = torch.logaddexp(lse, elsewhere)
    grad = kernels.gradient(kept, labels, part, whole, scale)
    for mine, its in zip((lse, target, grad), expected, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-12, atol=1e-13)
    assert not grad[:, num_valid:].any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_part_of_padding_alone_weighs_nothing(kernels: CrossEntropyKernels) -> None:
    part = VocabularyPart(first=100, num_valid=0, transform=LogitTransform())
    products, labels, scale = drawn(40, torch.float64)
    lse, target, kept = kernels.statistics(products, labels, part)
    others = torch.zeros(ROWS, dtype=torch.float64, device=DEVICE)
    assert torch.exp(lse - others).eq(0).all()
    assert target.eq(0).all()
    assert kernels.gradient(kept, labels, part, others, scale).eq(0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_half_precision_is_computed_in_float32(kernels: CrossEntropyKernels) -> None:
    part = VocabularyPart(first=0, num_valid=4500, transform=LogitTransform(softcap=30.0))
    products, labels, scale = drawn(5000, LOW)
    labels[4] = -1
    elsewhere = torch.full((ROWS,), -torch.inf, dtype=torch.float64, device=DEVICE)
    lse, target, grad = plain(products, labels, scale, part, elsewhere)
    own_lse, own_target, kept = kernels.statistics(products, labels, part)
    assert own_lse.dtype == own_target.dtype == torch.float32
    torch.testing.assert_close(own_lse.double(), lse, rtol=1e-6, atol=0)
    # The kernel's tanh is exact to float32's last bit of 1, so its logits are to that of the cap.
    torch.testing.assert_close(own_target.double(), target, rtol=1e-6, atol=4e-6)
    found = kernels.gradient(kept, labels, part, own_lse, scale.float())
    # The gradient is rounded once; numbers near 0 are rounded to multiples of the smallest.
    least = 0.0 if found.dtype == torch.float32 else torch.finfo(LOW).smallest_normal
    torch.testing.assert_close(
        found.double(), grad, rtol=1.1 * ROUNDING, atol=least * ROUNDING + 1e-9
    )


def test_a_gpu_without_triton_computes_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    uncached = seam.cross_entropy_kernels.__wrapped__
    assert uncached("cuda") == (statistics_eager, gradient_eager)
    monkeypatch.undo()
    assert uncached("cpu") == (statistics_eager, gradient_eager)
