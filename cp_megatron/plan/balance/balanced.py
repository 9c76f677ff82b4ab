"""The balanced layout: equal tokens, nearly equal pairs, few keys between ranks.

**The cost.** Under a causal mask, row p of a document has p + 1 pairs. With S tokens and P pairs on
N ranks, each rank must hold S/N tokens and, up to a tolerance, P/N pairs: rows with the average
density P/S. Late rows of long documents are denser than that, while early rows of documents and
short documents are less dense, so every rank needs some of both. A rank that holds rows of a
document up to row ``top`` reads the keys ``[0, top)``, except those that it holds itself. So all
ranks together receive

    the sum of top, over ranks and the documents of which they hold a slice,    minus    S

keys. Whole documents cost nothing. The first rows (the *head*) of a document cost nothing on a rank
that also has its last rows (its *tail*). Cuts near the start of a document cost little. A long
document should be cut for *few* ranks, each filled with as much of it as possible, in one nested
order.

**Filling a rank.** Ranks are filled one at a time, to exactly S/N tokens and at most
``(1 + tolerance) P/N`` pairs:

1. Take the densest remaining tail. If its whole document fits, take the document and repeat.
2. Otherwise the document is cut. First add whole documents as fillers, the sparsest first: each
   one makes the tail that still fits longer, and the sparsest are best spent on the densest tails.
   Then exchange the last filler for the largest document that also fits.
3. Close the gap exactly, in tokens and pairs at once, with a head. Either take it from the same
   document (no keys, but denser), or from another one (it costs its length in keys), whichever
   costs less over the remaining ranks. Since a longer head means a shorter tail, some length
   meets both counts.

Two documents of 12 and 4 positions on 2 ranks: 8 tokens each and 88 pairs in all, so a tolerance of
0 allows 44 pairs on a rank. The longer document is cut, and the shorter one fits as a filler. With
a head of 1 token, the tail [9, 12) completes 8 tokens and 44 pairs. The other rank gets the rest:

    document    a a a a a a a a a a a a   b b b b
    pairs       1 2 3 4 5 6 7 8 9 . . 12  1 2 3 4
    rank        0 1 1 1 1 1 1 1 1 0 0 0   0 0 0 0        rank 0: 1 + 33 + 10    rank 1: 44

Rank 0 reads the 8 keys of rank 1, and rank 1 the first key of rank 0: 12 + 4 + 9 - 16 = 9 keys.
Zigzag moves 4 keys, but its ranks have 20 and 68 pairs.

The first ranks use up the tolerance, because their tails are longest and every later tail then gets
shorter. The last rank ends up below the mean, which does no harm.

**Trials.** The greedy choice is good and fast. A handful of runs with slightly changed preferences
finds better layouts if documents are few. The best one is kept: the fewest pairs above the limit,
then the fewest keys. Contiguous and zigzag take part, so the result is never worse than either. The
number of trials depends only on the size of the problem, and the random numbers are fixed, so every
rank computes the same layout.

**Numbering.** Ranks that share a document get neighbouring numbers, and later tails get lower ones.
On a ring, keys then pass few ranks that do not read them.

**Other masks.** Windows and bidirectional documents change only the pairs per row, which are sums
in closed form. Their rows differ less, and a cut costs no more keys than a window. If windows let
early rows attend more keys than late ones, the row is dealt backwards.

Dealing chunks by pairs alone (longest first, Graham 1969) with 4 chunks per rank moves 1.3 to 1.6
times these keys and leaves 3 % to 35 % imbalance on 8 to 64 ranks; see ``benchmarks/balance.py``.
The method is this project's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from functools import partial

import numpy as np

from cp_megatron.errors import ConfigError
from cp_megatron.plan.balance.area import (
    Chunks,
    DocumentSlice,
    contiguous_chunks,
    measure,
    pairs_up_to,
    to_chunks,
    to_slices,
    zigzag_chunks,
)
from cp_megatron.plan.balance.dealer import BalanceProblem, Bias, Dealer
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.tiling import merge_spans

EFFORT = 3200  # trials x (documents + 8 ranks)
MOST_TRIALS = 48
CHANGED = 0.3  # share of the preferences that a trial changes, each by a factor of up to 2


def deal(mask: Mask, cp_size: int, tolerance: float = 0.03) -> Chunks:
    """Deals ``seq_len / cp_size`` positions to every rank, balanced by pairs.

    One causal sequence without a window is dealt like zigzag.

    Args:
        mask: which keys each query attends; ``cp_size`` must divide its length.
        cp_size: the number of ranks.
        tolerance: how far the busiest rank may exceed the mean, as a share of the mean, if that can
            be reached. More tolerance needs fewer keys.

    Returns:
        For each rank its chunks ``(start, stop)``, ascending, with a gap between any two.

    Raises:
        ConfigError: ``tolerance`` is negative.
    """
    if not tolerance >= 0:
        raise ConfigError("tolerance", tolerance, "must not be negative", "0.03")
    assert mask.seq_len % cp_size == 0
    halves = zigzag_chunks(mask.seq_len, cp_size)
    nested = tuple(tuple(merge_spans([c for c in mine if c[0] < c[1]])) for mine in halves)
    if len(mask.lengths) == 1 and mask.is_causal and not mask.has_window:
        return nested
    left, right = mask.window
    if left >= 0 and not 0 <= right <= left:  # early rows attend more keys than late ones
        mirrored = Mask.documents(mask.lengths[::-1], causal=False, window=(right, left))
        return tuple(
            tuple((mask.seq_len - stop, mask.seq_len - start) for start, stop in reversed(mine))
            for mine in deal(mirrored, cp_size, tolerance)
        )
    # The dealer numbers documents by length; ``order`` has their numbers in the mask.
    order = np.argsort(np.asarray(mask.lengths), kind="stable")
    lengths = [mask.lengths[d] for d in order.tolist()]
    up_to = pairs_up_to(mask)
    pairs = [up_to(length, length) for length in lengths]
    problem = BalanceProblem(
        cp_size=cp_size,
        shard_len=mask.seq_len // cp_size,
        limit=math.floor(sum(pairs) / cp_size * (1 + tolerance)),
        lengths=lengths,
        pairs=pairs,
        up_to=up_to,
    )
    contiguous = contiguous_chunks(mask.seq_len, cp_size)
    score = partial(_score, mask, problem)
    plain = min((contiguous, nested), key=lambda chunks: score(to_slices(mask, chunks)))
    dealt = _best_trial(mask, problem, order, score(to_slices(mask, plain)))
    return plain if dealt is None else to_chunks(mask, cp_size, _table(_numbered(dealt), order))


def _best_trial(
    mask: Mask, problem: BalanceProblem, order: IntArray, to_beat: tuple[int, int]
) -> list[DocumentSlice] | None:
    """Runs trials, each a change of the best so far; None if none beats ``to_beat``."""
    num_trials = max(2, EFFORT // (len(problem.lengths) + 8 * problem.cp_size))
    best, dice = None, random.Random(0)
    ones = [1.0] * len(problem.lengths)
    bias = trial = Bias(cut=ones, fill=ones)
    for _ in range(min(MOST_TRIALS, num_trials)):
        if to_beat == (0, 0):
            break
        dealt = Dealer(problem, trial).deal()
        score = _score(mask, problem, _table(dealt, order))
        if score < to_beat:
            best, to_beat, bias = dealt, score, trial
        trial = _changed(bias, dice)
    return best


def _table(slices: list[DocumentSlice], order: IntArray) -> IntArray:
    table = np.asarray(slices, dtype=np.int64)
    table[:, 1] = order[table[:, 1]]
    return table


def _score(mask: Mask, problem: BalanceProblem, slices: IntArray) -> tuple[int, int]:
    """Smaller is better: pairs of the busiest rank above the limit, then keys."""
    load = measure(mask, problem.cp_size, slices)
    return max(0, load.busiest - problem.limit), load.keys


def _changed(bias: Bias, dice: random.Random) -> Bias:
    """Changes some preferences by a factor between a half and two.

    The factors are quotients, which every machine rounds alike.
    """
    roll = dice.random

    def change(factors: Sequence[float]) -> list[float]:
        return [x * (1 + roll()) / (1 + roll()) if roll() < CHANGED else x for x in factors]

    return Bias(cut=change(bias.cut), fill=change(bias.fill))


def _numbered(slices: list[DocumentSlice]) -> list[DocumentSlice]:
    """Renumbers ranks so that those whose highest tail is of the same document are neighbours."""
    top: dict[int, DocumentSlice] = {}
    for part in slices:
        if part.low and (part.rank not in top or part.high > top[part.rank].high):
            top[part.rank] = part
    leader: dict[int, int] = {}
    ranks = sorted({part.rank for part in slices})
    for rank in ranks:
        if rank in top:
            leader.setdefault(top[rank].document, rank)
    place = {rank: (leader[top[rank].document] if rank in top else rank, rank) for rank in ranks}
    number = {rank: n for n, rank in enumerate(sorted(ranks, key=place.__getitem__))}
    return [part._replace(rank=number[part.rank]) for part in slices]
