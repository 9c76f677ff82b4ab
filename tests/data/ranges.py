"""Ranges of a corpus and sequences of a pair, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.read.indexed import IndexedDataset

EOD = 256


def range_of(tokens: npt.NDArray[np.integer]) -> CorpusRange:
    """The tokens as a range in which a document begins after each ``EOD``."""
    starts = np.concatenate([[0], np.flatnonzero(tokens == EOD) + 1])
    return CorpusRange(
        tokens=tokens,
        document_starts=starts[starts < len(tokens)].astype(np.int64),
        name="test",
        eod=EOD,
        vocab_size=1 << 16,
    )


def sequence_of(pair: IndexedDataset, number: int) -> npt.NDArray[Any]:
    """The ids of one sequence of a pair."""
    start = int(pair.starts[number])
    return pair.tokens[start : start + int(pair.lengths[number])]
