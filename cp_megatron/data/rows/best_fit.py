"""Packs whole documents into rows by best fit decreasing.

Documents longer than a row are first cut into pieces of a row. Then each piece, the longest first,
goes into the fullest row that still has space for it, or into a new row if none has::

    seq_length 10, documents of 23, 7, 4, 3, 2
    cut to pieces                   10 10 7 4 3 3 2
    row 0                           aaaaaaaaaa
    row 1                           aaaaaaaaaa
    row 2  7, then the first 3      aaabbbbbbb      in the order of the data
    row 3  4, then 3 and 2          ccccdddee.      . has no label

Best fit decreasing is due to Johnson (Near-optimal bin packing algorithms, 1973). Rows with the
same space left are interchangeable, and so are pieces of the same length, so one iteration places
many pieces of a length into many rows of a space: a million documents take a second or two.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.rows.sampler import IGNORED, EpochOrder, TokenRow, permutation

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The pieces of each row.

    Attributes:
        starts: int64 [p], where each piece begins in the data, grouped by row.
        lengths: int64 [p], the tokens of each piece.
        bounds: int64 [rows + 1]; row r has the pieces bounds[r] to bounds[r + 1].
        seq_length: tokens per row.
    """

    starts: Ints
    lengths: Ints
    bounds: Ints
    seq_length: int

    @property
    def num_rows(self) -> int:
        return len(self.bounds) - 1

    @property
    def waste(self) -> float:
        """The share of the rows' tokens that is padding."""
        size = self.num_rows * self.seq_length
        return 1.0 - float(self.lengths.sum()) / size if size else 0.0


def pack(document_starts: Ints, num_tokens: int, *, seq_length: int, seed: int) -> Packing:
    """Packs documents; a pure function of its arguments.

    Args:
        document_starts: int64 [d], increasing; the first is 0.
        num_tokens: the end of the last document.
        seq_length: tokens per row.
        seed: decides which of several pieces of the same length goes where.
    """
    starts, lengths = _pieces(document_starts, num_tokens, seq_length)
    shuffled = permutation(len(starts), seed=seed, epoch=0)
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows = np.empty(len(order), dtype=np.int64)
    rows[order] = _best_fit(lengths[order], seq_length)
    grouped = np.argsort(rows, kind="stable")
    starts, lengths = starts[grouped], lengths[grouped]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rows))]).astype(np.int64)
    return Packing(starts=starts, lengths=lengths, bounds=bounds, seq_length=seq_length)


def _pieces(document_starts: Ints, num_tokens: int, seq_length: int) -> tuple[Ints, Ints]:
    """Starts and lengths of the documents; those longer than a row are cut."""
    documents = np.diff(document_starts, append=num_tokens)
    kept = documents > 0
    begins, documents = document_starts[kept], documents[kept]
    counts = -(-documents // seq_length)
    first = np.cumsum(counts) - counts
    inside = np.arange(counts.sum()) - np.repeat(first, counts)
    starts = np.repeat(begins, counts) + inside * seq_length
    ends = np.repeat(begins + documents, counts)
    return starts, np.minimum(ends - starts, seq_length)


def _best_fit(lengths: Ints, seq_length: int) -> Ints:
    """The row of each piece; lengths int64 [p] never increase and are at most ``seq_length``."""
    rows = np.empty(len(lengths), dtype=np.int64)
    bounds = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1)).tolist()
    open_rows: dict[int, list[Ints]] = {}  # space left -> the rows that have it
    spaces: list[int] = []  # the keys, sorted
    num_rows = 0
    for begin, end in pairwise(bounds):
        length, place = int(lengths[begin]), begin
        while place < end:
            at = bisect_left(spaces, length)
            space = spaces.pop(at) if at < len(spaces) else seq_length
            each = space // length
            needed = -(-(end - place) // each)
            if space in open_rows:
                groups = open_rows.pop(space)
                chosen = groups[0] if len(groups) == 1 else np.concatenate(groups)
            else:
                chosen = np.arange(num_rows, num_rows + needed)
                num_rows += needed
            chosen, rest = chosen[:needed], chosen[needed:]
            taken = min(end, place + each * len(chosen))
            rows[place:taken] = np.repeat(chosen, each)[: taken - place]
            last = taken - place - each * (len(chosen) - 1)
            left = ((rest, space), (chosen[:-1], space - each * length))
            for group, its_space in (*left, (chosen[-1:], space - last * length)):
                if len(group) and its_space:
                    if its_space not in open_rows:
                        insort(spaces, its_space)
                    open_rows.setdefault(its_space, []).append(group)
            place = taken
    return rows


class PackedRows:
    """The rows of packed documents; a ``RowSource``.

    The last token of a document has no label, unless the document was cut there. A document of
    ``eod`` without labels fills the space that is left in a row.

    Args:
        tokens: the range; its first document begins with it.
        seq_length, seed, shuffle: as for ``ConcatenatedRows``; the seed decides the packing, too.
    """

    def __init__(
        self, tokens: CorpusRange, *, seq_length: int, seed: int, shuffle: bool = True
    ) -> None:
        starts, end = tokens.document_starts, len(tokens.tokens)
        self.packing = pack(starts, end, seq_length=seq_length, seed=seed)
        self.seq_length = seq_length
        self.rows_per_epoch = self.packing.num_rows
        self.eod = tokens.eod
        self._range = tokens
        self._order = EpochOrder(self.rows_per_epoch, seed=seed, shuffle=shuffle)

    def __getitem__(self, number: int) -> TokenRow:
        row, packing, data = self._order[number], self.packing, self._range
        inputs = np.full(self.seq_length, self.eod, dtype=np.int64)
        labels = np.full(self.seq_length, IGNORED, dtype=np.int64)
        pieces = slice(*packing.bounds[row : row + 2].tolist())
        lengths: list[int] = packing.lengths[pieces].tolist()
        place = 0
        for start, length in zip(packing.starts[pieces].tolist(), lengths):
            stop = start + length
            cut = stop < len(data.tokens) and not len(data.starts_within(stop, stop + 1))
            tokens = data.read(start, stop + cut)
            inputs[place : place + length] = tokens[:length]
            targets = tokens[1:]
            if data.loss is not None:
                targets = np.where(data.loss[start + 1 : stop + cut], targets, IGNORED)
            labels[place : place + len(targets)] = targets
            place += length
        tail = self.seq_length - place
        if tail:
            lengths.append(tail)
        none, whole = np.empty(0, dtype=np.int64), tuple(lengths)
        return TokenRow(
            inputs=inputs, labels=labels, document_lengths=whole, crossing=none, tail=tail
        )
