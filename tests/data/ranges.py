"""Ranges of a corpus and sequences of a pair, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.read.indexed import IndexedDataset, optimal_dtype, write_indexed

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


def write_pair(prefix: str | Path, documents: Iterable[list[int]], vocab_size: int = 257) -> None:
    """Writes a pair, one sequence per document."""
    ids, tables = Path(f"{prefix}.ids"), list(documents)
    ids.parent.mkdir(parents=True, exist_ok=True)
    joined = [token for tokens in tables for token in tokens]
    ids.write_bytes(np.array(joined, dtype=optimal_dtype(vocab_size)).tobytes())
    lengths = np.array([len(tokens) for tokens in tables], dtype=np.int32)
    write_indexed(str(prefix), [(ids, lengths)], vocab_size=vocab_size)
    ids.unlink()
