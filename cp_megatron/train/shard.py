"""A rank's part of a micro batch.

Shapes: b = rows of a micro batch, S = tokens of a row, N = context parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cp_megatron.context_parallel import ContextParallel
from cp_megatron.model.row_counts import TokenRows


@dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's part of a micro batch, on the CPU (pinned for CUDA), with its attention planned.

    Attributes:
        num_pairs: attended pairs of a query and a key of the whole rows, divided by the number of
            ranks that share them; the mean of the layers that attend.
    """

    cp: ContextParallel  # under the micro batch's mask
    tokens: Tensor  # int64 [b, S / N]
    labels: Tensor  # int64 [b, S / N]
    first_row: int  # the number of the first row in the run
    row_length: int  # the length of the rows that are concatenated into one; 0 if none are
    num_valid: int  # tokens of this rank that have a label
    num_pairs: float
    digest: int  # of the whole rows and their mask, the same on all ranks that share them
    rows: TokenRows | None = None  # those of the tokens, [b, S / N], if the model has experts
