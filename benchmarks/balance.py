"""How evenly are packed documents balanced, how many keys does that send, how fast is it planned?

Rows consist of documents with log-normal lengths (median 3,000 tokens, sigma 1.5, the last one cut
to fill the row) and have 16K tokens per rank. Everything is counted from the layouts; no attention
is computed. Prints one JSON line per result, with the hardware:

- ``layout``: for zigzag, the balanced layout, and ``pairs_only`` (4 chunks per rank, dealt by pairs
  alone, longest first): the pairs of the busiest rank over the mean, summed over rows and on the
  worst row; the keys that all ranks together receive, over those that zigzag receives, by route;
- ``trade_off``: the same figures of the balanced layout for tolerances from 0.5% to 30%;
- ``planning``: milliseconds to make the layout and one rank's schedule, as for every batch, for a
  row of 1M tokens with 1,000 documents on 64 ranks.

    python benchmarks/balance.py                     # 20 rows on 8, 16, 32 and 64 ranks, a minute
    python benchmarks/balance.py --quick             # seconds
"""

from __future__ import annotations

import heapq
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from harness.teams import hardware

from cp_megatron.config.words import read_options
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.balance.balanced import deal
from cp_megatron.plan.readers import Readers

MEDIAN, SIGMA = 3000, 1.5
TOKENS_PER_RANK = 16384
ROUTES = ("direct", "ring")
MILLION = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Balance and keys of layouts for packed documents, and the time to plan them."""

    ranks: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of ranks."""
    rows: int = 20
    """Rows per number of ranks, drawn with the seeds 0, 1, ..."""
    tolerances: tuple[float, ...] = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
    """Balance tolerances to compare, as shares of the mean."""
    repeats: int = 20
    """How often the planning is measured."""
    quick: bool = False
    """Use two rows on eight ranks, which show that the script runs."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A mask, the pairs of all positions before each one, and the keys that zigzag receives."""

    mask: Mask
    pairs_before: np.ndarray
    zigzag: Mapping[str, int]


# ---- rows and layouts ----------------------------------------------------------------------------


def log_normal_row(cp_size: int, seed: int) -> Row:
    """Draws documents until the row is full."""
    rng, left = np.random.default_rng(seed), TOKENS_PER_RANK * cp_size
    lengths = []
    while left:
        lengths.append(min(left, max(1, int(rng.lognormal(np.log(MEDIAN), SIGMA)))))
        left -= lengths[-1]
    mask = Mask.documents(lengths)
    first, end = mask.key_range(np.arange(mask.seq_len))
    return Row(
        mask=mask,
        pairs_before=np.concatenate([[0], np.cumsum(end - first)]),
        zigzag=keys(mask, SequenceLayout.make(mask, cp_size, "zigzag")),
    )


def keys(mask: Mask, layout: SequenceLayout) -> dict[str, int]:
    """Key positions that all ranks together receive, by route."""
    readers = Readers.of(mask, layout)
    return {route: readers.tokens_received(route) for route in ROUTES}


def pairs_only(row: Row, cp_size: int) -> SequenceLayout:
    """Gives 4 chunks to each rank, the heaviest first, to the lightest rank that has fewer."""
    edges = np.arange(4 * cp_size + 1) * (row.mask.seq_len // (4 * cp_size))
    weight = np.diff(row.pairs_before[edges])
    ranks: list[list[int]] = [[] for _ in range(cp_size)]
    loads = [(0, rank) for rank in range(cp_size)]
    for chunk in np.argsort(-weight, kind="stable").tolist():
        load, rank = heapq.heappop(loads)
        ranks[rank].append(chunk)
        if len(ranks[rank]) < 4:
            heapq.heappush(loads, (load + int(weight[chunk]), rank))
    cuts = edges.tolist()
    chunks = tuple(tuple((cuts[c], cuts[c + 1]) for c in sorted(mine)) for mine in ranks)
    return SequenceLayout(chunks, "pairs_only")


def balanced(row: Row, cp_size: int, tolerance: float) -> SequenceLayout:
    return SequenceLayout(deal(row.mask, cp_size, tolerance), "balanced")


# ---- results -------------------------------------------------------------------------------------


def figures(rows: Sequence[Row], layouts: Sequence[SequenceLayout]) -> dict[str, object]:
    """Balance and keys, summed over all rows."""
    busiest, mean = [], []
    for row, layout in zip(rows, layouts, strict=True):
        before = row.pairs_before
        pairs = [sum(int(before[b] - before[a]) for a, b in mine) for mine in layout.chunks]
        busiest.append(max(pairs))
        mean.append(sum(pairs) / len(pairs))
    moved = [keys(row.mask, layout) for row, layout in zip(rows, layouts, strict=True)]
    over = {
        route: round(sum(m[route] for m in moved) / sum(row.zigzag[route] for row in rows), 4)
        for route in ROUTES
    }
    return {
        "busiest_over_mean": round(sum(busiest) / sum(mean), 4),
        "worst_row": round(max(b / m for b, m in zip(busiest, mean, strict=True)), 4),
        "keys_over_zigzag": over,
    }


def layout_results(
    rows: Sequence[Row], cp_size: int, tolerances: Sequence[float]
) -> Iterator[dict[str, object]]:
    """The results for one number of ranks."""
    layouts: dict[str, Callable[[Row], SequenceLayout]] = {
        "zigzag": lambda row: SequenceLayout.make(row.mask, cp_size, "zigzag"),
        "balanced": lambda row: SequenceLayout.make(row.mask, cp_size, "balanced"),
        "pairs_only": lambda row: pairs_only(row, cp_size),
    }
    for name, make in layouts.items():
        yield {"result": "layout", "layout": name, **figures(rows, [make(row) for row in rows])}
    for tolerance in tolerances:
        dealt = [balanced(row, cp_size, tolerance) for row in rows]
        yield {"result": "trade_off", "tolerance": tolerance, **figures(rows, dealt)}


def million_token_rows() -> dict[str, list[int]]:
    """Lengths of 1,000 documents: cut at random, and log-normal."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, MILLION), 999, replace=False))
    drawn = rng.lognormal(0, SIGMA, 1000)
    edges = np.round(np.cumsum(drawn) / drawn.sum() * (MILLION - 1000)).astype(int)
    return {
        "cut_at_random": np.diff([0, *cuts, MILLION]).tolist(),
        "log_normal": (np.diff([0, *edges]) + 1).tolist(),
    }


def planning_result(lengths: list[int], repeats: int) -> dict[str, object]:
    """Median wall times of the layout, of one rank's schedule, and of both."""
    layout_ms, schedule_ms = [], []
    for repeat in range(repeats):
        mask = Mask.documents(lengths)
        start = time.perf_counter()
        layout = SequenceLayout.make(mask, 64, "balanced")
        middle = time.perf_counter()
        Schedule.build(mask, layout, route="direct").rounds(repeat % 64)
        layout_ms.append((middle - start) * 1e3)
        schedule_ms.append((time.perf_counter() - middle) * 1e3)
    total = [a + b for a, b in zip(layout_ms, schedule_ms, strict=True)]
    named = {"layout_ms": layout_ms, "schedule_ms": schedule_ms, "total_ms": total}
    return {name: round(statistics.median(values), 2) for name, values in named.items()}


def results(arguments: Arguments) -> Iterator[dict[str, object]]:
    quick = arguments.quick
    for cp_size in (8,) if quick else arguments.ranks:
        rows = [log_normal_row(cp_size, seed) for seed in range(2 if quick else arguments.rows)]
        tolerances = (0.03, 0.3) if quick else arguments.tolerances
        for result in layout_results(rows, cp_size, tolerances):
            yield {"ranks": cp_size, "rows": len(rows), **result}
    for name, lengths in million_token_rows().items():
        times = planning_result(lengths, 2 if quick else arguments.repeats)
        yield {"ranks": 64, "result": "planning", "documents": name, **times}


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    machine = hardware()
    for result in results(arguments):
        print(json.dumps({"benchmark": "balance", **result, "hardware": machine}), flush=True)


if __name__ == "__main__":
    main()
