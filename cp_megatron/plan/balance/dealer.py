"""Filling one rank after the other with slices of documents; ``balanced.py`` explains the method.

The rest of a document is always one run ``[low, high)``, because heads are taken from its lower end
and tails from its upper end. A document is *fresh* until something is taken from it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cp_megatron.plan.balance.area import DocumentSlice, PairsUpTo

NUM_FRESH = 4  # how many of the longest fresh documents are considered for a tail or a head


@dataclass(frozen=True, kw_only=True)
class BalanceProblem:
    """The data that all trials share. Documents are numbered by ascending length.

    Attributes:
        cp_size: the number of ranks.
        shard_len: the number of tokens of each rank.
        limit: the number of pairs that no rank should exceed.
        lengths, pairs: of each document.
        up_to: counts the pairs of a document's first rows.
    """

    cp_size: int
    shard_len: int
    limit: int
    lengths: list[int]
    pairs: list[int]
    up_to: PairsUpTo


@dataclass(frozen=True, kw_only=True)
class Bias:
    """Factors around 1 that distinguish trials.

    Attributes:
        cut: for each document, how early its tail is dealt.
        fill: for each document, how late it is used as a filler.
    """

    cut: Sequence[float]
    fill: Sequence[float]


class Cut(NamedTuple):
    """A rank's share of a cut document: a head up to ``head``, whole fillers, part of another."""

    head: int
    whole: list[int]
    part: tuple[int, int] | None
    """A document and the tokens of its head."""


class Dealer:
    """One trial: deals the row to all ranks."""

    def __init__(self, problem: BalanceProblem, bias: Bias) -> None:
        self.problem, self.bias = problem, bias
        num = len(problem.lengths)
        self.low, self.high = [0] * num, list(problem.lengths)
        self.fresh, self.opened = list(range(num)), list[int]()
        self.order = [bias.fill[d] * problem.pairs[d] / problem.lengths[d] for d in range(num)]
        self.queue = sorted((self.order[d], d) for d in range(num))
        self.density = [self._tail_density(d) for d in range(num)]
        self.num_left, self.pairs_left = sum(problem.lengths), sum(problem.pairs)
        self.slices: list[DocumentSlice] = []
        self.rank = self.tokens = self.budget = 0

    def deal(self) -> list[DocumentSlice]:
        """Fills every rank with exactly ``shard_len`` tokens."""
        for rank in range(self.problem.cp_size - 1):
            self._fill(rank)
        last = self.problem.cp_size - 1
        for d in self.fresh + self.opened:
            self.slices.append(DocumentSlice(last, d, self.low[d], self.high[d]))
        return self.slices

    def _fill(self, rank: int) -> None:
        self.rank, self.tokens = rank, self.problem.shard_len
        # If the limit is out of reach, the ranks that follow share the excess equally.
        self.budget = max(self.problem.limit, -(-self.pairs_left // (self.problem.cp_size - rank)))
        while self.tokens:
            self._step()

    def _step(self) -> None:
        """Gives the rank the densest document, its tail, or as much of it as a cut allows."""
        d, tokens = self._densest(), self.tokens
        low, high = self.low[d], self.high[d]
        size, pairs = high - low, self.count(d, low, high)
        if size <= tokens and pairs <= self.budget and self._completes(d, size, pairs):
            self._take(d, low, high)
        elif size >= tokens and self.count(d, high - tokens, high) <= self.budget:
            whole = self._largest_whole(size - tokens)
            if whole is not None:
                d, low, high = whole, 0, self.high[whole]
            self._take(d, max(low, high - tokens), high)
        else:
            self._cut(d)

    def _densest(self) -> int:
        return max(self.opened + self.fresh[-NUM_FRESH:], key=self.density.__getitem__)

    def _tail_density(self, d: int) -> float:
        """Pairs per row of the longest tail that a rank can take."""
        low, high = self.low[d], self.high[d]
        low = max(low, high - self.problem.shard_len)
        return self.count(d, low, high) / (high - low) * self.bias.cut[d]

    def _completes(self, d: int, size: int, pairs: int) -> bool:
        """Whether the cheapest other tokens fit under the limit if ``d`` is taken whole."""
        tokens, budget = self.tokens - size, self.budget - pairs
        if budget * (self.num_left - size) >= (self.pairs_left - pairs) * tokens:
            return True  # tokens of average density fit
        lengths, whole = self.problem.lengths, self.problem.pairs
        for e in self.fresh:
            if e == d:
                continue
            if lengths[e] >= tokens or budget < 0:
                return budget >= self.count(e, 0, max(tokens, 0))
            tokens, budget = tokens - lengths[e], budget - whole[e]
        for e in self.opened:
            if e != d and tokens > 0:
                low = self.low[e]
                some = min(tokens, self.high[e] - low)
                tokens, budget = tokens - some, budget - self.count(e, low, low + some)
        return budget >= 0

    def _largest_whole(self, rest: int) -> int | None:
        """The largest fresh document that fits and leaves less than ``rest`` tokens to fill."""
        lengths, pairs = self.problem.lengths, self.problem.pairs
        place = min(
            bisect_right(self.fresh, self.tokens, key=lengths.__getitem__),
            bisect_right(self.fresh, self.budget, key=pairs.__getitem__),
        )
        if not place:
            return None
        e = self.fresh[place - 1]
        enough = self.tokens - lengths[e] < rest
        return e if enough and self._completes(e, lengths[e], pairs[e]) else None

    def _cut(self, d: int) -> None:
        """Fills the rank with fillers, a head of ``d``, and the tail of ``d`` that then fits."""
        cut = _CutSearch(self, d).plan()
        if cut is None:
            # No filler fits whole, and no part of one closes the gap: take the cheapest tokens.
            e = next((e for _, e in self.queue if e != d), d)
            self._take(e, self.low[e], min(self.high[e], self.low[e] + self.tokens))
            return
        self._take(d, self.low[d], cut.head)
        for e in cut.whole:
            self._take(e, self.low[e], self.high[e])
        if cut.part:
            e, some = cut.part
            self._take(e, self.low[e], self.low[e] + some)
        if self.low[d] < self.high[d]:
            self._take(d, max(self.low[d], self.high[d] - self.tokens), self.high[d])

    def _take(self, d: int, low: int, high: int) -> None:
        """Gives the rank ``[low, high)``, one end of the rest of ``d``."""
        if low == high:
            return
        pairs = self.count(d, low, high)
        self.slices.append(DocumentSlice(self.rank, d, low, high))
        self.tokens, self.budget = self.tokens - (high - low), self.budget - pairs
        self.num_left, self.pairs_left = self.num_left - (high - low), self.pairs_left - pairs
        del self.queue[bisect_left(self.queue, (self.order[d], d))]
        if self.low[d] == 0 and self.high[d] == self.problem.lengths[d]:
            del self.fresh[bisect_left(self.fresh, d)]
        else:
            self.opened.remove(d)
        if low == self.low[d]:
            self.low[d] = high
        else:
            self.high[d] = low
        if (low := self.low[d]) < (high := self.high[d]):
            self.opened.append(d)
            self.order[d] = self.bias.fill[d] * self.count(d, low, high) / (high - low)
            insort(self.queue, (self.order[d], d))
            self.density[d] = self._tail_density(d)

    def count(self, d: int, low: int, high: int) -> int:
        """Pairs of rows ``[low, high)`` of ``d``."""
        up_to, length = self.problem.up_to, self.problem.lengths[d]
        return up_to(length, high) - up_to(length, low)


class _CutSearch:
    """Searches for the tokens that complete a rank with a tail of document ``d``.

    ``tokens`` and ``pairs`` count the fillers so far. The *gap* is closed once the tail that takes
    the remaining tokens has no more pairs than the rank's budget.
    """

    def __init__(self, dealer: Dealer, d: int) -> None:
        self.dealer, self.d = dealer, d
        self.up_to, self.length = dealer.problem.up_to, dealer.problem.lengths[d]
        self.top = dealer.high[d]
        self.pairs_to_top = self.up_to(self.length, self.top)
        self.head = dealer.low[d]
        self.tokens = self.pairs = 0
        self.whole: list[int] = []

    def plan(self) -> Cut | None:
        """Adds the cheapest documents while they fit, then finds the best way to close the gap."""
        short = self._add_whole()
        if self.whole:
            last = self.whole[-1]
            self._exchange(last, self._largest_for(last))
            cut = self._close(short)
            if cut is not None:
                return cut
            self._exchange(self.whole[-1], last)
        return self._close(short)

    def _add_whole(self) -> list[int]:
        """Adds whole documents while they fit; returns the first that does not fit, if any."""
        dealer = self.dealer
        for _, e in dealer.queue:
            if e == self.d:
                continue
            low, high = dealer.low[e], dealer.high[e]
            if not self._fits(high - low, dealer.count(e, low, high)):
                return [e]
            self._add(e, 1)
        return []

    def _excess(self, tokens: int, pairs: int, head: int) -> int:
        """Pairs above the limit if the tail of ``d`` fills up; positive while it is too short."""
        dealer = self.dealer
        bottom = self.top - dealer.tokens + tokens
        if bottom < head:
            return max(1, self._excess(dealer.tokens - self.top + head, pairs, head))
        return self.pairs_to_top - self.up_to(self.length, bottom) + pairs - dealer.budget

    def _fits(self, tokens: int, pairs: int) -> bool:
        tokens, pairs = self.tokens + tokens, self.pairs + pairs
        return tokens <= self.dealer.tokens and self._excess(tokens, pairs, self.head) > 0

    def _add(self, e: int, sign: int) -> None:
        dealer = self.dealer
        low, high = dealer.low[e], dealer.high[e]
        self.tokens += sign * (high - low)
        self.pairs += sign * dealer.count(e, low, high)
        if sign > 0:
            self.whole.append(e)
        else:
            self.whole.remove(e)

    def _heads_of(self, e: int) -> int | None:
        """The fewest tokens of the head of ``e`` that close the gap."""
        dealer, up_to = self.dealer, self.up_to
        low, length = dealer.low[e], dealer.problem.lengths[e]
        pairs, raised = self.pairs - up_to(length, low), int(e == self.d)

        def excess(n: int) -> int:
            new_pairs = pairs + up_to(length, low + n)
            return self._excess(self.tokens + n, new_pairs, self.head + n * raised)

        return first_closed(excess, min(dealer.tokens - self.tokens, dealer.high[e] - low))

    def _exchange(self, old: int, new: int) -> None:
        self._add(old, -1)
        self._add(new, 1)

    def _largest_for(self, last: int) -> int:
        """The largest fresh document that fits in place of the filler ``last``."""
        dealer = self.dealer
        lengths, pairs, fresh = dealer.problem.lengths, dealer.problem.pairs, dealer.fresh
        size = dealer.high[last] - dealer.low[last]
        freed = dealer.count(last, dealer.low[last], dealer.high[last])
        # The rest of the tail must make up for the missing tokens.
        missing = dealer.tokens - self.tokens + size - (self.top - self.head)
        first = bisect_right(fresh, max(size, missing), key=lengths.__getitem__)
        end, best = len(fresh), last
        while first < end:
            middle = (first + end) // 2
            e = fresh[middle]
            if self._fits(lengths[e] - size, pairs[e] - freed):
                first = middle + 1
                if e != self.d and e not in self.whole:
                    best = e
            else:
                end = middle
        return best

    def _close(self, short: list[int]) -> Cut | None:
        """Closes the gap with a head of ``d`` or of another document, whichever costs less.

        A lower tail lowers all later tails of this document too, about as many as the number of
        ranks that its remaining pairs fill. A head of another document makes this rank read all
        keys below it.
        """
        dealer = self.dealer
        num_ranks = 2 * dealer.count(self.d, dealer.low[self.d], self.top) / dealer.problem.limit
        bottom = self.top - dealer.tokens + self.tokens
        best, least = None, float("inf")
        num = self._heads_of(self.d)
        if num is not None:
            best, least = Cut(self.head + num, self.whole, None), num_ranks * (bottom + num)
            if num == 0:
                return best
        used = {self.d, *self.whole}
        opened = sorted(dealer.opened, key=dealer.low.__getitem__)
        for e in (*short, *dealer.fresh[-NUM_FRESH:], *opened):
            low = dealer.low[e]
            if e in used or num_ranks * bottom + low >= least:
                continue
            if (num := self._heads_of(e)) is None:
                continue
            end = low + num
            cost = num_ranks * (bottom + num) + (end if end < dealer.high[e] else 0)
            if cost < least:
                best, least = Cut(self.head, self.whole, (e, num)), cost
        return best


def first_closed(excess: Callable[[int], int], most: int) -> int | None:
    """Returns the first n in 0 .. ``most`` with ``excess(n) <= 0``, or None; the excess falls.

    It interpolates first, which succeeds at once if the excess is linear, as it is for heads and
    tails under a causal mask. Then it halves the interval.
    """
    low, high = 0, most
    if high < 0 or (below := excess(high)) > 0:
        return None
    if (above := excess(low)) <= 0:
        return low
    iteration = 0
    while high - low > 1:
        iteration += 1
        middle = (low + high) // 2
        if iteration <= 6:
            middle = low + (high - low) * above // (above - below) + iteration % 2
            middle = min(max(middle, low + 1), high - 1)
        value = excess(middle)
        if value > 0:
            low, above = middle, value
        else:
            high, below = middle, value
    return high
