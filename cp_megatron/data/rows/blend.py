"""Mixes several datasets: the dataset that row i comes from is a pure function of i.

Row k of a dataset with the share w lies between the rows floor(k / w) and ceil((k + 1) / w) - 1 of
the blend. Of the datasets that may come next, the one with the earliest end of this range does::

    shares 1/2 1/3 1/6       A B A B A C | A B A B A C | ...

So the first n rows, for any n, hold n x w rows of each dataset, rounded down or up. This is fair
scheduling of unit jobs (Baruah et al., Proportionate progress, 1996), for which taking the earliest
deadline first suffices on one processor. Shares are whole numbers out of ``PERIOD`` or fewer rows,
after which the pattern repeats, so a table gives the dataset of every row.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cp_megatron.data.rows.sampler import RowSource, TokenRow

PERIOD = 1 << 16
"""The longest pattern, in rows; finer shares are rounded to 1 / PERIOD."""


@dataclass(frozen=True, kw_only=True)
class BlendPattern:
    """One period of a blend, P rows.

    Attributes:
        dataset: int64 [P], the dataset that each row comes from.
        rank: int64 [P], the number of rows of that dataset that come before it in the period.
        counts: the number of rows of each dataset in a period.
    """

    dataset: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    counts: tuple[int, ...]

    def find(self, number: int) -> tuple[int, int]:
        """Returns (dataset, row of the dataset) of row ``number`` of the blend."""
        period, place = divmod(number, len(self.dataset))
        dataset = int(self.dataset[place])
        return dataset, period * self.counts[dataset] + int(self.rank[place])


def make_pattern(weights: Sequence[Fraction]) -> BlendPattern:
    """Makes the pattern of datasets with these weights, all above zero."""
    counts = _whole(weights)
    period = sum(counts)
    released: list[tuple[int, int, int]] = [(0, d, 0) for d in range(len(counts))]
    ready: list[tuple[int, int, int]] = []
    dataset = np.empty(period, dtype=np.int64)
    rank = np.empty(period, dtype=np.int64)
    for place in range(period):
        while released and released[0][0] <= place:
            _, d, k = heapq.heappop(released)
            heapq.heappush(ready, (-(-(k + 1) * period // counts[d]), d, k))
        _, d, k = heapq.heappop(ready)
        dataset[place], rank[place] = d, k
        if k + 1 < counts[d]:
            heapq.heappush(released, ((k + 1) * period // counts[d], d, k + 1))
    return BlendPattern(dataset=dataset, rank=rank, counts=counts)


def _whole(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights, with a sum of about ``PERIOD`` at most."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    whole = [count // common for count in whole]
    total = sum(whole)
    if total <= PERIOD:
        return tuple(whole)
    return tuple(max(1, round(Fraction(count * PERIOD, total))) for count in whole)


class BlendedRows:
    """The rows of several datasets, each with epochs of its own; a ``RowSource``.

    Args:
        sources: the rows of each dataset, all of the same length.
        weights: the weight of each, above zero; None weighs each dataset by its rows per epoch.
    """

    def __init__(
        self, sources: Sequence[RowSource], weights: Sequence[Fraction] | None = None
    ) -> None:
        assert len({source.seq_length for source in sources}) == 1
        self.sources = tuple(sources)
        given = weights or [Fraction(source.rows_per_epoch) for source in sources]
        self.pattern = make_pattern(given)
        self.seq_length = sources[0].seq_length
        self.eod = sources[0].eod
        self.rows_per_epoch = sum(source.rows_per_epoch for source in sources)

    def __getitem__(self, number: int) -> TokenRow:
        if number < 0:
            raise IndexError(f"row {number}: a run's rows are numbered from 0")
        dataset, row = self.pattern.find(number)
        return self.sources[dataset][row]
