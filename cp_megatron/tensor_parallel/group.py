"""The tp group of a model, and how activations enter and leave tensor parallel layers.

Shapes: b batch, s sequence of one context parallel rank, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.collectives import (
    Wait,
    all_gather_dim,
    copy_to_group,
    reduce_from_group,
    reduce_scatter_dim,
    start_scatter_sum,
    start_sum_,
)


@dataclass(frozen=True, kw_only=True)
class TensorParallel:
    """The tp group and whether the residual stream is split over it.

    Without sequence parallelism the residual stream [b, s, h] is replicated over tp; with it each
    rank holds [b, s/tp, h] (Korthikanti et al. 2022, arXiv:2205.05198).
    """

    group: ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def size(self) -> int:
        """Number of tp ranks."""
        return 1 if self.group is None else self.group.size()

    @property
    def rank(self) -> int:
        """This rank's index in the group."""
        return 0 if self.group is None else self.group.rank()

    @property
    def splits_sequence(self) -> bool:
        """Whether the residual stream differs over the tp ranks."""
        return self.sequence_parallel and self.size > 1

    def enter(self, x: Tensor) -> Tensor:
        """Residual stream -> [b, s, h], the input of one or more column parallel layers."""
        if self.sequence_parallel:
            return all_gather_dim(x, 1, self.group)
        return copy_to_group(x, self.group)

    def leave(
        self, x: Tensor, bias: Tensor | None = None, *, gradient_only: bool = False
    ) -> Tensor:
        """The output of a row parallel layer -> residual stream.

        Args:
            x: [b, s, h], one summand per rank.
            bias: [h], added once, to the sum.
            gradient_only: the values of the result are never read, only gradients pass through it.
                No message is sent in forward, and the values are arbitrary.
        """
        if gradient_only:
            total: Tensor = _LeaveGradientOnly.apply(x, self)
        elif self.sequence_parallel:
            total = reduce_scatter_dim(x, 1, self.group)
        else:
            total = reduce_from_group(x, self.group)
        return total if bias is None else total + bias

    def start_leaving(self, x: Tensor) -> Wait:
        """Starts the backward of ``enter``: a summand [b, s, h] per rank -> residual stream.

        The memory of ``x``, which is contiguous, may become that of the result.
        """
        if self.sequence_parallel:
            return start_scatter_sum(x, 1, self.group)
        return start_sum_(x, self.group)

    def rows(self, num_tokens: int, batch: int) -> int:
        """Rows of the residual stream that ``enter`` turns into about ``num_tokens`` tokens, in
        all ``batch`` rows together; at least 1."""
        return max(1, num_tokens // (batch * (self.size if self.splits_sequence else 1)))

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's part along dim 0, of length s, of a tensor that meets the residual stream."""
        return x.chunk(self.size)[self.rank] if self.splits_sequence else x


class _LeaveGradientOnly(torch.autograd.Function):
    """Forward: uninitialized memory. Backward: the backward of ``TensorParallel.leave``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        rows = x.shape[1] // (tp.size if tp.splits_sequence else 1)
        return x.new_empty((x.shape[0], rows, x.shape[2]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        tp: TensorParallel = ctx.tp
        return all_gather_dim(grads[0], 1, tp.group) if tp.splits_sequence else grads[0], None
