"""Scores a model on long rows over any grid: sums of losses and right guesses per cell.

Shapes: S tokens of a row, p padding, N context parallel ranks, n tokens of a rank that have a
label, v padded vocabulary.

Every predicted token belongs to a *cell*: a bucket of positions (perplexity), or its question
(needle, variables). A rank adds the tokens of its shard to a table [cells, 3] of loss, right
guesses and tokens, and the tables are summed over dp x cp once, in float64; a rank that has no
token of a cell adds 0. So the numbers do not depend on the grid, and a mean is over tokens, never
over batches.

One forward pass scores a whole answer. Greedy decoding gives it exactly iff every token of it is
the most likely one after the *true* tokens before it: while the decoded tokens are true, decoding
sees what this pass sees, and the first one that is not ends both.

The head is applied only to tokens that have a label, in pieces, so that the largest tensor is
[PIECE, v/tp] however long the row is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
"""Tokens whose logits exist at once."""
NO_TOKEN = 2**62


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row to score.

    Attributes:
        tokens: int64 [S].
        labels: int64 [S], the token after each; ``IGNORED`` where it does not count.
        cells: int64 [S], the cell of each; not read where there is no label.
    """

    tokens: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int64]


def bucket_ends(length: int, count: int, longest: int) -> list[int]:
    """The ends of the buckets of positions of a row: powers of two, and the row's own.

    The loss falls with the logarithm of the context, so doublings show it evenly, and rows of
    different lengths share the buckets they have::

        longest 2048 in 4     [0, 256) [256, 512) [512, 1024) [1024, 2048)
        with it, 600          [0, 256) [256, 512) [512, 600)

    Args:
        length: of the row.
        count: buckets of the longest row; fewer where it is shorter than 2 ** (count - 1).
        longest: of all rows that are compared.
    """
    first = max(1, (1 << (longest - 1).bit_length()) >> (count - 1))
    ends = []
    while first < length:
        ends.append(first)
        first *= 2
    return [*ends, length]


def perplexity_row(
    tokens: npt.NDArray[np.int64], ends: list[int], loss: npt.NDArray[np.bool_] | None = None
) -> Row:
    """A row of text: each position's cell is its bucket.

    Args:
        tokens: int64 [S + 1]; neighbours are input and label.
        ends: of the buckets; position i predicts the token after i + 1 tokens of context.
        loss: bool [S], whether the label counts; None where every one does.
    """
    cells = np.searchsorted(ends, np.arange(len(tokens) - 1), side="right")
    labels = tokens[1:] if loss is None else np.where(loss, tokens[1:], IGNORED)
    return Row(tokens=tokens[:-1], labels=labels, cells=cells)


def task_row(task: Task, cell: int) -> Row:
    """A question: only the tokens of its answer count."""
    labels = np.full(task.length, IGNORED, dtype=np.int64)
    answer = slice(task.answer_start, task.length)
    labels[task.answer_start - 1 : task.length - 1] = task.tokens[answer]
    return Row(tokens=task.tokens, labels=labels, cells=np.full(task.length, cell, dtype=np.int64))


@torch.no_grad()
def score(
    model: Transformer,
    groups: ParallelGroups,
    cp: ContextParallel,
    row_of: Callable[[int], Row],
    *,
    num_rows: int,
    num_cells: int,
    device: torch.device,
    padding: int = 0,
) -> npt.NDArray[np.float64]:
    """Scores rows of one length. Called on every rank.

    Args:
        model: the sharded model.
        groups: this rank's groups.
        cp: context parallelism under the mask of a row, padding included.
        row_of: row number i, for 0 <= i < ``num_rows``; called for this rank's rows only.
        num_rows: of all ranks; any number.
        num_cells: rows of the table.
        device: where the model lives.
        padding: tokens without a label put behind each row.

    Returns:
        float64 [num_cells, 3], alike on every rank: the sum of losses in nats, the number of
        tokens that are the most likely one (of equals, the lowest), the number of tokens.
    """
    model.eval()
    table = torch.zeros(num_cells, 3, dtype=torch.float64, device=device)
    place, dp = groups.coordinates.dp, groups.grid.dp
    for number in range(place, -(-num_rows // dp) * dp, dp):
        # The weights are shared by all ranks, so one without a row of its own repeats one.
        row = row_of(min(number, num_rows - 1))
        tokens, labels, cells = _shard(row, cp, padding, counts=number < num_rows)
        table += _score_shard(model, groups, cp, tokens, labels, cells, num_cells, device)
    dist.all_reduce(table, group=groups.dp_cp)
    return table.cpu().numpy()


def _shard(
    row: Row, cp: ContextParallel, padding: int, *, counts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's tokens, labels and cells, [S] -> [(S + p) / N]."""
    labels = row.labels if counts else np.full_like(row.labels, IGNORED)
    padded = ((row.tokens, 0), (labels, IGNORED), (row.cells, 0))
    whole = [torch.from_numpy(np.pad(x, (0, padding), constant_values=v)) for x, v in padded]
    tokens, labels_, cells = (cp.shard(x, 0) for x in whole)
    return tokens, labels_, cells


def _score_shard(
    model: Transformer,
    groups: ParallelGroups,
    cp: ContextParallel,
    tokens: Tensor,
    labels: Tensor,
    cells: Tensor,
    num_cells: int,
    device: torch.device,
) -> Tensor:
    """[num_cells, 3] of this rank's tokens."""
    counted = torch.nonzero(labels != IGNORED).squeeze(1)  # [n]
    labels, counted = labels[counted].to(device), counted.to(device)
    with _scoring_head(model, counted, labels, groups.tp):
        scores = model(tokens.unsqueeze(0).to(device), cp=cp)  # [n, 2]
    found = torch.cat([scores, torch.ones_like(scores[:, :1])], dim=1)
    # A sum in a fixed order: on CUDA index_add would depend on the order of threads.
    belongs = torch.nn.functional.one_hot(cells.to(device)[counted], num_cells)
    return belongs.T.to(torch.float64) @ found


@contextmanager
def _scoring_head(
    model: Transformer, counted: Tensor, labels: Tensor, tp: ProcessGroup
) -> Iterator[None]:
    """Inside, the model returns [n, 2] loss and right guess of the tokens ``counted``.

    The head is called inside the model's own forward pass, where FSDP has gathered its weights.
    """
    head = model.head
    assert head is not None
    logits_of = head.forward

    def forward(x: Tensor, tied_weight: Tensor | None = None) -> Tensor:
        found = [torch.zeros(0, 2, dtype=torch.float64, device=x.device)]
        for start in range(0, len(counted), PIECE):
            rows = slice(start, start + PIECE)
            logits = logits_of(x[:, counted[rows]], tied_weight)[0]  # [piece, v/tp]
            losses = vocab_parallel_cross_entropy(logits, labels[rows], tp).double()
            right = (vocab_parallel_argmax(logits, tp) == labels[rows]).double()
            found.append(torch.stack([losses, right], dim=1))
        return torch.cat(found)

    head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del head.forward


def vocab_parallel_argmax(logits: Tensor, group: ProcessGroup | None) -> Tensor:
    """The most likely token where the vocabulary is split; of equals, the lowest.

    Two numbers per token cross the ranks: the largest logit, then the lowest id that has it.

    Args:
        logits: [.., v/tp], this rank's part in rank order.
        group: the tp group; None is one rank.

    Returns:
        int64 [..], alike on all ranks; ``NO_TOKEN`` where a logit is not a number.
    """
    # max() does not say which of several equals it takes, argmax() does: the first.
    token = logits.argmax(-1)
    best = logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    broken = best.isnan()  # argmax takes it for the largest
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
