"""Which tokens are row number i of the run: a pure function of (seed, i, seq_length, corpus).

Shapes: S = seq_length. A row is S + 1 consecutive tokens of a part of the corpus; row r of a part
starts at r * S, so every token but the part's first is a label exactly once per epoch. Rows of
whole documents are those of ``best_fit``, rows of several corpora those of ``blend``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.part import Part
from cp_megatron.data.read.sources import Corpus
from cp_megatron.errors import ConfigError

IGNORED = -100
"""The label of a token that has no loss."""

SPLIT_RULE = "must be three weights, not negative, the first above zero"
SPLIT_WORKS = "969,30,1"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence.

    Attributes:
        inputs: int64 [S].
        labels: int64 [S], the token after each input; ``IGNORED`` where none is to be predicted.
        document_lengths: lengths of the pieces of documents in ``inputs``, their sum is S. The
            first and the last may be cut by the row.
        crossing: int64 [k], the places in ``inputs`` whose label belongs to the next document; it
            is no label where documents are masked.
    """

    inputs: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    document_lengths: tuple[int, ...]
    crossing: npt.NDArray[np.int64]


class RowSource(Protocol):
    """An endless sequence of rows: ``rows[i]`` for any i >= 0, in any order, from any thread.

    Attributes:
        seq_length: tokens per row.
        rows_per_epoch: rows until every token was read once.
        eod: the token that pads.
    """

    @property
    def seq_length(self) -> int: ...

    @property
    def rows_per_epoch(self) -> int: ...

    @property
    def eod(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...


class Rows:
    """The endless sequence of rows of one part: ``rows[i]`` for any i >= 0, in any order.

    Every epoch is a permutation of the part's rows drawn by the Philox counter generator keyed on
    (seed, epoch). Only its raw output is used, which numpy keeps stable between versions.

    Args:
        part: the tokens; needs more than ``seq_length``.
        seq_length: tokens per row.
        seed: of the order; any int >= 0.
        shuffle: False walks the rows in order, every epoch alike (validation).
    """

    def __init__(self, part: Part, *, seq_length: int, seed: int, shuffle: bool = True) -> None:
        assert len(part.tokens) > seq_length > 0, (len(part.tokens), seq_length)
        self.seq_length = seq_length
        self.rows_per_epoch = count_rows(len(part.tokens), seq_length)
        self.eod = part.eod
        self._part = part
        self._order = EpochOrder(self.rows_per_epoch, seed=seed, shuffle=shuffle)

    def __getitem__(self, number: int) -> Row:
        """Row ``number`` of the run.

        Raises:
            IndexError: the number is negative.
            ConfigError: the row holds an id that is no token.
        """
        start = self._order[number] * self.seq_length
        tokens = self._part.read(start, start + self.seq_length + 1)
        ends = self._part.starts_within(start + 1, start + self.seq_length + 1) - start
        bounds = np.unique(np.append(ends, self.seq_length))
        return Row(
            inputs=tokens[:-1],
            labels=tokens[1:],
            document_lengths=tuple(np.diff(bounds, prepend=0).tolist()),
            crossing=ends - 1,
        )


class EpochOrder:
    """Row number of the run -> row of the part: every epoch is a permutation of its own.

    Args:
        count: rows of an epoch.
        seed: of the order.
        shuffle: False is the identity in every epoch.
    """

    def __init__(self, count: int, *, seed: int, shuffle: bool) -> None:
        self._count, self._seed, self._shuffle = count, seed, shuffle
        self._cached: tuple[int, npt.NDArray[np.int64]] | None = None

    def __getitem__(self, number: int) -> int:
        """The row of the part.

        Raises:
            IndexError: the number is negative.
        """
        if number < 0:
            raise IndexError(f"row {number}: a run's rows are numbered from 0")
        epoch, place = divmod(number, self._count)
        if not self._shuffle:
            return place
        # One assignment of a pair, so that another thread sees the old epoch or the new one.
        cached = self._cached
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(self._count, seed=self._seed, epoch=epoch))
            self._cached = cached
        return int(cached[1][place])


@dataclass(frozen=True, kw_only=True)
class RowSplits:
    """The parts of a corpus; None where a part has weight 0 or is shorter than one row."""

    train: RowSource
    valid: RowSource | None
    test: RowSource | None


def count_rows(num_tokens: int, seq_length: int) -> int:
    """Rows in that many consecutive tokens (neighbours share one token)."""
    return max(0, (num_tokens - 1) // seq_length)


def permutation(count: int, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of an epoch: int64 [count], a pure function of its arguments on every machine."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    draws = np.random.Philox(key=key).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)


def parse_split(split: str) -> tuple[float, float, float]:
    """The weights of training, validation and test; missing ones at the end are 0.

    Raises:
        ConfigError: not one to three numbers, a negative one, or nothing to train on.
    """
    try:
        weights = [float(part) for part in split.split(",")]
    except ValueError:
        raise ConfigError("--split", split, SPLIT_RULE, SPLIT_WORKS) from None
    if not 1 <= len(weights) <= 3 or not all(math.isfinite(w) and w >= 0 for w in weights):
        raise ConfigError("--split", split, SPLIT_RULE, SPLIT_WORKS)
    train, valid, test = weights + [0.0] * (3 - len(weights))
    if train == 0:
        raise ConfigError("--split", split, SPLIT_RULE, SPLIT_WORKS)
    return train, valid, test


def split_sizes(
    num_tokens: int, *, weights: tuple[float, float, float], seq_length: int
) -> tuple[int, int, int]:
    """Tokens of the training, validation and test parts, consecutive ranges in this order.

    Ranges of tokens rather than documents, so that a corpus of one document can be split. A
    held-out part with a weight gets at least one row as long as training keeps half of the data.
    """
    total = sum(weights)
    shares = [int(num_tokens * (weight / total)) for weight in weights[1:]]
    room = num_tokens // 2
    sizes = []
    for weight, share in zip(weights[1:], shares):
        wanted = max(share, seq_length + 1) if weight > 0 else 0
        size = wanted if wanted == share or wanted <= room else share
        room -= size
        sizes.append(size)
    return num_tokens - sum(sizes), sizes[0], sizes[1]


def split_rows(corpus: Corpus, *, split: str, seq_length: int, seed: int) -> RowSplits:
    """Cuts a corpus into rows to train, validate and test on; no token is in two parts.

    Args:
        corpus: the documents.
        split: weights as in ``--split``.
        seq_length: tokens per row.
        seed: of the order of the training rows; the other parts are read in order.

    Raises:
        ConfigError: the weights are malformed, or the training part is shorter than one row.
    """
    weights = parse_split(split)
    sizes = split_sizes(len(corpus.tokens), weights=weights, seq_length=seq_length)
    if sizes[0] <= seq_length:
        rule = f"a row needs {seq_length + 1} tokens, the training part of the data has {sizes[0]}"
        works = f"--seq-length up to {sizes[0] - 1}, or more data" if sizes[0] > 1 else "more data"
        raise ConfigError("--seq-length", seq_length, rule, works)
    cuts = [0, *np.cumsum(sizes).tolist()]
    train, valid, test = (corpus.part(*cut) for cut in pairwise(cuts))
    return RowSplits(
        train=Rows(train, seq_length=seq_length, seed=seed),
        valid=held_out(valid, seq_length),
        test=held_out(test, seq_length),
    )


def held_out(part: Part, seq_length: int) -> Rows | None:
    """The part's rows in order; None where it is shorter than one."""
    if count_rows(len(part.tokens), seq_length) == 0:
        return None
    return Rows(part, seq_length=seq_length, seed=0, shuffle=False)
