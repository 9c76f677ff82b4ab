"""The totals of a schedule, in numbers and words, for the picture and for the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol

from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.rounds import Round
from cp_megatron.plan.tiling import Span


class DrawableSchedule(Protocol):
    """The attributes of a ``Schedule`` that the drawing reads.

    ``Schedule.plot`` calls the drawing, so the drawing cannot import ``Schedule``.
    """

    @property
    def mask(self) -> Mask: ...
    @property
    def layout(self) -> SequenceLayout: ...
    @property
    def group_layout(self) -> SequenceLayout: ...
    @property
    def exchange(self) -> str: ...
    @property
    def route(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def num_heads(self) -> int | None: ...
    @property
    def num_kv_heads(self) -> int | None: ...
    @property
    def hierarchical_sizes(self) -> Span: ...
    @property
    def all_to_all_size(self) -> int: ...
    @property
    def latent(self) -> Span | None: ...

    def rounds(self, rank: int) -> tuple[Round, ...]: ...
    def heads(self, rank: int) -> HeadExchange | None: ...
    def pairs(self, rank: int) -> int: ...
    def kv_tokens_received(self, rank: int) -> int: ...


class RankSummary(NamedTuple):
    """One rank's share: pairs that it computes, keys that it receives in forward, its heads.

    ``heads`` is formatted; it is empty if heads are not exchanged.
    """

    rank: int
    pairs: int
    keys_received: int
    heads: str


@dataclass(frozen=True)
class Summary:
    """The shares of all ranks."""

    ranks: tuple[RankSummary, ...]

    @classmethod
    def of(cls, schedule: DrawableSchedule) -> Summary:
        """Counts over the rounds of a schedule."""
        pairs, keys = schedule.pairs, schedule.kv_tokens_received
        ranks = range(schedule.layout.cp_size)
        return cls(tuple(RankSummary(r, pairs(r), keys(r), heads_of(schedule, r)) for r in ranks))

    @cached_property
    def mean_pairs(self) -> float:
        """The mean number of pairs; never 0, because each position attends itself."""
        return sum(row.pairs for row in self.ranks) / len(self.ranks)

    @property
    def busiest(self) -> float:
        """Pairs of the busiest rank divided by the mean; 1 is perfect balance."""
        return max(row.pairs for row in self.ranks) / self.mean_pairs

    @property
    def keys_received(self) -> int:
        """Key positions that all ranks together receive."""
        return sum(row.keys_received for row in self.ranks)


def heads_of(schedule: DrawableSchedule, rank: int) -> str:
    """Formats the heads of ``rank``, e.g. ``q 4-7, kv 1``; empty if it computes all heads."""
    x = schedule.heads(rank)
    return f"q {numbers(x.query_heads[x.index])}, kv {numbers(x.kv_heads[x.index])}" if x else ""


def numbers(span: Span) -> str:
    """Formats ``(4, 8)`` as ``4-7`` and ``(4, 5)`` as ``4``."""
    start, stop = span
    return f"{start}-{stop - 1}" if stop - start > 1 else str(start)


def many(spans: Sequence[Span], shown: int = 4) -> str:
    """Formats spans as ``0-3, 8, 10-11``, without the middle of a long list."""
    words = [numbers(span) for span in spans]
    if len(words) > shown + 1:
        words[shown - 1 : -1] = [f"... {len(words) - shown} more ..."]
    return ", ".join(words)


def mask_in_words(mask: Mask) -> str:
    """E.g. ``documents: 12 of 5 to 3,000 tokens, window 127 left``."""
    words: str = mask.kind
    if mask.kind == "documents":
        short, long = min(mask.lengths), max(mask.lengths)
        count = f"{len(mask.lengths):,} of {short:,} to {long:,} tokens"
        words = f"documents: {count}{'' if mask.is_causal else ', both directions'}"
    left, right = mask.window
    sides = [f"{left:,} left"] if left >= 0 else []
    sides += [f"{right:,} right"] if right >= 0 and not mask.is_causal else []
    return f"{words}, window {' '.join(sides)}" if sides else words


def exchange_in_words(schedule: DrawableSchedule) -> str:
    """E.g. ``p2p over the ring``, ``a2a among 4, p2p over the ring between 2 groups``."""
    what = "" if schedule.latent is None else " of latents"
    all_to_all_size, groups = schedule.hierarchical_sizes
    way = "over the ring" if schedule.route == "ring" else "straight from the owner"
    if schedule.exchange not in ("p2p", "a2a+p2p"):
        return f"{schedule.exchange}{what}"
    if all_to_all_size == 1:
        return f"p2p{what} {way}"
    between = f", p2p {way} between {groups} groups" if groups > 1 else ""
    return f"a2a among {all_to_all_size}{between}"
