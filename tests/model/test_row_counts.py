"""Which tokens of a batch balance experts."""

from __future__ import annotations

import numpy as np
import torch

from cp_megatron.data.batch.batch import microbatches
from cp_megatron.data.read.corpus import CorpusRange
from cp_megatron.data.rows.best_fit import PackedRows
from cp_megatron.model.row_counts import TokenRows
from tests.data.ranges import EOD


def test_what_fills_packed_rows_does_not_count() -> None:
    part = CorpusRange(
        tokens=np.arange(29, dtype=np.int32),
        document_starts=np.array([0, 5, 8, 15, 22]),
        eod=EOD,
        vocab_size=EOD + 1,
    )
    rows = PackedRows(part, seq_length=8, seed=1)
    (batch,) = microbatches(
        rows,
        consumed=0,
        global_batch_size=4,
        micro_batch_size=4,
        dp_rank=0,
        dp_size=1,
        document_mask=True,
        padding=2,
    )
    filled = (batch.tokens[0, :32].view(4, 8) != EOD).sum(1)
    assert sorted(batch.tails) == [0, 1, 1, 1]
    assert (8 - filled).tolist() == list(batch.tails)
    counted = TokenRows.of(torch.arange(34), 1, 32, row_length=8, tails=batch.tails)
    assert torch.equal(counted.numbers >= 0, batch.tokens != EOD)
    assert counted.num_counted == 29
    # One line for each row; a shard of the positions.
    stacked = TokenRows.of(torch.tensor([0, 6, 7, 8]), 4, 8, tails=batch.tails)
    numbers = [[n, n, -1 if tail else n, -1] for n, tail in enumerate(batch.tails)]
    assert stacked.numbers.tolist() == numbers
