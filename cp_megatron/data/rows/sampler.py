"""The tokens of row number i of the run: a pure function of (seed, i, seq_length, corpus).

Shapes: S = seq_length. A row is S + 1 consecutive tokens of a range of the corpus. Row r of a range
starts at r * S. Except for the first token and an incomplete row at the end, every token is a label
once per epoch. ``best_fit`` makes rows of whole documents, ``blend`` rows of several corpora.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.errors import ConfigError

IGNORED = -100
"""The label of a token that has no loss."""
SPLIT_WORKS = "969,30,1"


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One sequence.

    Attributes:
        inputs: int64 [S].
        labels: int64 [S], the token after each input; ``IGNORED`` if none is to be predicted.
        document_lengths: the lengths of the documents in ``inputs``, with the sum S. The row may
            cut the first and the last document.
        crossing: int64 [k], the places in ``inputs`` whose label belongs to the next document. They
            have no label if documents are masked.
        tail: the tokens at the end of ``inputs`` that are no data; its last document.
    """

    inputs: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    document_lengths: tuple[int, ...]
    crossing: npt.NDArray[np.int64]
    tail: int = 0


class RowSource(Protocol):
    """An endless sequence of rows: ``rows[i]`` for any i >= 0, in any order, from any thread.

    Attributes:
        seq_length: tokens per row.
        rows_per_epoch: rows in one pass over the data. Except for the first token and an incomplete
            row at the end, every token is a label once per epoch.
        eod: the token that pads.
    """

    seq_length: int
    rows_per_epoch: int
    eod: int

    def __getitem__(self, number: int) -> TokenRow:
        """Row ``number`` of the run.

        Raises:
            IndexError: the number is negative.
            ConfigError: the row holds an id that is not in the vocabulary.
        """


class ConcatenatedRows:
    """The rows of a range whose documents lie one after the other; a ``RowSource``.

    Args:
        tokens: the range; it needs more than ``seq_length`` tokens.
        seq_length: tokens per row.
        seed: the seed of the order, any int >= 0.
        shuffle: False gives the rows in order in every epoch (validation).
    """

    def __init__(
        self, tokens: CorpusRange, *, seq_length: int, seed: int, shuffle: bool = True
    ) -> None:
        assert len(tokens.tokens) > seq_length > 0, (len(tokens.tokens), seq_length)
        self.seq_length = seq_length
        self.rows_per_epoch = count_rows(len(tokens.tokens), seq_length)
        self.eod = tokens.eod
        self._range = tokens
        self._order = EpochOrder(self.rows_per_epoch, seed=seed, shuffle=shuffle)

    def __getitem__(self, number: int) -> TokenRow:
        start = self._order[number] * self.seq_length
        tokens = self._range.read(start, start + self.seq_length + 1)
        ends = self._range.starts_within(start + 1, start + self.seq_length + 1) - start
        bounds = np.unique(np.append(ends, self.seq_length))
        return TokenRow(
            inputs=tokens[:-1],
            labels=tokens[1:],
            document_lengths=tuple(np.diff(bounds, prepend=0).tolist()),
            crossing=ends - 1,
        )


class EpochOrder:
    """Maps the number of a row in the run to its number in the data.

    Every epoch is a permutation of its own, which the Philox counter generator draws from
    (seed, epoch). Only the raw output of the generator is used, which numpy keeps stable between
    versions.

    Args:
        count: rows per epoch.
        seed: the seed of the order.
        shuffle: False gives the rows in order in every epoch.
    """

    def __init__(self, count: int, *, seed: int, shuffle: bool) -> None:
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getitem__(self, number: int) -> int:
        if number < 0:
            raise IndexError(f"row {number}: a run's rows are numbered from 0")
        epoch, place = divmod(number, self._count)
        if not self._shuffle:
            return place
        # The pair is assigned at once, so that another thread sees the old epoch or the new one.
        cached = self._cached
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(self._count, seed=self._seed, epoch=epoch))
            self._cached = cached
        return int(cached[1][place])


@dataclass(frozen=True, kw_only=True)
class RowSplits:
    """The rows of each part; None if a part has weight 0 or is shorter than one row."""

    train: RowSource
    valid: RowSource | None
    test: RowSource | None


def count_rows(num_tokens: int, seq_length: int) -> int:
    """The number of rows in ``num_tokens`` consecutive tokens; neighbours share one token."""
    return max(0, (num_tokens - 1) // seq_length)


def permutation(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch, int64 [count]: the same on every machine."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)


def parse_split(split: str) -> tuple[float, float, float]:
    """Returns the weights of training, validation and test; missing ones at the end are 0.

    Raises:
        ConfigError: there are not one to three numbers, one is negative, or the first is 0.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        weights = []
    if not (1 <= len(weights) <= 3 and all(0 <= w < math.inf for w in weights) and weights[0]):
        rule = "must be up to three weights, not negative, the first above zero"
        raise ConfigError("--split", split, rule, SPLIT_WORKS)
    train, valid, test = weights + [0.0] * (3 - len(weights))
    return train, valid, test


def split_sizes(
    num_tokens: int, *, weights: tuple[float, float, float], seq_length: int
) -> tuple[int, int, int]:
    """Sizes of the training, validation and test parts in tokens, consecutive in this order.

    The parts are ranges of tokens rather than of documents, so that a corpus of one document can be
    split. A held-out part with a weight gets at least one row, as long as training keeps half of
    the data.
    """
    total = sum(weights)
    shares = [int(num_tokens * (weight / total)) for weight in weights[1:]]
    left = num_tokens // 2
    sizes = []
    for weight, share in zip(weights[1:], shares):
        wanted = max(share, seq_length + 1) if weight > 0 else 0
        size = wanted if wanted == share or wanted <= left else share
        left -= size
        sizes.append(size)
    return num_tokens - sum(sizes), sizes[0], sizes[1]
