"""Tests embedding and head over tp ranks against torch on the whole table."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.comm.collectives import all_gather_dim
from cp_megatron.spec import EmbeddingSpec, HeadSpec
from cp_megatron.tensor_parallel import (
    LossRule,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
)
from tests.ranks import run_ranks
from tests.tensor_parallel.test_linear import (
    TOLERANCE,
    gathered_cross_entropy,
    numbers,
    placed,
    tensor_parallel,
    whole_gradients,
)

VOCAB, PADDED, HIDDEN, SEQ = 257, 384, 6, 8
SIZES = {"vocab_size": VOCAB, "padded_vocab": PADDED, "width": HIDDEN}


def tokens() -> Tensor:
    """[1, S] with both ends of the vocabulary and a token that occurs twice."""
    return torch.tensor([[0, 256, 95, 96, 96, 191, 192, 255]])


def embed(
    rank: int, world_size: int, sequence_parallel: bool, multiplier: float
) -> tuple[Tensor, dict[str, Tensor]]:
    tp = tensor_parallel(sequence_parallel)
    spec = EmbeddingSpec(**SIZES, multiplier=multiplier)
    embedding = placed(VocabParallelEmbedding(spec, tp=tp), world_size, 1)
    out = embedding(tokens())
    shares = world_size if sequence_parallel else 1
    (out * numbers(2, 1, SEQ, HIDDEN).chunk(shares, 1)[rank % shares]).sum().backward()
    whole = all_gather_dim(out.detach(), 1, tp.group) if sequence_parallel else out.detach()
    return whole, whole_gradients(embedding)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 6**0.5])
def test_embedding(world_size: int, sequence_parallel: bool, multiplier: float) -> None:
    weight = numbers(1, PADDED, HIDDEN).requires_grad_()
    expected = F.embedding(tokens(), weight) * multiplier
    (expected * numbers(2, 1, SEQ, HIDDEN)).sum().backward()
    for out, grads in run_ranks(embed, world_size, sequence_parallel, multiplier):
        assert torch.equal(out, expected)
        torch.testing.assert_close(grads["weight"], weight.grad, **TOLERANCE)
        assert not grads["weight"][VOCAB:].any()


def test_the_multiplier_is_rounded_to_the_type_of_the_activations() -> None:
    """Gemma rounds sqrt(hidden) to the activations' type, and then multiplies."""
    spec = EmbeddingSpec(**SIZES, multiplier=3072**0.5)  # 55.4256; 55.5 in bfloat16
    embedding = VocabParallelEmbedding(spec, tp=TensorParallel()).bfloat16()
    with torch.no_grad():
        embedding.weight.copy_(numbers(1, PADDED, HIDDEN))
    rows = F.embedding(tokens(), embedding.weight)
    assert torch.equal(embedding(tokens()), rows * torch.tensor(55.5, dtype=torch.bfloat16))


def head(
    rank: int, world_size: int, sequence_parallel: bool, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    tp = tensor_parallel(sequence_parallel)
    spec = HeadSpec(**SIZES, tied=False, multiplier=1.3 if softcap else 1.0, softcap=softcap)
    module = placed(VocabParallelHead(spec, tp=tp), world_size, 1)
    shares = world_size if sequence_parallel else 1
    x = numbers(2, 1, SEQ, HIDDEN).chunk(shares, 1)[rank % shares].clone().requires_grad_()
    logits = module(x)
    loss = gathered_cross_entropy(logits, tokens(), torch.distributed.group.WORLD)
    loss.sum().backward()
    assert x.grad is not None
    grad = all_gather_dim(x.grad, 1, tp.group) if sequence_parallel else x.grad
    whole = all_gather_dim(logits.detach(), -1, tp.group)
    return whole, loss.detach(), grad, whole_gradients(module)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_head_and_loss(world_size: int, sequence_parallel: bool, softcap: float | None) -> None:
    weight = numbers(1, PADDED, HIDDEN).requires_grad_()
    x = numbers(2, 1, SEQ, HIDDEN).requires_grad_()
    logits = F.linear(x, weight[:VOCAB])
    if softcap is not None:
        logits = softcap * torch.tanh(1.3 * logits / softcap)
    expected = F.cross_entropy(logits.squeeze(0), tokens().squeeze(0), reduction="none")
    expected.sum().backward()
    for whole, loss, grad, grads in run_ranks(head, world_size, sequence_parallel, softcap):
        assert whole.shape == (1, SEQ, PADDED)
        torch.testing.assert_close(whole[..., :VOCAB], logits.detach(), **TOLERANCE)
        torch.testing.assert_close(loss.squeeze(0), expected.detach(), **TOLERANCE)
        torch.testing.assert_close(grad, x.grad, **TOLERANCE)
        torch.testing.assert_close(grads["weight"], weight.grad, **TOLERANCE)
        assert not grads["weight"][VOCAB:].any()


def tied(rank: int, world_size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Computes the loss with one weight for both ends; the embedding multiplies its rows by 3."""
    tp = tensor_parallel(False)
    embedding = VocabParallelEmbedding(EmbeddingSpec(**SIZES, multiplier=3.0), tp=tp)
    placed(embedding, world_size, 1)
    spec = HeadSpec(**SIZES, tied=True, multiplier=0.7, softcap=2.0)
    rule = LossRule(chunk_size=3, z_loss_coeff=1e-2)
    module = VocabParallelHead(spec, tp=tp)
    total, _ = module.losses(embedding(tokens()), tokens().flip(1), rule, embedding.weight)
    total.backward()
    return total.detach(), whole_gradients(embedding)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_only_the_embedding_multiplies_a_tied_weight_by_its_multiplier(world_size: int) -> None:
    weight = numbers(1, PADDED, HIDDEN).requires_grad_()
    products = (3.0 * F.embedding(tokens(), weight)) @ weight[:VOCAB].T
    logits = (2.0 * torch.tanh(0.7 * products / 2.0)).squeeze(0)
    loss = F.cross_entropy(logits, tokens().flip(1).squeeze(0), reduction="sum")
    expected = loss + 1e-2 * logits.logsumexp(-1).square().sum()
    expected.backward()
    for total, grads in run_ranks(tied, world_size):
        torch.testing.assert_close(total, expected.detach(), **TOLERANCE)
        torch.testing.assert_close(grads["weight"], weight.grad, **TOLERANCE)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_padding_is_never_predicted_whatever_the_weights(softcap: float | None) -> None:
    tp = TensorParallel()
    module = VocabParallelHead(HeadSpec(**SIZES, tied=False, softcap=softcap), tp=tp)
    with torch.no_grad():
        module.weight.fill_(-1.0)
        module.weight[VOCAB:].fill_(1e30)  # a trained or loaded pad may hold anything
    logits = module(torch.ones(1, 3, HIDDEN))
    assert logits.argmax(-1).max() < VOCAB
    assert torch.equal(logits.softmax(-1)[..., VOCAB:], torch.zeros(1, 3, PADDED - VOCAB))
