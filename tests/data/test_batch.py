"""Batches: no grid changes the tokens, labels are shifted, documents are masked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cp_megatron.data.batch.batch import IGNORED, Batch, microbatches
from cp_megatron.data.rows.sampler import ConcatenatedRows
from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask
from tests.data.ranges import EOD, range_of

S = 8


def valid_tokens(batch: Batch) -> int:
    """The number of tokens that have a loss."""
    return int((batch.labels != IGNORED).sum())


def make_rows() -> ConcatenatedRows:
    tokens = np.random.default_rng(0).integers(0, 256, 1001).astype(np.uint16)
    tokens[::13] = EOD
    return ConcatenatedRows(range_of(tokens), seq_length=S, seed=1)


def read(
    rows: ConcatenatedRows, *, step: int, micro: int, dp: int, document_mask: bool, total: int = 8
) -> list[Batch]:
    """The batches of all ranks, in rank order."""
    return [
        batch
        for rank in range(dp)
        for batch in microbatches(
            rows,
            consumed=step * total,
            global_batch_size=total,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp,
            document_mask=document_mask,
        )
    ]


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("dp", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_no_grid_changes_the_stream(micro: int, dp: int, document_mask: bool) -> None:
    rows = make_rows()
    for step in (0, 1, 40):
        expected = torch.from_numpy(
            np.stack([rows[8 * step + i].inputs for i in range(8)]).astype(np.int64)
        )
        batches = read(rows, step=step, micro=micro, dp=dp, document_mask=document_mask)
        assert len(batches) == 8 // micro
        seen = torch.cat([batch.tokens.reshape(-1, S) for batch in batches])
        assert torch.equal(seen, expected)


def test_without_document_mask_rows_are_stacked() -> None:
    rows = make_rows()
    batch = read(rows, step=0, micro=2, dp=1, document_mask=False)[0]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.shape == (2, S)
    assert torch.equal(batch.labels[1], torch.from_numpy(rows[1].labels.astype(np.int64)))
    assert batch.mask == Mask.causal(S)
    assert valid_tokens(batch) == 2 * S


def test_with_document_mask_rows_are_laid_end_to_end() -> None:
    rows = make_rows()
    batches = read(rows, step=0, micro=2, dp=1, document_mask=True)
    assert any((batch.tokens == EOD).any() for batch in batches)
    for number, batch in enumerate(batches):
        first, second = rows[2 * number], rows[2 * number + 1]
        assert batch.tokens.shape == batch.labels.shape == (1, 2 * S)
        assert batch.mask.lengths == first.document_lengths + second.document_lengths
        # A row's first token never sees the row before it, whatever documents they hold.
        assert not batch.mask.dense()[S, :S].any()
        ends = batch.tokens == EOD
        plain = torch.from_numpy(np.concatenate([first.labels, second.labels]).astype(np.int64))
        assert torch.equal(batch.labels[~ends], plain[~ends[0]])
        assert (batch.labels[ends] == IGNORED).all()
        assert valid_tokens(batch) == 2 * S - int(ends.sum())


@pytest.mark.parametrize("document_mask", [False, True])
def test_padding_is_a_document_of_its_own_without_a_label(document_mask: bool) -> None:
    rows, window = make_rows(), (4, 0)
    options = {"consumed": 0, "global_batch_size": 2, "micro_batch_size": 2, "dp_rank": 0}
    options |= {"dp_size": 1, "document_mask": document_mask}
    (plain,) = microbatches(rows, **options)
    (padded,) = microbatches(rows, **options, window=window, padding=3)
    length = plain.tokens.shape[1]
    for name in ("tokens", "labels"):
        assert torch.equal(getattr(padded, name)[:, :length], getattr(plain, name))
    assert (padded.labels[:, length:] == IGNORED).all()
    assert padded.mask.lengths == (*plain.mask.lengths, 3)
    assert padded.mask.window == window
    assert not padded.mask.dense()[:length, length:].any()
    assert valid_tokens(padded) == valid_tokens(plain)


def test_the_end_of_a_document_is_predicted() -> None:
    tokens = np.array([1, 2, EOD, 3, 4], dtype=np.uint16)
    rows = ConcatenatedRows(range_of(tokens), seq_length=4, seed=0)
    batch = read(rows, step=0, micro=1, dp=1, document_mask=True, total=1)[0]
    assert batch.labels.tolist() == [[2, EOD, IGNORED, 4]]


@pytest.mark.parametrize(("total", "works"), [(6, "4 or 8"), (3, "4"), (0, "4")])
def test_a_global_batch_that_does_not_divide_is_refused(total: int, works: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(make_rows(), step=0, micro=2, dp=2, document_mask=False, total=total)
    assert caught.value.flag == "--global-batch-size"
    assert caught.value.works == works
