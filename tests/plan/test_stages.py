"""Layers are divided among stages by weight, compared with every way to cut, and by layouts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan.stages import Chunk, Stages
from tests.plan.cases import property_settings


def cuts_of(num_layers: int, num_chunks: int) -> Iterator[tuple[range, ...]]:
    """Every way to cut the layers into chunks that have a layer each."""
    for inner in combinations(range(1, num_layers), num_chunks - 1):
        yield tuple(range(*ends) for ends in pairwise((0, *inner, num_layers)))


def chunk_weights(
    ranges: Sequence[range], weights: Sequence[float], first: float, last: float
) -> list[float]:
    sums = [sum(weights[layer] for layer in chunk) for chunk in ranges]
    sums[0] += first
    sums[-1] += last
    return sums


def stage_sums(chunks: Sequence[float], num_stages: int) -> list[float]:
    return [sum(chunks[stage::num_stages]) for stage in range(num_stages)]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(1, 9),
)
@property_settings(300)
def test_one_chunk_a_stage_is_the_best_of_all_cuts(
    weights: list[int], first: int, last: int, num_stages: int
) -> None:
    num_stages = min(num_stages, len(weights))
    found = Stages.split(weights, first=first, last=last, num_stages=num_stages)

    def rank(ranges: tuple[range, ...]) -> tuple[float, float]:
        chunks = chunk_weights(ranges, weights, first, last)
        return max(chunks), sum(weight**2 for weight in chunks)

    assert rank(found.ranges) == min(map(rank, cuts_of(len(weights), num_stages)))
    # The unit of the weights does not matter, even one in which they are no integers.
    eighths = [weight / 8 for weight in weights]
    again = Stages.split(eighths, first=first / 8, last=last / 8, num_stages=num_stages)
    assert rank(again.ranges) == rank(found.ranges)


@given(
    st.lists(st.integers(1, 4), min_size=4, max_size=10),
    st.integers(0, 3),
    st.integers(0, 6),
    st.sampled_from([(2, 2), (1, 3), (3, 2), (2, 3), (4, 1)]),
)
@property_settings(200)
def test_several_chunks_a_stage(
    weights: list[int], first: int, last: int, shape: tuple[int, int]
) -> None:
    num_stages, num_chunks = shape
    total = num_stages * num_chunks
    weights = [*weights, *[2] * (total - len(weights))]
    found = Stages.split(
        weights, first=first, last=last, num_stages=num_stages, num_chunks=num_chunks
    )
    assert found.num_chunks == num_chunks
    chunks = chunk_weights(found.ranges, weights, first, last)
    heaviest = min(
        max(chunk_weights(ranges, weights, first, last)) for ranges in cuts_of(len(weights), total)
    )
    assert max(chunks) == heaviest
    layers = [layer for chunk in found.ranges for layer in chunk]
    assert layers == list(range(len(weights)))
    assert all(found.ranges)
    for stage in range(num_stages):
        chunks_here = found.of(stage)
        assert [chunk.layers for chunk in chunks_here] == [
            found.ranges[chunk * num_stages + stage] for chunk in range(num_chunks)
        ]
        assert all(found.stage_of_layer(n) == stage for chunk in chunks_here for n in chunk.layers)


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3), (4, 2)])
@pytest.mark.parametrize("num_layers", [8, 9, 10, 11, 12])
@pytest.mark.parametrize("last", [0, 1, 1.5])
def test_layers_that_are_alike_make_stages_even(
    shape: tuple[int, int], num_layers: int, last: float
) -> None:
    num_stages, num_chunks = shape
    weights = [1.0] * num_layers
    found = Stages.split(weights, first=0, last=last, num_stages=num_stages, num_chunks=num_chunks)
    chunks = chunk_weights(found.ranges, weights, 0, last)
    every = [chunk_weights(x, weights, 0, last) for x in cuts_of(num_layers, len(chunks))]
    lightest = min(
        max(stage_sums(other, num_stages)) for other in every if max(other) == max(chunks)
    )
    assert max(stage_sums(chunks, num_stages)) == lightest


def test_splits_literally() -> None:
    def lengths(*args: float, last: float = 0, stages: int, chunks: int = 1) -> list[int]:
        found = Stages.split(args, first=0, last=last, num_stages=stages, num_chunks=chunks)
        return [len(chunk) for chunk in found.ranges]

    assert lengths(*[1] * 8, stages=4) == [2, 2, 2, 2]
    assert lengths(*[1] * 10, stages=4) == [2, 2, 3, 3]
    # The head weighs two layers.
    assert lengths(*[1] * 10, last=2, stages=4) == [3, 3, 3, 1]
    # Three light layers, then one that attends.
    assert lengths(*[1, 1, 1, 5] * 2, stages=2) == [4, 4]
    assert lengths(*[1, 1, 1, 5] * 2, last=5, stages=2) == [6, 2]
    # The least squares would have a chunk of 31, where 30 suffices.
    uneven = [2, 1, 10, 0, 3, 0, 10, 2, 30, 1, 30, 20, 0]
    assert lengths(*uneven, last=5, stages=6) == [3, 5, 1, 1, 1, 2]
    assert lengths(*[1] * 12, stages=4, chunks=2) == [1, 1, 1, 1, 2, 2, 2, 2]
    found = Stages.split([1] * 6, first=0, last=0, num_stages=2, num_chunks=2)
    assert found.of(0) == (Chunk(range(1), True, False), Chunk(range(2, 4), False, False))
    assert found.of(1) == (Chunk(range(1, 2), False, False), Chunk(range(4, 6), False, True))
    assert [found.stage_of_layer(layer) for layer in range(6)] == [0, 1, 0, 0, 1, 1]
    with pytest.raises(IndexError, match="there is no layer 6, only 6"):
        found.stage_of_layer(6)


def test_many_layers_are_split_in_an_instant() -> None:
    began = time.process_time()
    Stages.split([1.0] * 3000, first=0, last=2.5, num_stages=16)
    Stages.split([1.0] * 500, first=0, last=2.5, num_stages=8, num_chunks=4)
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("num_layers", "shape", "line"),
    [
        (3, (4, 1),
         "--pipeline-parallel-size 4: must leave a layer for each of the 4 chunks of the "
         "model, which has 3 layers (works: at most 3)"),
        (7, (4, 2),
         "--pipeline-parallel-size 4: must leave a layer for each of the 8 chunks of the "
         "model, which has 7 layers (works: at most 3 or fewer chunks a stage with "
         "--num-virtual-stages-per-pipeline-rank)"),
        (2, (1, 3),
         "--pipeline-parallel-size 1: must leave a layer for each of the 3 chunks of the "
         "model, which has 2 layers (works: fewer chunks a stage with "
         "--num-virtual-stages-per-pipeline-rank)"),
    ],
)  # fmt: skip
def test_too_few_layers(num_layers: int, shape: tuple[int, int], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stages.split([1] * num_layers, first=0, last=0, num_stages=shape[0], num_chunks=shape[1])
    assert str(caught.value) == line


def test_many_layers_are_split_at_once() -> None:
    found = Stages.split([1.0] * 126, first=0, last=1.4, num_stages=16, num_chunks=4)
    assert {len(chunk) for chunk in found.ranges} <= {1, 2}


@pytest.mark.parametrize(
    ("layout", "stages", "lengths"),
    [
        ("EtttL", 1, [3]),
        ("Ett|ttL", 2, [2, 2]),
        ("E|t|t|L", 4, [0, 1, 1, 0]),
        ("E,t|t,L", 1, [1, 1]),
        ("Et*3|(tt|)*29,L", 31, [3, *[2] * 29, 0]),
        ("Et|(t*2|)*3L", 5, [1, 2, 2, 2, 0]),
        ("E((t|)*2t|)*2L", 7, [1, 1, 1, 1, 1, 1, 0]),
        ("E|(t|t)*2|L", 5, [0, 1, 2, 1, 0]),
        ("Et(tt)|*1t*0tL", 2, [3, 1]),
    ],
)
def test_layouts(layout: str, stages: int, lengths: list[int]) -> None:
    found = Stages.parse(layout, num_layers=sum(lengths), num_stages=stages, num_chunks=None)
    assert [len(chunk) for chunk in found.ranges] == lengths
    assert found.num_chunks == len(lengths) // stages


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        ("Et|xL", "has the letter 'x' (works: E, t and L, | between chunks, (...)*n and t*n to"),
        ("Et| tL", "has the letter ' '"),
        ("et|tL", "has the letter 'e'"),
        ("Et|tmL", "has m, multi-token prediction, which models do not have here (works: the"),
        ("E(t|tL", "has ( without its other part (works: t*3 or (tt|)*3)"),
        ("Et)|tL", "has ) without its other part"),
        ("Et*|tL", "has * without its other part"),
        ("*2Et|tL", "has *2 without its other part"),
        ("E(*2t)|tL", "has *2 without its other part"),
        ("Et*2|tL", "has 3 layers (t), but the model has 2 (works: 2 times t)"),
        ("E(t*99999)*99999|L", "repeats more than 100,000 letters (works: as many t as"),
        ("t|EtL", "must begin with the one E, the embedding, and end with the one L, the loss"),
        ("|Et|t|L", "must begin with the one E"),
        ("Et|Lt", "must begin with the one E"),
        ("Et|tL|", "must begin with the one E"),
        ("Et|t", "must begin with the one E"),
        ("EEt|tL", "must begin with the one E"),
        ("", "must begin with the one E"),
        ("Et||t|L", "has no layer in chunk 1, counted from 0 (works: only E or L can be alone"),
        ("Et|t|L", "has 3 chunks, which the stages of --pipeline-parallel-size 2 cannot "
         "share (works: a multiple of 2 chunks)"),
        ("E|t|t|L", "has 2 chunks for each of 2 stages, not "
         "--num-virtual-stages-per-pipeline-rank 1 (works: "
         "--num-virtual-stages-per-pipeline-rank 2, or leave it out)"),
    ],
)  # fmt: skip
def test_layouts_that_are_refused(layout: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Stages.parse(layout, num_layers=2, num_stages=2, num_chunks=1)
    start = f"--pipeline-model-parallel-layout {layout}".rstrip()
    assert str(caught.value).startswith(f"{start}: {line}")
