"""Sends tokens to the ranks of their experts, and adds up what these return.

Two ranks with two tokens each, four experts, of which rank 0 holds 0 and 1, and K = 2. Token a has
chosen experts 2 and 0, and so on; a row is a token for one of its experts::

    rank 0    tokens      a: 2 0     b: 3 1       rank 1    tokens      c: 0 1     d: 2 0
              by expert   a0 b1 | a2 b3                     by expert   c0 d0 c1 | d2
                             exchange rows: the part after the bar goes to rank 1
              arrived     a0 b1 | c0 d0 c1                  arrived     a2 b3 | d2
              by expert   a0 c0 d0   b1 c1                  by expert   a2 d2   b3
                             the experts compute, and multiply every row by its weight
              returned    a0 b1 | a2 b3                     returned    c0 d0 c1 | d2
              sums        a2 + a0    b3 + b1                sums        c0 + c1    d2 + d0

A token's results are added in the order of its choice, so the sum depends on no grid. There is no
capacity: all rows are sent, and no token is dropped. Every permutation is a gather in forward and
in backward, so that all results are deterministic.

Weights are sent with the rows and multiplied by the experts. So their gradients are computed where
the experts are, and nothing that is returned has to be kept: when a layer is recomputed, nobody
reads what would be returned, and it is not sent (``Dispatch.back`` saves no tensor).

Bytes that a rank sends with uniform routing, of n tokens with h channels of e bytes and weights of
w bytes: n K (h e + w) (1 - 1/R) in ``send`` and n K h e (1 - 1/R) in ``back``; backward sends the
same once more.

Shapes: n tokens of this rank, K chosen experts of a token, m rows that this rank's experts compute,
h channels, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.collectives import exchange_rows
from cp_megatron.comm.host_copies import to_device
from cp_megatron.expert_parallel.splits import Splits


class Dispatch:
    """Sends the tokens of one layer and one micro batch to their experts, and sums what returns.

    Args:
        experts: int64 [n, K], the chosen experts.
        splits: what ``count_rows`` says of this choice.
        group: the ranks that share the experts; None is one rank, which sends nothing.
    """

    def __init__(self, experts: Tensor, splits: Splits, group: ProcessGroup | None) -> None:
        self.splits, self.group = splits, group
        self._experts, self._topk = experts, experts.shape[1]
        self._orders: _Orders | None = None

    @property
    def experts(self) -> Tensor:
        """int64 [n, K], the chosen experts."""
        return self._experts.long()

    def shrink(self) -> None:
        """Keeps only the choice, from which the rest is computed again when it is needed.

        Autograd's functions hold this object, also those of a run that is going to be repeated.
        """
        self._experts, self._orders = self._experts.int(), None

    def send(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and their experts' weights -> the rows of this rank's experts, and their weights.

        Args:
            x: [n, h].
            weights: [n, K], in the order of ``experts``.

        Returns:
            [m, h] and [m], sorted by expert; ``splits.counts`` says how many rows each has.
        """
        factors = _linear(weights.flatten(), self._by_expert, self._by_choice)
        return self._exchanged(_linear(x, self._repeated, self._summed)), self._exchanged(factors)

    def back(self, rows: Tensor) -> Tensor:
        """[m, h], what the experts computed, in the order of ``send`` -> its sums, [n, h]."""
        if self._is_shared:
            rows = _linear(rows, self._by_rank, self._by_own_expert)
        rows = exchange_rows(rows, self.splits.from_ranks, self.splits.sent, self.group)
        return _linear(rows, self._summed, self._repeated)

    def _exchanged(self, rows: Tensor) -> Tensor:
        """Rows of this rank's tokens by expert -> rows of this rank's experts by expert."""
        rows = exchange_rows(rows, self.splits.sent, self.splits.from_ranks, self.group)
        return _linear(rows, self._by_own_expert, self._by_rank) if self._is_shared else rows

    @property
    def _is_shared(self) -> bool:
        return self.group is not None and self.group.size() > 1

    # The permutations, each beside its inverse. Autograd holds them as methods, not as tensors.

    def _by_expert(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._permutations.order)

    def _by_choice(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._permutations.inverse)

    def _repeated(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._permutations.order // self._topk)  # [n, h] -> [n * K, h]

    def _summed(self, rows: Tensor) -> Tensor:
        # [n * K, h] by expert -> [n, h]. Rows are read where they are, and added up one by one.
        return F.embedding_bag(self._permutations.inverse.view(-1, self._topk), rows, mode="sum")

    def _by_own_expert(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._permutations.own_order)

    def _by_rank(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._permutations.own_inverse)

    @property
    def _permutations(self) -> _Orders:
        if self._orders is None:
            order = self._experts.flatten().argsort(stable=True)  # by expert, then by token
            own = _order_of_arrived(self.splits, order.device) if self._is_shared else order[:0]
            self._orders = _Orders(order, _inverse(order), own, _inverse(own))
        return self._orders


class _Orders(NamedTuple):
    """Permutations, int64.

    Attributes:
        order: [n * K], the choices of this rank's tokens by expert.
        inverse: the inverse of ``order``.
        own_order: [m], the rows that arrived by expert; empty on one rank.
        own_inverse: the inverse of ``own_order``.
    """

    order: Tensor
    inverse: Tensor
    own_order: Tensor
    own_inverse: Tensor


def _order_of_arrived(splits: Splits, device: torch.device) -> Tensor:
    """int64 [m]: by expert, then by rank, the rows that arrived by rank, then by expert."""
    received = to_device(torch.tensor(splits.received).flatten(), device)
    experts = torch.arange(len(splits.received[0]), device=device).repeat(len(splits.received))
    found = experts.repeat_interleave(received, output_size=sum(splits.counts))
    return found.argsort(stable=True)


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _linear(
    x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
) -> Tensor:
    result: Tensor = _LinearMap.apply(x, forward, backward)
    return result


class _LinearMap(torch.autograd.Function):
    """A linear function and its transpose; saves no tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.transpose = backward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transpose(grads[0]), None, None
