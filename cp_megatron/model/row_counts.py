"""Which row of a micro batch a token belongs to, and how many tokens of each row chose an expert.

Shapes: b batch, s sequence of one context parallel rank, n tokens of this rank, R rows of the micro
batch, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.model.balance import UNCOUNTED, row_numbers


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of tokens.

    Attributes:
        numbers: int64 [b, s], or [n] for the tokens of a residual stream: the row of each token,
            from 0 to R - 1, or ``UNCOUNTED`` for padding.
        num_rows: R.
    """

    numbers: Tensor
    num_rows: int

    @classmethod
    def of(
        cls,
        positions: Tensor,
        lines: int,
        length: int,
        *,
        row_length: int = 0,
        tails: Sequence[int] = (),
    ) -> TokenRows:
        """The rows of the tokens at the same positions of every line of a batch.

        Args:
            positions: int64 [s].
            lines: b.
            length: tokens of a line without its padding, which follows them.
            row_length: tokens of a row, if rows are laid end to end in a line; 0: a line is a row.
            tails: the tokens at the end of each of the R rows that do not count; empty: none.
        """
        row_length = row_length or length
        per_line = length // row_length
        numbers = row_numbers(positions, row_length, per_line)
        firsts = per_line * torch.arange(lines)[:, None]
        numbers = torch.where(numbers < 0, numbers, numbers + firsts)  # [s] -> [b, s]
        if any(tails):
            ends = row_length - torch.tensor(tails)  # [R]
            past = positions % row_length >= ends[numbers.clamp(min=0)]  # [b, s]
            numbers = numbers.masked_fill(past, UNCOUNTED)
        return cls(numbers=numbers, num_rows=lines * per_line)

    @property
    def num_counted(self) -> int:
        """The tokens that are not padding."""
        return int((self.numbers >= 0).sum())

    def joined(self) -> TokenRows:
        """All rows as one."""
        return TokenRows(numbers=self.numbers.clamp(max=0), num_rows=1)


class RowCounts:
    """How many tokens of each row chose each expert.

    Args:
        numbers: int64 [n], the row of each of this rank's tokens.
        counts: int64 [R, E], those of this rank, which are summed in place; None: nobody asks.
        group: the ranks that share the rows; None is one rank.
    """

    def __init__(self, numbers: Tensor, counts: Tensor | None, group: ProcessGroup | None) -> None:
        self.numbers = numbers
        self._counts, self._work = counts, None
        if counts is not None and group is not None and group.size() > 1:
            self._work = dist.all_reduce(counts, group=group, async_op=True)

    def whole(self) -> Tensor:
        """int64 [R, E], those of whole rows."""
        assert self._counts is not None
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._counts
