"""Terms of the loss for balanced experts against dense formulas, however rows are laid out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_megatron.model.balance import (
    UNCOUNTED,
    expert_counts,
    imbalance,
    moved_biases,
    row_numbers,
    squared_logsumexp,
)

ROWS, LENGTH, PADDING, EXPERTS, TOPK = 3, 20, 4, 6, 2


def assert_near(found: object, expected: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def drawn(tokens: int) -> tuple[Tensor, Tensor]:
    """Logits [n, E], and the experts with the best ones [n, K]."""
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, EXPERTS, generator=generator, dtype=torch.float64)
    return logits, logits.topk(TOPK).indices


def dense_imbalance(probabilities: Tensor, experts: Tensor) -> Tensor:
    """One row: E / K sum_e f_e P_e, token by token."""
    shares = torch.zeros(EXPERTS, dtype=torch.float64)
    for chosen in experts.tolist():
        for expert in chosen:
            shares[expert] += 1 / len(experts)
    return EXPERTS / TOPK * (shares * probabilities.mean(0)).sum()


def laid_out() -> tuple[Tensor, Tensor, Tensor]:
    """Rows laid end to end, then padding: logits, experts, and the number of each token's row."""
    tokens = ROWS * LENGTH + PADDING
    logits, experts = drawn(tokens)
    return logits, experts, row_numbers(torch.arange(tokens), LENGTH, ROWS)


def test_row_numbers() -> None:
    assert row_numbers(torch.tensor([[0, 4, 5], [9, 10, 14]]), 5, 2).tolist() == [
        [0, 0, 1],
        [1, UNCOUNTED, UNCOUNTED],
    ]


def test_counts() -> None:
    experts = torch.tensor([[0, 2], [2, 1], [0, 1], [2, 0]])
    counts = expert_counts(experts, torch.tensor([1, 0, UNCOUNTED, 1]), 3, 4)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[0, 1, 1, 0], [2, 0, 2, 0], [0, 0, 0, 0]]
    assert not expert_counts(experts[:0], torch.tensor([], dtype=torch.int64), 3, 4).any()


def test_the_imbalance_is_one_if_all_experts_are_equally_used() -> None:
    experts = torch.tensor([[0, 1], [2, 3], [4, 5]])
    counts = expert_counts(experts, torch.zeros(3, dtype=torch.int64), 1, 6)
    even = torch.full((3, 6), 1 / 6, dtype=torch.float64)
    assert imbalance(even, torch.zeros(3, dtype=torch.int64), counts, 2).item() == pytest.approx(3)
    # All tokens choose the same two experts, with probability 1 / 2 each: E / K.
    experts = torch.tensor([[0, 1]] * 3)
    counts = expert_counts(experts, torch.zeros(3, dtype=torch.int64), 1, 6)
    sure = torch.zeros(3, 6).index_fill(1, torch.tensor([0, 1]), 0.5)
    assert imbalance(sure, torch.zeros(3, dtype=torch.int64), counts, 2).item() == 9


def test_the_imbalance_of_rows_is_the_dense_formula() -> None:
    """Each row counts as often as it has tokens; padding is in no row."""
    logits, experts, rows = laid_out()
    probabilities = logits.softmax(1)
    expected = sum(
        LENGTH * dense_imbalance(probabilities[rows == row], experts[rows == row])
        for row in range(ROWS)
    )
    counts = expert_counts(experts, rows, ROWS, EXPERTS)
    assert counts.sum() == ROWS * LENGTH * TOPK
    assert_near(imbalance(probabilities, rows, counts, TOPK), expected)


def test_rows_of_different_lengths() -> None:
    logits, experts = drawn(30)
    probabilities = logits.softmax(1)
    rows = torch.tensor([0] * 4 + [1] * 26)
    expected = 4 * dense_imbalance(probabilities[:4], experts[:4])
    expected += 26 * dense_imbalance(probabilities[4:], experts[4:])
    counts = expert_counts(experts, rows, 2, EXPERTS)
    assert_near(imbalance(probabilities, rows, counts, TOPK), expected)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("laid", [False, True])
def test_neither_layout_nor_ranks_change_the_terms(laid: bool, ranks: int) -> None:
    """Tokens are dealt out in turns; counts are summed over ranks, and so are their summands."""
    logits, experts, rows = laid_out()
    if not laid:  # a batch of rows without padding, in another order
        keep = torch.cat([(rows == row).nonzero()[:, 0] for row in (2, 0, 1)])
        logits, experts = logits[keep], experts[keep]
        rows = torch.arange(ROWS).repeat_interleave(LENGTH)
    parts = [(logits[r::ranks], experts[r::ranks], rows[r::ranks]) for r in range(ranks)]
    counts = sum(expert_counts(chosen, at, ROWS, EXPERTS) for _, chosen, at in parts)
    assert isinstance(counts, Tensor)
    uneven = sum(imbalance(numbers.softmax(1), at, counts, TOPK) for numbers, _, at in parts)
    size = sum(squared_logsumexp(numbers, at) for numbers, _, at in parts)
    logits, experts, rows = laid_out()
    whole = expert_counts(experts, rows, ROWS, EXPERTS)
    expected = imbalance(logits.softmax(1), rows, whole, TOPK)
    assert_near(uneven, expected)
    assert_near(size, squared_logsumexp(logits, rows))


def test_the_squared_logsumexp_is_the_dense_formula() -> None:
    logits, _, rows = laid_out()
    expected = sum(x.exp().sum().log() ** 2 for x in logits[: ROWS * LENGTH])
    assert_near(squared_logsumexp(logits, rows), expected)


def test_gradients() -> None:
    logits, experts, rows = laid_out()
    counts = expert_counts(experts, rows, ROWS, EXPERTS)

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        return imbalance(x.softmax(1), rows, counts, TOPK), squared_logsumexp(x, rows)

    torch.autograd.gradcheck(terms, logits.requires_grad_())
    for gradient in (torch.autograd.grad(term, logits)[0] for term in terms(logits)):
        assert gradient[: ROWS * LENGTH].any(1).all()
        assert not gradient[ROWS * LENGTH :].any()


def test_biases_move_towards_the_experts_with_fewer_tokens_than_the_mean() -> None:
    biases = torch.tensor([[0.5, 0.0, -0.5], [1.0, 1.0, 1.0]])
    counts = torch.tensor([[4, 1, 1], [2, 2, 2]])
    expected = torch.tensor([[0.375, 0.125, -0.375], [1.0, 1.0, 1.0]])
    assert torch.equal(moved_biases(biases, counts, 0.125), expected)


def test_biases_see_a_difference_of_one_token_among_very_many() -> None:
    """float32 cannot tell these counts from their mean."""
    counts = torch.tensor([2**40, 2**40 + 1, 2**40 - 1])
    assert moved_biases(torch.zeros(3), counts, 1.0).tolist() == [0.0, -1.0, 1.0]
