"""Parts of a corpus for tests."""

from __future__ import annotations

import numpy as np

from cp_megatron.data.read.part import Part
from cp_megatron.data.read.sources import EOD, Tokens


def part_of(tokens: Tokens) -> Part:
    """The tokens as a part whose documents begin after each ``EOD``."""
    starts = np.concatenate([[0], np.flatnonzero(tokens == EOD) + 1])
    return Part(
        tokens=tokens,
        document_starts=starts[starts < len(tokens)].astype(np.int64),
        eod=EOD,
        vocab_size=1 << 16,
    )
