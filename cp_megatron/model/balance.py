"""How unequally experts are used, as terms of the loss, and the biases that need no loss.

The imbalance of a row with T tokens is (Fedus et al. 2021, arXiv:2101.03961, equation 4; by rows as
in DeepSeek-V3, arXiv:2412.19437, equations 17 to 20)::

    E / K  sum_e f_e P_e,    f_e = (tokens that chose e) / T,    P_e = (sum_t p_te) / T

which is 1 if all experts are equally used. A row counts T times, so that the sum over rows, divided
by the number of counted tokens, is their mean. A token counts whether it has a label or not; its
number is that of its row. Padding does not count, and has ``UNCOUNTED``.

Every rank holds some tokens of a row. The counts f must be those of the whole row, so they are
summed over ranks, as integers, before they are used here. The result is the summand of the tokens
given: over all tokens of a row, wherever they are, the summands add up to the row's imbalance.

Shapes: n tokens of this rank, E experts, K chosen experts of a token, R rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

UNCOUNTED = -1
"""The row of a token that does not count."""


def row_numbers(positions: Tensor, row_length: int, num_rows: int) -> Tensor:
    """The row of each token of rows that are laid end to end, followed by padding.

    Args:
        positions: int64, any shape: the tokens' indices in the whole sequence.
        row_length: tokens of a row.
        num_rows: rows of the sequence; what follows them is padding.

    Returns:
        int64, of the shape of ``positions``: from 0 to ``num_rows`` - 1, or ``UNCOUNTED``.
    """
    rows = positions // row_length
    return rows.masked_fill(rows >= num_rows, UNCOUNTED)


def expert_counts(experts: Tensor, rows: Tensor, num_rows: int, num_experts: int) -> Tensor:
    """How many of the counted tokens of each row chose each expert.

    Args:
        experts: int64 [n, K].
        rows: int64 [n].
        num_rows, num_experts: R and E.

    Returns:
        int64 [R, E]. A row sums to K times its tokens on this rank. The host does not wait for the
        device.
    """
    places = experts + rows[:, None] * num_experts
    # Tokens that do not count are all counted in one place after the last row.
    end = num_rows * num_experts
    places = places.masked_fill(rows[:, None] < 0, end).flatten()
    counts = torch.zeros(end + 1, dtype=torch.int64, device=experts.device)
    counts.scatter_add_(0, places, torch.ones_like(places))
    return counts[:end].view(num_rows, num_experts)


def imbalance(probabilities: Tensor, rows: Tensor, counts: Tensor, topk: int) -> Tensor:
    """This rank's summand of the imbalance of all rows, each times its number of tokens.

    Args:
        probabilities: [n, E], those of a token sum to 1; the gradient passes through them alone.
        rows: int64 [n].
        counts: int64 [R, E], ``expert_counts`` summed over all ranks that hold tokens of the rows.
        topk: K.

    Returns:
        A number of the type of ``probabilities``.
    """
    num_tokens = counts.sum(1, keepdim=True) // topk
    # The factor of p_te is T E / K (f_e / T), in which T cancels once.
    factors = counts.to(probabilities.dtype) / num_tokens.clamp(min=1)
    factors = factors * (counts.shape[1] / topk)
    # Tokens that do not count read a row of zeros, the last one.
    factors = F.pad(factors, (0, 0, 0, 1))
    return (probabilities * factors[rows]).sum()


def squared_logsumexp(logits: Tensor, rows: Tensor) -> Tensor:
    """The sum over the counted tokens of the squared log-sum-exp of their logits.

    It is the router's z-loss (Zoph et al. 2022, arXiv:2202.08906, equation 5) before the mean.

    Args:
        logits: [n, E].
        rows: int64 [n].
    """
    return logits.logsumexp(1).square().masked_fill(rows < 0, 0).sum()


def moved_biases(biases: Tensor, counts: Tensor, rate: float) -> Tensor:
    """The biases of experts after a step (Wang et al. 2024, arXiv:2408.15664, algorithm 1).

    An expert that got fewer tokens than the mean becomes more likely to be chosen. Both sides of
    the comparison are integers, so every rank and every grid moves alike.

    Args:
        biases: [.., E], what is added to the scores for the choice.
        counts: int64 [.., E], how many tokens of the whole step chose each expert.
        rate: how far a bias moves.
    """
    lacking = counts.sum(-1, keepdim=True) - counts.shape[-1] * counts
    return torch.add(biases, lacking.sign().to(biases.dtype), alpha=rate)
