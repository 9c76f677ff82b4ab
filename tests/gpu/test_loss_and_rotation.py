"""The Triton kernels of the loss and of rotations on a GPU, in bfloat16 and at real sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.cross_entropy import cross_entropy_kernels, statistics_eager
from cp_megatron.kernels.rotary import rotate, rotate_eager
from cp_megatron.kernels.rotated_channels import RotatedChannels
from cp_megatron.tensor_parallel import (
    LogitTransform,
    LossRule,
    TensorParallel,
    vocab_parallel_fused_loss,
)
from cp_megatron.tensor_parallel.fused_loss import add_product_

pytestmark = pytest.mark.gpu

ROUNDING = 2**-9
"""The most that rounding to bfloat16 changes a number, relative."""
HIDDEN, VOCAB, PADDED = 256, 50_257, 50_304


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(len(shape) + shape[-1])
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def loss_errors(dtype: torch.dtype, transform: LogitTransform, chunk: int) -> dict[str, float]:
    """Relative errors against torch in float64, with a z-loss and tokens that do not count."""
    x, weight = draw(1, 1000, HIDDEN, dtype=dtype), draw(PADDED, HIDDEN, dtype=dtype) * 0.2
    labels = torch.randint(0, VOCAB, (1, 1000), device="cuda")
    labels[0, 5:100] = -100
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    rule = LossRule(chunk_size=chunk, z_loss_coeff=1e-3)
    call = {"vocab_size": VOCAB, "tp": TensorParallel(), "rule": rule, "transform": transform}
    total, losses = vocab_parallel_fused_loss(*leaves, labels, **call)
    total.backward()

    exact = [t.double().requires_grad_() for t in (x, weight)]
    logits = (exact[0] @ exact[1].T)[0, :, :VOCAB] * transform.multiplier
    if transform.softcap is not None:
        logits = transform.softcap * torch.tanh(logits / transform.softcap)
    plain = F.cross_entropy(logits, labels[0], reduction="none")
    squares = logits.logsumexp(-1).square()[labels[0] != -100].sum()
    (plain.sum() + 1e-3 * squares).backward()
    assert not losses[labels == -100].any()
    assert leaves[1].grad is not None
    assert not leaves[1].grad[VOCAB:].any()
    pairs = {"loss": (losses[0], plain.detach())}
    for name, leaf, its in zip(("dx", "dw"), leaves, exact, strict=True):
        assert leaf.grad is not None
        assert its.grad is not None
        pairs[name] = leaf.grad, its.grad
    return {name: relative(*pair) for name, pair in pairs.items()}


TRANSFORMS = [LogitTransform(), LogitTransform(multiplier=0.3, softcap=5.0)]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("chunk", [128, 1000])
def test_the_loss_and_its_gradients(transform: LogitTransform, chunk: int) -> None:
    assert cross_entropy_kernels("cuda").statistics is not statistics_eager
    assert max(loss_errors(torch.float64, transform, chunk).values()) < 1e-12
    # TF32 is off unless a program asks for it.
    assert max(loss_errors(torch.float32, transform, chunk).values()) < 1e-5
    # Rounded are the logits, their gradient and the results.
    assert max(loss_errors(torch.bfloat16, transform, chunk).values()) < 4 * ROUNDING


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_added_in_float32(dtype: torch.dtype) -> None:
    a, b = draw(640, 2048, dtype=dtype), draw(2048, HIDDEN, dtype=dtype)
    total = torch.full((640, HIDDEN), torch.nan, device="cuda")
    for first in (True, False):
        add_product_(total, a, b, first=first)
    assert relative(total, 2 * (a.double() @ b.double())) < 1e-5


def test_the_loss_of_a_chunk_holds_its_logits_once() -> None:
    tokens, width = 4096, 32_768
    x, weight = draw(1, tokens, HIDDEN), draw(width, HIDDEN)
    labels = torch.randint(0, width, (1, tokens), device="cuda")
    call = {"vocab_size": width, "tp": TensorParallel(), "rule": LossRule(chunk_size=tokens)}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocab_parallel_fused_loss(x.requires_grad_(), weight.requires_grad_(), labels, **call)
    used = torch.cuda.max_memory_allocated() - before
    gradients = 4 * width * HIDDEN + 2 * tokens * HIDDEN
    assert used < 2 * tokens * width + gradients + (32 << 20)


ROTATED = [
    # shape, pairs, first rotated channel
    ((2, 4096, 32, 64), 32, 0),
    ((1, 4096, 8, 128), 64, 0),
    ((1, 1001, 5, 80), 20, 0),
    ((1, 1001, 16, 192), 32, 128),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shape", "num_pairs", "start"), ROTATED)
def test_rotations(
    shape: tuple[int, ...], num_pairs: int, start: int, interleaved: bool, dtype: torch.dtype
) -> None:
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    angles = draw(shape[1], num_pairs, dtype=torch.float64)
    cos, sin = (1.1 * table.to(exact) for table in (angles.cos(), angles.sin()))
    x = draw(*shape, dtype=dtype)
    by_head = x.transpose(1, 2).contiguous().transpose(1, 2)  # as attention may return gradients
    for factor in (None, draw(shape[1], dtype=dtype)):
        for inverse in (False, True):
            channels = RotatedChannels(start=start, interleaved=interleaved, inverse=inverse)
            wide = (t if t is None else t.double() for t in (x, cos, sin, factor))
            expected = rotate_eager(*wide, channels)
            found = rotate(x, cos, sin, factor, channels)
            assert found.dtype == dtype
            assert found.is_contiguous()
            assert relative(found, expected) < (1e-14 if dtype == torch.float64 else ROUNDING)
            assert torch.equal(rotate(by_head, cos, sin, factor, channels), found)
