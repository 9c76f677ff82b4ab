"""Makes the part of a global batch that one data parallel rank computes, as tensors.

Shapes: S = seq_length, m = micro_batch_size, p = padding. The global batch at ``consumed`` is the
rows [consumed, consumed + global_batch_size) of the run; data parallel rank d takes its d-th slice.
Context and tensor parallel peers make the same rows and keep their shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cp_megatron.data.rows.packing import row_mask
from cp_megatron.data.rows.sampler import IGNORED as IGNORED
from cp_megatron.data.rows.sampler import RowSource
from cp_megatron.errors import ConfigError
from cp_megatron.plan.mask import Mask, Window


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The input of one forward pass, on the CPU.

    Attributes:
        tokens: int64 [m, S + p], or [1, m * S + p] if documents are masked.
        labels: int64, like ``tokens``, already shifted; ``IGNORED`` if a token has no loss.
        mask: the attention mask of every row of the batch.
        first_row: the number of the first row in the run.
        row_length: S if documents are masked and the rows are laid end to end, else 0.
        padding: tokens at the end of each row of ``tokens`` that belong to no row of the run.
        tails: for each of the m rows of the run, the tokens at its end that are no data; empty if
            there are none.
    """

    tokens: Tensor
    labels: Tensor
    mask: Mask
    first_row: int
    row_length: int
    padding: int = 0
    tails: tuple[int, ...] = ()


def microbatches(
    rows: RowSource,
    *,
    consumed: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    document_mask: bool,
    window: Window | None = None,
    padding: int = 0,
) -> Iterator[Batch]:
    """Yields the micro batches of one rank for the global batch that begins at row ``consumed``.

    Args:
        rows: the rows of the run.
        consumed: rows used before this batch (training step n: n * global_batch_size).
        global_batch_size: rows of the batch over all ranks.
        micro_batch_size: rows that go through the model at once.
        dp_rank, dp_size: this rank's place on the dp axis.
        document_mask: attention never crosses a document; the rows of a micro batch are laid end to
            end in one row, and the last token of a document predicts nothing.
        window: the window of the model's attention, as in ``Mask``.
        padding: tokens without a label that follow each row of a batch, a document of their own.

    Yields:
        global_batch_size / (dp_size * micro_batch_size) batches. No grid and no micro batch size
        changes which rows the global batch holds, nor their order.

    Raises:
        ConfigError: the global batch is not a positive multiple of micro batch x dp size.
    """
    unit = micro_batch_size * dp_size
    if global_batch_size <= 0 or global_batch_size % unit:
        rule = f"must be a multiple of micro batch x data parallel size = {unit}"
        above = -(-max(1, global_batch_size) // unit) * unit
        near = [str(size) for size in (above - unit, above) if size > 0]
        raise ConfigError("--global-batch-size", global_batch_size, rule, " or ".join(near))
    per_rank = global_batch_size // dp_size
    first = consumed + dp_rank * per_rank
    for start in range(first, first + per_rank, micro_batch_size):
        chosen = [rows[number] for number in range(start, start + micro_batch_size)]
        tokens = np.stack([row.inputs for row in chosen])
        labels = np.stack([row.labels for row in chosen])
        lengths: Sequence[int] = [rows.seq_length]
        if document_mask:
            # A mask holds for every row of a batch, so rows with other documents become one row.
            for place, row in enumerate(chosen):
                labels[place, row.crossing] = IGNORED
            tokens, labels = tokens.reshape(1, -1), labels.reshape(1, -1)
            lengths = [length for row in chosen for length in row.document_lengths]
        yield Batch(
            tokens=_padded(tokens, padding, rows.eod),
            labels=_padded(labels, padding, IGNORED),
            mask=row_mask(lengths, document_mask=document_mask, window=window, padding=padding),
            first_row=start,
            row_length=rows.seq_length if document_mask else 0,
            padding=padding,
            tails=tuple(row.tail for row in chosen),
        )


def _padded(rows: npt.NDArray[np.int64], padding: int, value: int) -> Tensor:
    """[m, S] -> [m, S + p]."""
    return torch.from_numpy(np.pad(rows, ((0, 0), (0, padding)), constant_values=value))
