"""Several datasets as one: which of them row i comes from is a pure function of i. No torch.

Dataset d with share w is given its row k somewhere in the window of rows floor(k / w) to
ceil((k + 1) / w) - 1, the one with the earliest end first::

    shares 1/2 1/3 1/6       A B A B A C | A B A B A C | ...

So among the first n rows, for any n, dataset d has n x w rows, rounded down or up. This is fair
scheduling of unit jobs (Baruah et al., Proportionate progress, 1996), for which the earliest
deadline first is enough on one processor. Shares are whole numbers of ``PERIOD`` or fewer rows,
after which the pattern repeats: a table answers for every i.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from cp_megatron.data.rows.sampler import Row, RowSource

PERIOD = 1 << 16
"""The most rows after which the pattern repeats; finer shares are rounded to 1 / PERIOD."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """One period of a blend.

    Attributes:
        dataset: int64 [P], which dataset a row comes from.
        rank: int64 [P], how many rows of that dataset come before it.
        counts: rows of each dataset in a period.
    """

    dataset: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    counts: tuple[int, ...]

    def find(self, number: int) -> tuple[int, int]:
        """(dataset, its row) that row ``number`` of the blend is."""
        period, place = divmod(number, len(self.dataset))
        dataset = int(self.dataset[place])
        return dataset, period * self.counts[dataset] + int(self.rank[place])


def make_pattern(weights: Sequence[Fraction]) -> Pattern:
    """The pattern of datasets with these weights, all above zero."""
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
    return Pattern(dataset=dataset, rank=rank, counts=counts)


def _whole(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Whole numbers in the proportion of the weights, their sum at most ``PERIOD`` or so."""
    scale = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * scale) for weight in weights]
    common = math.gcd(*whole)
    whole = [count // common for count in whole]
    total = sum(whole)
    if total <= PERIOD:
        return tuple(whole)
    return tuple(max(1, round(Fraction(count * PERIOD, total))) for count in whole)


class BlendedRows:
    """The endless sequence of rows of several datasets, each with epochs of its own.

    Args:
        sources: the rows of each dataset, all of one length.
        weights: of each, above zero; None gives every row of all the same chance.
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

    def __getitem__(self, number: int) -> Row:
        """Row ``number`` of the run.

        Raises:
            IndexError: the number is negative.
            ConfigError: the row holds an id that is no token.
        """
        if number < 0:
            raise IndexError(f"row {number}: a run's rows are numbered from 0")
        dataset, row = self.pattern.find(number)
        return self.sources[dataset][row]
