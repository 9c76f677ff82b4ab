"""The balanced layout: equal tokens, nearly equal pairs, few keys between ranks.

**What is expensive.** Under a causal mask row p of a document costs p + 1 pairs. With S tokens and
P pairs on N ranks, a rank has to hold S/N tokens and, up to a tolerance, P/N pairs: rows of an
average density P/S. Rows of long documents far from their start are denser than that, heads of
documents and short documents are not; every rank needs some of both. A rank that holds rows of a
document up to row ``top`` reads the keys ``[0, top)``, and those it holds itself are free. So
all ranks together receive

    sum over ranks and the documents they hold a part of:  top    minus    S

keys. Whole documents cost nothing, nor do heads of a document on a rank that has its tail, cuts
near the start of a document cost little, and a long document wants *few* ranks, each as full of it
as can be, in one nested order.

**Filling a rank.** Ranks are filled one at a time, to exactly S/N tokens and at most
``(1 + tolerance) P/N`` pairs:

1. Take the densest tail of all that is left. If its document fits whole, it goes whole; repeat.
2. Else its tail will be cut. Whole documents go first as filler, the sparsest first: what lies
   early in that order makes the tail that still fits wider, and it is spent where tails are most
   expensive. The last of them is exchanged for the largest that fits as well.
3. The gap is closed exactly, in tokens and pairs at once, by a head: of the same document (free,
   but not as sparse), or of another (its length is paid in keys), whichever costs less from here
   on. Head and tail meet both counts because they trade one token for another.

Two documents of 12 and 4 positions on 2 ranks: 8 tokens each, 88 pairs in all, with a tolerance of
0 at most 44 on a rank. The longer one is cut; the shorter one fits whole as filler; a head of 1 is
missing, then the tail [9, 12) completes 8 tokens and 44 pairs. The other rank is the rest:

    document    a a a a a a a a a a a a   b b b b
    pairs       1 2 3 4 5 6 7 8 9 . . 12  1 2 3 4
    rank        0 1 1 1 1 1 1 1 1 0 0 0   0 0 0 0        rank 0: 1 + 33 + 10    rank 1: 44

Rank 0 reads the 8 keys of rank 1, and rank 1 the first of rank 0: 12 + 4 + 9 - 16 = 9 keys. Zigzag
moves 4, for 20 and 68 pairs.

The tolerance is spent on the first ranks, whose tails are longest: all later tails get shorter.
What is left for the last rank is then lighter than the mean, which harms nobody.

**Trials.** The greedy choice is good and fast; a handful of runs with slightly changed preferences
finds better packings where documents are few. The best is kept: least above the limit, then fewest
keys. Contiguous and zigzag take part, so the result is never worse than either. The number of
trials depends on the size of the problem alone, and their random numbers are fixed: every rank gets
the same layout.

**Numbering.** Ranks that share a document get neighbouring numbers, later tails lower ones: keys
then travel a ring downwards over few ranks that do not read them.

**Other masks.** Windows and bidirectional documents only change the pairs per row, which are sums
in closed form. Rows then differ less, cuts cost no more than a window, and where windows let early
rows attend more than late ones, the row is dealt backwards.

Why not deal chunks by pairs alone (longest first, Graham 1969): 4 chunks a rank move 1.3 to 1.6
times these keys and leave 3 % to 35 % imbalance on 8 to 64 ranks. ``benchmarks/balance.py`` shows
all of this. The method is this project's.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from cp_megatron.errors import ConfigError
from cp_megatron.plan.balance.area import (
    Chunks,
    DocumentSlice,
    measure,
    pairs_up_to,
    to_chunks,
    to_pieces,
)
from cp_megatron.plan.balance.dealer import BalanceProblem, Bias, Dealer
from cp_megatron.plan.mask import IntArray, Mask

EFFORT = 3200  # trials x (documents + 8 ranks)
MOST_TRIALS = 48
CHANGED = 0.3  # share of the preferences a trial changes, by up to a factor of 2 either way


def deal(mask: Mask, cp_size: int, tolerance: float = 0.03) -> Chunks:
    """Deals ``seq_len / cp_size`` positions to every rank, balanced by pairs.

    One causal sequence without a window is dealt like zigzag.

    Args:
        mask: what attends to what, of a length that ``cp_size`` divides.
        cp_size: number of ranks.
        tolerance: by which share of the mean the busiest rank may exceed it where that can be
            reached; more tolerance needs fewer keys.

    Returns:
        Per rank its chunks ``(start, stop)``, ascending, with a gap between any two.

    Raises:
        ConfigError: ``tolerance`` is negative.
    """
    if not tolerance >= 0:
        raise ConfigError("tolerance", tolerance, "must not be negative", "0.03")
    assert mask.seq_len % cp_size == 0
    nested = _nested(mask.seq_len, cp_size)
    if len(mask.lengths) == 1 and mask.is_causal and not mask.has_window:
        return nested
    if _is_denser_early(mask):
        left, right = mask.window
        mirrored = Mask.documents(mask.lengths[::-1], causal=False, window=(right, left))
        return _mirror(deal(mirrored, cp_size, tolerance), mask.seq_len)
    row, order = _row(mask, cp_size, tolerance)
    width = mask.seq_len // cp_size
    contiguous = tuple(((rank * width, (rank + 1) * width),) for rank in range(cp_size))
    plain = min((contiguous, nested), key=lambda chunks: _score(mask, row, to_pieces(mask, chunks)))
    dealt = _best_trial(mask, row, order, _score(mask, row, to_pieces(mask, plain)))
    return plain if dealt is None else to_chunks(mask, cp_size, _table(_numbered(dealt), order))


def _best_trial(
    mask: Mask, row: BalanceProblem, order: IntArray, to_beat: tuple[int, int]
) -> list[DocumentSlice] | None:
    """The best of a number of trials, each a change of the best so far; None if none is better."""
    num_trials = max(2, EFFORT // (len(row.lengths) + 8 * row.cp_size))
    best, dice = None, random.Random(0)
    bias = trial = _neutral(row)
    for _ in range(min(MOST_TRIALS, num_trials)):
        if to_beat == (0, 0):
            break
        dealt = Dealer(row, trial).deal()
        score = _score(mask, row, _table(dealt, order))
        if score < to_beat:
            best, to_beat, bias = dealt, score, trial
        trial = _changed(bias, dice)
    return best


def _table(pieces: list[DocumentSlice], order: IntArray) -> IntArray:
    """int64 [pieces, 4], with the mask's numbers of the documents."""
    table = np.asarray(pieces, dtype=np.int64)
    table[:, 1] = order[table[:, 1]]
    return table


def _nested(seq_len: int, cp_size: int) -> Chunks:
    """Zigzag for any shard: rank r holds the r-th run of half a shard from either end."""
    late = -(-seq_len // cp_size // 2)
    early = seq_len // cp_size - late
    ranks = []
    for rank in range(cp_size):
        head = (rank * early, (rank + 1) * early)
        tail = (seq_len - (rank + 1) * late, seq_len - rank * late)
        meet = head[1] == tail[0]
        ranks.append(((head[0], tail[1]),) if meet else (head, tail) if early else (tail,))
    return tuple(ranks)


def _is_denser_early(mask: Mask) -> bool:
    """Whether windows let early rows attend more than late ones: a causal mask read backwards."""
    left, right = (math.inf if side < 0 else side for side in mask.window)
    return right > left


def _mirror(chunks: Chunks, seq_len: int) -> Chunks:
    return tuple(
        tuple((seq_len - stop, seq_len - start) for start, stop in reversed(mine))
        for mine in chunks
    )


def _row(mask: Mask, cp_size: int, tolerance: float) -> tuple[BalanceProblem, IntArray]:
    """The dealer's view of the row, and which document each of its documents is."""
    order = np.argsort(np.asarray(mask.lengths), kind="stable")
    lengths = [mask.lengths[d] for d in order.tolist()]
    up_to = pairs_up_to(mask)
    pairs = [up_to(length, length) for length in lengths]
    row = BalanceProblem(
        cp_size=cp_size,
        shard_len=mask.seq_len // cp_size,
        limit=math.floor(sum(pairs) / cp_size * (1 + tolerance)),
        lengths=lengths,
        pairs=pairs,
        up_to=up_to,
    )
    return row, order


def _score(mask: Mask, row: BalanceProblem, pieces: IntArray) -> tuple[int, int]:
    """Less is better: pairs of the busiest rank above the limit, then keys."""
    load = measure(mask, row.cp_size, pieces)
    return max(0, load.busiest - row.limit), load.keys


def _neutral(row: BalanceProblem) -> Bias:
    ones = [1.0] * len(row.lengths)
    return Bias(cut=ones, fill=ones)


def _changed(bias: Bias, dice: random.Random) -> Bias:
    """Some preferences of ``bias``, doubled at most and halved at least.

    By quotients, which every machine computes alike.
    """
    roll = dice.random

    def change(factors: Sequence[float]) -> list[float]:
        return [x * (1 + roll()) / (1 + roll()) if roll() < CHANGED else x for x in factors]

    return Bias(cut=change(bias.cut), fill=change(bias.fill))


def _numbered(pieces: list[DocumentSlice]) -> list[DocumentSlice]:
    """Puts ranks side by side whose topmost tail is of the same document, in the order dealt."""
    top: dict[int, DocumentSlice] = {}
    for piece in pieces:
        if piece.low and (piece.rank not in top or piece.high > top[piece.rank].high):
            top[piece.rank] = piece
    leader: dict[int, int] = {}
    ranks = sorted({piece.rank for piece in pieces})
    for rank in ranks:
        if rank in top:
            leader.setdefault(top[rank].document, rank)
    place = {rank: (leader[top[rank].document] if rank in top else rank, rank) for rank in ranks}
    number = {rank: n for n, rank in enumerate(sorted(ranks, key=place.__getitem__))}
    return [piece._replace(rank=number[piece.rank]) for piece in pieces]
