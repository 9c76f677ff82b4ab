"""Which layers each chunk of a pipelined model has: split by weight, or as Megatron's layout says.

Chunks are runs of neighbouring layers; ``pipeline.py`` says how stages share them. The embedding is
in the first chunk, the last norm, the head and the loss are in the last one.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

from cp_megatron.errors import ConfigError

LAYOUT, SIZE = "--pipeline-model-parallel-layout", "--pipeline-parallel-size"
CHUNKS = "--num-virtual-stages-per-pipeline-rank"
_LETTERS = "E, t and L, | between chunks, (...)*n and t*n to repeat, and commas"
_MOST_LETTERS = 100_000


class Chunk(NamedTuple):
    """A run of layers that one stage computes, and whether the ends of the model belong to it."""

    layers: range
    has_embedding: bool
    has_head: bool


@dataclass(frozen=True)
class Stages:
    """The layers of each chunk of the model.

    Attributes:
        ranges: of the chunks, in order. Together they are all layers; only the first chunk and the
            last one may have none.
        num_stages: the stages that share the chunks; chunk n belongs to stage n % num_stages.
    """

    ranges: tuple[range, ...]
    num_stages: int

    def __post_init__(self) -> None:
        assert self.ranges
        assert len(self.ranges) % self.num_stages == 0
        assert self.ranges[0].start == 0
        assert all(one.stop == following.start for one, following in pairwise(self.ranges))
        assert all(self.ranges[1:-1]), "a chunk in the middle has no layer"

    @property
    def num_chunks(self) -> int:
        """Chunks of each stage."""
        return len(self.ranges) // self.num_stages

    def of(self, stage: int) -> tuple[Chunk, ...]:
        """The chunks of a stage."""
        last = len(self.ranges) - 1
        numbers = range(stage, len(self.ranges), self.num_stages)
        return tuple(Chunk(self.ranges[n], n == 0, n == last) for n in numbers)

    def stage_of_layer(self, layer: int) -> int:
        """The stage that has a layer, numbered from 0.

        Raises:
            IndexError: the model has no such layer.
        """
        for number, chunk in enumerate(self.ranges):
            if layer in chunk:
                return number % self.num_stages
        raise IndexError(f"there is no layer {layer}, only {self.ranges[-1].stop}")

    @classmethod
    def split(
        cls,
        weights: Sequence[float],
        *,
        first: float,
        last: float,
        num_stages: int,
        num_chunks: int = 1,
    ) -> Stages:
        """Cuts the layers so that the heaviest chunk is as light as possible, then evenly.

        Of all such cuts, the squares of the chunks' weights have the least sum. Among equals, later
        chunks get more layers, because they keep the activations of fewer micro batches. With
        several chunks a stage, layers are then moved one by one between chunks, none of which
        becomes heavier than the heaviest, while that makes the heaviest stage lighter or stages
        more even. No move improves what is returned, but it may not be the best of all.

        Args:
            weights: of the layers, such as their FLOPs; none is negative.
            first: added to the first chunk: the weight of the embedding.
            last: added to the last chunk: the weight of the last norm, the head and the loss.
            num_stages, num_chunks: stages, and chunks of each. Every chunk gets a layer.

        Raises:
            ConfigError: there are fewer layers than chunks.
        """
        total = num_stages * num_chunks
        if len(weights) < total:
            most = len(weights) // num_chunks
            fewer = f"fewer chunks a stage with {CHUNKS}" if num_chunks > 1 else ""
            works = " or ".join(filter(None, (f"at most {most}" if most else "", fewer)))
            rule = f"must leave a layer for each of the {total} chunks of the model"
            raise ConfigError(SIZE, num_stages, f"{rule}, which has {len(weights)} layers", works)
        weigh = _weigher(weights, first, last, total)
        size = len(weights), total
        limit = _least_limit(*size, weigh)
        cuts = _evenest(*size, weigh, limit)
        if num_chunks > 1:
            cuts = _even_stages(cuts, weigh, limit, num_stages)
        return cls(tuple(range(*ends) for ends in pairwise(cuts)), num_stages)

    @classmethod
    def parse(
        cls, layout: str, *, num_layers: int, num_stages: int, num_chunks: int | None
    ) -> Stages:
        """Reads a layout as Megatron-LM writes it (``PipelineParallelLayerLayout``).

        ``E`` is the embedding, ``t`` a layer and ``L`` the loss, with the last norm and the head;
        ``|`` ends a chunk, ``t*3`` and ``(tt|)*3`` repeat, and commas mean nothing. The 7 layers of
        ``Et|(tt|)*3L`` are in 5 chunks, the last of which has the loss alone.

        Args:
            layout: the text.
            num_layers: layers of the model.
            num_stages, num_chunks: stages, and chunks of each; None: as many as the layout has.

        Raises:
            ConfigError: the layout does not follow the rules, or belongs to another model or
                another number of chunks.
        """
        chunks = _unroll(layout).split("|")
        _check_chunks(layout, chunks, num_stages, num_chunks)
        counts = [chunk.count("t") for chunk in chunks]
        if sum(counts) != num_layers:
            rule = f"has {sum(counts)} layers (t), but the model has {num_layers}"
            raise ConfigError(LAYOUT, layout, rule, f"{num_layers} times t")
        cuts = accumulate(counts, initial=0)
        return cls(tuple(range(*ends) for ends in pairwise(cuts)), num_stages)


Weigh = Callable[[int, int, int], int]
"""The weight of a chunk, by its number, its first layer and the end of its layers."""


def _weigher(weights: Sequence[float], first: float, last: float, num_chunks: int) -> Weigh:
    """Weighs chunks in integers, so that sums that are equal compare equal."""
    exact = [Fraction(weight) for weight in (first, last, *weights)]
    unit = math.lcm(*(weight.denominator for weight in exact))
    begin, end, *each = (int(weight * unit) for weight in exact)
    sums = list(accumulate(each, initial=0))

    def weigh(chunk: int, start: int, stop: int) -> int:
        ends = (begin if chunk == 0 else 0) + (end if chunk == num_chunks - 1 else 0)
        return sums[stop] - sums[start] + ends

    return weigh


def _least_limit(num_layers: int, num_chunks: int, weigh: Weigh) -> int:
    """The weight that the heaviest chunk has at least, by bisection: weights are integers."""
    low, high = 0, weigh(0, 0, num_layers) + weigh(num_chunks - 1, 0, num_layers)
    while low < high:
        middle = (low + high) // 2
        fits = _latest_cuts(num_layers, num_chunks, weigh, middle)[-1] == num_layers
        low, high = (low, middle) if fits else (middle + 1, high)
    return low


def _latest_cuts(num_layers: int, num_chunks: int, weigh: Weigh, limit: int) -> list[int]:
    """The latest end of each chunk, from 0 on, if no chunk exceeds the limit or lacks a layer.

    They end before the last layer if no cut keeps the limit.
    """
    cuts = [0]
    for chunk in range(num_chunks):
        start, most = cuts[-1], num_layers - (num_chunks - 1 - chunk)
        stops = range(start + 1, most + 1)
        cuts.append(start + bisect_right(stops, limit, key=partial(weigh, chunk, start)))
        if cuts[-1] == start:
            break
    return cuts


def _earliest_cuts(num_layers: int, num_chunks: int, weigh: Weigh, limit: int) -> list[int]:
    """The earliest end of each chunk, from 0 on, for a limit that a cut keeps."""
    cuts = [num_layers]
    for chunk in range(num_chunks - 1, 0, -1):
        lighter = partial(_negative, weigh, chunk, cuts[-1])
        cuts.append(chunk + bisect_left(range(chunk, cuts[-1]), -limit, key=lighter))
    return [0, *reversed(cuts)]


def _negative(weigh: Weigh, chunk: int, stop: int, start: int) -> int:
    return -weigh(chunk, start, stop)


def _evenest(num_layers: int, num_chunks: int, weigh: Weigh, limit: int) -> list[int]:
    """The ends of the chunks, from 0 on, that make the sum of the squares of their weights least.

    Dynamic programming over the number of chunks and the layers in them, among the cuts whose
    chunks do not exceed the limit.
    """
    shape = num_layers, num_chunks, weigh, limit
    latest, earliest = _latest_cuts(*shape), _earliest_cuts(*shape)
    best, tables = {0: 0}, list[dict[int, int]]()
    for chunk in range(num_chunks):
        longer, chosen = dict[int, int](), dict[int, int]()
        for stop in range(earliest[chunk + 1], latest[chunk + 1] + 1):
            for start in range(min(stop - 1, latest[chunk]), earliest[chunk] - 1, -1):
                if (weight := weigh(chunk, start, stop)) > limit:
                    break
                value = best[start] + weight * weight
                if stop not in longer or value <= longer[stop]:
                    longer[stop], chosen[stop] = value, start
        best = longer
        tables.append(chosen)
    cuts = [num_layers]
    for chosen in reversed(tables):
        cuts.append(chosen[cuts[-1]])
    return cuts[::-1]


def _weights(cuts: Sequence[int], weigh: Weigh) -> list[int]:
    return [weigh(chunk, *ends) for chunk, ends in enumerate(pairwise(cuts))]


def _even_stages(cuts: list[int], weigh: Weigh, limit: int, num_stages: int) -> list[int]:
    """Moves layers between chunks while stages become more even and no chunk exceeds the limit."""

    def unevenness(cuts: Sequence[int]) -> tuple[float, float]:
        chunks = _weights(cuts, weigh)
        if max(chunks) > limit or any(start >= stop for start, stop in pairwise(cuts)):
            return math.inf, math.inf
        stages = [sum(chunks[stage::num_stages]) for stage in range(num_stages)]
        return max(stages), sum(stage * stage for stage in stages)

    best, moved = unevenness(cuts), True
    spans = [(i, j) for i in range(1, len(cuts) - 1) for j in range(i + 1, len(cuts))]
    while moved:
        moved = False
        for i, j in spans:
            for step in (-1, 1):
                # One layer passes from chunk to chunk between i - 1 and j - 1.
                other = [*cuts[:i], *(cut + step for cut in cuts[i:j]), *cuts[j:]]
                if (value := unevenness(other)) < best:
                    best, cuts, moved = value, other, True
    return cuts


def _unroll(layout: str) -> str:
    """The layout without repetitions, parentheses and commas."""
    groups: list[list[str]] = [[]]
    for word in re.findall(r"\*[0-9]{1,9}|.", layout.replace(",", ""), re.DOTALL):
        if word == "m":
            rule = "has m, multi-token prediction, which models do not have here"
            raise ConfigError(LAYOUT, layout, rule, "the layout without m")
        if word == "(":
            groups.append([])
        elif word == ")" and len(groups) > 1:
            inner = "".join(groups.pop())
            groups[-1].append(inner)
        elif word[0] == "*" and len(word) > 1 and groups[-1]:
            count = int(word[1:])
            if len(groups[-1][-1]) * count > _MOST_LETTERS:
                rule = f"repeats more than {_MOST_LETTERS:,} letters"
                raise ConfigError(LAYOUT, layout, rule, "as many t as the model has layers")
            groups[-1][-1] *= count
        elif word in "EtL|":
            groups[-1].append(word)
        elif word in "()*" or len(word) > 1:
            rule = f"has {word} without its other part"
            raise ConfigError(LAYOUT, layout, rule, "t*3 or (tt|)*3")
        else:
            raise ConfigError(LAYOUT, layout, f"has the letter {word!r}", _LETTERS)
    if len(groups) > 1:
        raise ConfigError(LAYOUT, layout, "has ( without its other part", "t*3 or (tt|)*3")
    return "".join(groups[0])


def _check_chunks(
    layout: str, chunks: Sequence[str], num_stages: int, num_chunks: int | None
) -> None:
    """Checks the ends of the model, that no chunk lacks layers, and how many chunks there are."""
    letters = "".join(chunks)
    ends = letters.count("E") == letters.count("L") == 1
    if not (ends and chunks[0].startswith("E") and chunks[-1].endswith("L")):
        rule = "must begin with the one E, the embedding, and end with the one L, the loss"
        raise ConfigError(LAYOUT, layout, rule, "Et*3|t*3L for 6 layers in two chunks")
    if not all(chunks):
        number = list(chunks).index("")
        rule = f"has no layer in chunk {number}, counted from 0"
        raise ConfigError(LAYOUT, layout, rule, "only E or L can be alone in a chunk")
    if len(chunks) % num_stages:
        rule = f"has {len(chunks)} chunks, which the stages of {SIZE} {num_stages} cannot share"
        raise ConfigError(LAYOUT, layout, rule, f"a multiple of {num_stages} chunks")
    found = len(chunks) // num_stages
    if num_chunks not in (None, found):
        rule = f"has {found} chunks for each of {num_stages} stages, not {CHUNKS} {num_chunks}"
        raise ConfigError(LAYOUT, layout, rule, f"{CHUNKS} {found}, or leave it out")
