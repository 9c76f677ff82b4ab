"""Every exchange equals the dense reference: masks, layouts, heads, widths and group sizes.

The default run takes every mask on every layout, with kinds of heads and widths in turn. The slow
one takes the whole product, with both kernels.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from cp_megatron.context_parallel import ContextParallel, all_gather
from cp_megatron.kernels.dropout import Dropout
from cp_megatron.plan import Mask, buffer_sizes
from tests.context_parallel.test_attention import BOUNDS, MASKS, errors
from tests.kernels.rounding import RoundingKernel
from tests.oracles import attention_inputs, dense_gradients, relative_error
from tests.ranks import run_ranks

LAYOUTS = ("contiguous", "zigzag", "balanced")
DIMS = ((8, 8), (24, 8), (8, 24))
HEADS = {"mha": (24, 24), "gqa": (24, 6), "mqa": (24, 1), "odd": (24, 8)}
SIZES = {2: (2, 1), 3: (1, 3), 4: (2, 2), 8: (4, 2)}
EXCHANGES = ("p2p", "direct", "all_gather", "a2a", "a2a+p2p", "auto")


class Case(NamedTuple):
    mask: Mask
    heads: tuple[int, int]
    dims: tuple[int, int]
    dtype: torch.dtype
    options: dict[str, Any]


def options_of(exchange: str, world_size: int) -> dict[str, Any]:
    if exchange == "direct":
        return {"exchange": "p2p", "route": "direct"}
    if exchange == "a2a+p2p":
        return {"exchange": exchange, "hierarchical_sizes": SIZES[world_size]}
    return {"exchange": exchange}


def some_cases(exchange: str, world_size: int) -> list[Case]:
    """Every mask on every layout, with heads, widths and types in turn."""
    kinds = list(product(HEADS.values(), DIMS, BOUNDS))
    found = []
    for number, (mask, layout) in enumerate(product(MASKS.values(), LAYOUTS)):
        heads, dims, dtype = kinds[number * 7 % len(kinds)]
        options = {"layout": layout, "kernel": "cpu", **options_of(exchange, world_size)}
        found.append(Case(mask, heads, dims, dtype, options))
    return found


def all_cases(exchange: str, world_size: int) -> list[Case]:
    return [
        Case(mask, heads, dims, dtype, {"layout": layout, "kernel": kernel, **options})
        for mask, layout, heads, dims, dtype, kernel in product(
            MASKS.values(), LAYOUTS, HEADS.values(), DIMS, BOUNDS, ("cpu", "reference")
        )
        for options in [options_of(exchange, world_size)]
    ]


def many_errors(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, float]]:
    """The relative errors of this rank, case by case."""
    return [errors(rank, world_size, *case) for case in cases]


def check(cases: list[Case], world_size: int, timeout: float = 60) -> None:
    for results in run_ranks(many_errors, world_size, cases, timeout=timeout):
        for case, result in zip(cases, results, strict=True):
            assert max(result.values()) < BOUNDS[case.dtype], (case, result)


@pytest.mark.parametrize(
    ("exchange", "world_size"),
    [
        pytest.param(exchange, size, marks=pytest.mark.slow if is_slow else ())
        for exchange in EXCHANGES
        for size in SIZES
        for is_slow in [size > 4 or (size < 4 and exchange not in ("p2p", "a2a"))]
    ],
)
def test_equals_dense_attention(exchange: str, world_size: int) -> None:
    check(some_cases(exchange, world_size), world_size)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world_size", SIZES)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_equals_dense_attention_whole_product(exchange: str, world_size: int) -> None:
    check(all_cases(exchange, world_size), world_size, timeout=1500)


@pytest.mark.parametrize("dim", [1, 5, 40, 128, 256])
def test_widths_of_heads(dim: int) -> None:
    options = {"kernel": "cpu"}
    mask = MASKS["documents"]
    check([Case(mask, (4, 2), (dim, dim), dtype, options) for dtype in BOUNDS], 2)


def test_heads_that_do_not_meet_their_keys_evenly() -> None:
    """12 query heads over 3 kv heads on 2 ranks: kv head 1 is read by both, unevenly by each."""
    for world_size, heads in ((2, (12, 3)), (2, (6, 3)), (4, (12, 3)), (8, (24, 3)), (3, (6, 2))):
        cases = [
            Case(MASKS["documents"], heads, (8, 8), torch.float64, {"exchange": "a2a"}),
            Case(MASKS["causal"], heads, (8, 16), torch.float64, {"exchange": "a2a"}),
        ]
        check(cases, world_size)


def dropped(
    rank: int, world_size: int, options: dict[str, Any], tokens: int
) -> list[tuple[float, float]]:
    """For each tensor: this rank's error against one rank with the same dropout, and the relative
    change that dropout causes."""
    mask = Mask.documents([tokens // 3, tokens - tokens // 3])
    inputs = attention_inputs(3, 2, tokens, 8, 4, 8, 8)
    dropout = Dropout(probability=0.3, seed=11, batch0=5, head0=8)

    def run(engine: ContextParallel, dropout: Dropout | None) -> list[torch.Tensor]:
        q, k, v, dout = (engine.shard(x, 1) for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = engine.attention(*leaves, dropout=dropout)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    whole = ContextParallel(None, mask)
    sharded = ContextParallel(dist.group.WORLD, mask, **options)
    found, expected, plain = run(sharded, dropout), run(whole, dropout), run(whole, None)
    places = sharded.positions
    return [
        (relative_error(x, y, places), relative_error(z[:, places], y, places))
        for x, y, z in zip(found, expected, plain, strict=True)
    ]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_dropout_drops_the_same_pairs_on_any_number_of_ranks(exchange: str) -> None:
    options = {"layout": "zigzag", **options_of(exchange, 4)}
    for result in run_ranks(dropped, 4, options, 48):
        for error, change in result:
            assert error < 1e-12
            assert change > 0.1


def bfloat16_errors(
    rank: int, world_size: int, exchanges: dict[str, dict[str, Any]], rounding: bool
) -> dict[str, dict[str, tuple[float, float]]]:
    """For each exchange and tensor, this rank's error, and one rank's on the same positions.

    ``rounding``: use a kernel that rounds like those of CUDA. The partial results of the CPU kernel
    are float32.
    """
    mask = Mask.causal(512)
    inputs = [x.to(torch.bfloat16) for x in attention_inputs(7, 2, mask.seq_len, 8, 2, 32, 32)]
    reference = dense_gradients([x.to(torch.float64) for x in inputs], mask)

    def run(engine: ContextParallel) -> list[torch.Tensor]:
        if rounding:
            engine.kernels.load = lambda *_, **__: RoundingKernel()  # type: ignore[method-assign]
        q, k, v, dout = (engine.shard(x, 1) for x in inputs)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = engine.attention(*leaves)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    whole = run(ContextParallel(None, mask))
    found = {}
    for name, options in exchanges.items():
        cp = ContextParallel(dist.group.WORLD, mask, **options)
        alone = [cp.shard(x, 1) for x in whole]
        found[name] = {
            key: tuple(relative_error(x, reference[key], cp.positions) for x in pair)
            for key, *pair in zip(reference, run(cp), alone, strict=True)
        }
    return found


@pytest.mark.parametrize(("rounding", "limit"), [(False, 1.1), (True, 1.5)])
@pytest.mark.parametrize("world_size", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_bfloat16_is_as_exact_as_one_rank(world_size: int, rounding: bool, limit: float) -> None:
    exchanges = {name: options_of(name, world_size) for name in EXCHANGES}
    for results in run_ranks(bfloat16_errors, world_size, exchanges, rounding):
        for exchange, tensors in results.items():
            for name, (error, alone) in tensors.items():
                assert 0 < error < limit * alone, (exchange, name, error, alone)


def in_portions(rank: int, world_size: int, least: int, cases: list[Case]) -> tuple[int, float]:
    """The number of all-gathers of keys, and this rank's worst error."""
    counted = mock.patch.object(all_gather, "start_all_gather", wraps=all_gather.start_all_gather)
    with mock.patch.object(buffer_sizes, "LEAST_PORTION", least), counted as gathers:
        worst = max(max(result.values()) for result in many_errors(rank, world_size, cases))
    return gathers.call_count, worst


@pytest.mark.parametrize(("least", "expected"), [(1, 4), (1 << 30, 1)])
def test_all_gather_in_one_portion_or_in_several(least: int, expected: int) -> None:
    options = {"exchange": "all_gather", "kernel": "cpu", "layout": "balanced"}
    mask = MASKS["documents"]
    cases = [Case(mask, heads, (8, 24), torch.float64, options) for heads in ((8, 8), (12, 6))]
    for count, worst in run_ranks(in_portions, 2, least, cases):
        assert count == len(cases) * 2 * expected, "forward and backward"
        assert worst < 1e-12
