"""Scores a model on long rows over any grid: sums of losses and right guesses per cell.

Shapes: S = tokens of a row, p = padding, N = context parallel ranks, n = tokens of a rank that have
a label, v = padded vocabulary.

Every predicted token belongs to a *cell*: a bucket of positions (perplexity) or its question
(needle, variables). Each rank sums the loss, the right guesses and the number of its tokens per
cell in a table [cells, 3]; the tables are summed over dp x cp once, in float64. So the results do
not depend on the grid, and a mean is over tokens and never over batches.

One forward pass scores a whole answer. Greedy decoding gives exactly this answer if and only if
every token of it is most likely after the *correct* tokens before it: as long as the decoded tokens
are correct, decoding and this pass see the same tokens, and at the first wrong one both fail.

The head is applied only to tokens that have a label, in pieces, so that the largest tensor is
[PIECE, v/tp] for rows of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cp_megatron.comm.groups import ParallelGroups
from cp_megatron.context_parallel import ContextParallel
from cp_megatron.data.batch.batch import IGNORED
from cp_megatron.evaluate.needle import Task
from cp_megatron.model.transformer import Transformer
from cp_megatron.tensor_parallel.loss import vocab_parallel_cross_entropy

PIECE = 1024
"""The number of tokens whose logits are in memory at once."""
NO_TOKEN = 2**62


@dataclass(frozen=True, kw_only=True)
class LabeledRow:
    """One row to score.

    Attributes:
        tokens: int64 [S].
        labels: int64 [S], the next token, or ``IGNORED`` if it does not count.
        cells: int64 [S], the cell of each label.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int64]


def bucket_ends(length: int, count: int, longest: int) -> list[int]:
    """Returns the ends of a row's buckets of positions: powers of two, and the length of the row.

    The loss falls with the logarithm of the context, so buckets that double in size show it evenly.
    Rows of different lengths share their buckets::

        row of 2048, 4 buckets     [0, 256) [256, 512) [512, 1024) [1024, 2048)
        row of 600 beside it       [0, 256) [256, 512) [512, 600)

    Args:
        length: the length of the row.
        count: the number of buckets of the longest row; fewer if it is shorter than
            2 ** (count - 1).
        longest: the length of the longest row that is compared.
    """
    first = max(1, (1 << (longest - 1).bit_length()) >> (count - 1))
    ends = []
    while first < length:
        ends.append(first)
        first *= 2
    return [*ends, length]


def perplexity_row(
    tokens: npt.NDArray[np.int64], ends: list[int], loss: npt.NDArray[np.bool_] | None = None
) -> LabeledRow:
    """Makes a row of text whose cells are the buckets of positions.

    Args:
        tokens: int64 [S + 1]; each token but the first is the label of the one before.
        ends: the ends of the buckets; position i predicts a token from i + 1 tokens of context.
        loss: bool [S], whether a label counts; by default all count.
    """
    cells = np.searchsorted(ends, np.arange(len(tokens) - 1), side="right")
    labels = tokens[1:] if loss is None else np.where(loss, tokens[1:], IGNORED)
    return LabeledRow(tokens=tokens[:-1], labels=labels, cells=cells)


def task_row(task: Task, cell: int) -> LabeledRow:
    """Makes the row of a question, in which only the tokens of the answer count."""
    labels = np.full(task.length, IGNORED, dtype=np.int64)
    labels[task.answer_start - 1 : -1] = task.tokens[task.answer_start :]
    return LabeledRow(tokens=task.tokens, labels=labels, cells=np.full_like(labels, cell))


@torch.no_grad()
def score(
    model: Transformer,
    groups: ParallelGroups,
    cp: ContextParallel,
    row_of: Callable[[int], LabeledRow],
    *,
    num_rows: int,
    num_cells: int,
    device: torch.device,
    padding: int = 0,
    go_on: Callable[[int], bool] = lambda done: True,
) -> npt.NDArray[np.float64] | None:
    """Scores rows of one length. Every rank calls this.

    Args:
        model: the sharded model.
        groups: this rank's groups.
        cp: context parallelism with the mask of a row, including padding.
        row_of: returns row number i, for 0 <= i < ``num_rows``; called for this rank's rows only.
        num_rows: the number of rows on all ranks.
        num_cells: the number of cells.
        device: the device of the model.
        padding: the number of tokens without a label to append to each row.
        go_on: called before each row with the number of rows that are scored on all ranks; the
            answer is the same on every rank.

    Returns:
        float64 [num_cells, 3], equal on every rank: the sum of losses in nats, the number of
        tokens that are most likely (of equal ones, the lowest), the number of tokens. None if
        ``go_on`` returns False.
    """
    model.eval()
    table = torch.zeros(num_cells, 3, dtype=torch.float64, device=device)
    place, dp = groups.coordinates.dp, groups.grid.dp
    for number in range(place, -(-num_rows // dp) * dp, dp):
        if not go_on(number - place):
            return None
        # All ranks must take part in a forward pass; a rank without a row of its own repeats one.
        row = row_of(min(number, num_rows - 1))
        if number >= num_rows:
            row = replace(row, labels=np.full_like(row.labels, IGNORED))
        tokens, labels, cells = (x.to(device) for x in _shard(row, cp, padding))
        counted = torch.nonzero(labels != IGNORED).squeeze(1)  # [n]
        with _scoring_head(model, counted, labels[counted], groups.tp):
            scores = model(tokens.unsqueeze(0), cp=cp)  # [n, 2]
        values = torch.cat([scores, torch.ones_like(scores[:, :1])], dim=1)
        # A matrix product adds in a fixed order; index_add on CUDA depends on the order of threads.
        cell_of_token = torch.nn.functional.one_hot(cells[counted], num_cells)
        table += cell_of_token.T.to(torch.float64) @ values
    dist.all_reduce(table, group=groups.dp_cp)
    return table.cpu().numpy()


def _shard(row: LabeledRow, cp: ContextParallel, padding: int) -> Iterator[Tensor]:
    """Pads a row and yields this rank's tokens, labels and cells: [S] -> [(S + p) / N]."""
    for x, value in ((row.tokens, 0), (row.labels, IGNORED), (row.cells, 0)):
        yield cp.shard(torch.from_numpy(np.pad(x, (0, padding), constant_values=value)), 0)


@contextmanager
def _scoring_head(
    model: Transformer, counted: Tensor, labels: Tensor, tp: ProcessGroup
) -> Iterator[None]:
    """Makes the model return [n, 2], loss and right guess of the tokens ``counted``.

    The scores are computed inside the model's forward pass, where FSDP has gathered the head.
    ``counted`` are numbers of whole rows, so with sequence parallelism the rows are gathered here
    and not by the head.
    """
    head = model.head
    assert head is not None
    logits_of, split = head.forward, head.tp

    def forward(x: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        x = split.enter(x)  # [1, s/tp, h] -> [1, s, h]
        scores = [torch.zeros(0, 2, dtype=torch.float64, device=x.device)]
        for start in range(0, len(counted), PIECE):
            rows = slice(start, start + PIECE)
            logits = logits_of(x[:, counted[rows]], tied_weight)[0]  # [piece, v/tp]
            losses = vocab_parallel_cross_entropy(logits, labels[rows], tp).double()
            right = (vocab_parallel_argmax(logits, tp) == labels[rows]).double()
            scores.append(torch.stack([losses, right], dim=1))
        return torch.cat(scores)

    head.forward = forward  # type: ignore[assignment, method-assign]
    head.tp = replace(split, sequence_parallel=False)
    try:
        yield
    finally:
        del head.forward
        head.tp = split


def vocab_parallel_argmax(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns the most likely token of a split vocabulary; of equal ones, the lowest.

    Two numbers per token are reduced over the ranks: the largest logit, and then the lowest id that
    has it.

    Args:
        logits: [..., v/tp], this rank's part of the vocabulary in rank order.
        group: the tp group; None means one rank.

    Returns:
        int64 [...], equal on all ranks; ``NO_TOKEN`` where a logit is NaN.
    """
    # Of equal logits, argmax() takes the first; max() does not specify which one.
    token = logits.argmax(-1)
    best = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    broken = best.isnan()  # argmax treats NaN as the largest
    token = token + (0 if group is None else group.rank() * logits.shape[-1])
    token = torch.where(broken, NO_TOKEN, token)
    if group is None or group.size() == 1:
        return token
    best = torch.where(broken, torch.inf, best)
    highest = best.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    token = torch.where(best == highest, token, NO_TOKEN)
    dist.all_reduce(token, dist.ReduceOp.MIN, group=group)
    return token
