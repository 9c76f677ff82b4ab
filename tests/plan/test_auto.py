"""``auto`` chooses the exchange that ranks wait for least, as the schedules count bytes."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Rates, Schedule, SequenceLayout
from cp_megatron.plan.exchange import ROUTES, Heads, all_to_all_elements
from tests.plan.cases import any_schedules, heads, property_settings

Sizes = tuple[int, int]


def total(schedule: Schedule, head_dim: int, v_head_dim: int) -> int:
    """Elements that all ranks together receive."""
    ranks = range(schedule.layout.cp_size)
    return sum(schedule.bytes_received(rank, head_dim, 1, v_head_dim) for rank in ranks)


def waits(schedule: Schedule, head_dim: int, v_head_dim: int, flops_per_element: int) -> int:
    """Elements that all ranks receive and that computing does not hide: a ring's messages arrive
    during all of its rounds but one, those of an all-to-all during none."""
    moved = total(schedule, head_dim, v_head_dim)
    inner, rounds = schedule.hierarchical_sizes or (1, schedule.layout.cp_size)
    if inner == schedule.layout.cp_size or schedule.num_heads is None:
        return moved
    counted = Heads(
        num_heads=schedule.num_heads,
        num_kv_heads=schedule.num_kv_heads or schedule.num_heads,
        head_dim=head_dim,
        v_head_dim=v_head_dim,
    )
    first = all_to_all_elements(schedule.layout, counted, inner) if inner > 1 else 0
    flops = 2 * schedule.mask.pairs() * schedule.num_heads * (head_dim + v_head_dim)
    hidden = flops * (rounds - 1) // rounds // flops_per_element
    return first + max(0, moved - first - hidden)


@given(any_schedules(max_cp=8), st.data())
@property_settings(60)
def test_auto_waits_for_the_fewest_bytes(other: Schedule, data: st.DataObject) -> None:
    mask, layout = other.mask, other.layout
    size = layout.cp_size
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    all_to_all_size = data.draw(st.sampled_from(divisors))
    sizes = data.draw(st.none() | st.just((all_to_all_size, size // all_to_all_size)))
    num_heads, num_kv = data.draw(heads(data.draw(st.sampled_from([1, all_to_all_size, size]))))
    widths = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    route = data.draw(st.sampled_from(["auto", *ROUTES]))
    flops = data.draw(st.sampled_from([1, 30, 16_000]))

    def build(exchange: str, way: str, sizes: Sizes | None = None) -> Schedule:
        return Schedule.build(
            mask, layout, exchange, way, num_heads, num_kv, sizes,
            head_dim=widths[0], v_head_dim=widths[1], rates=Rates(2, flops / 1000),
        )  # fmt: skip

    ways = ROUTES if route == "auto" else (route,)
    candidates = [build("p2p", way) for way in ways]
    if num_heads % (sizes[0] if sizes else size) == 0:
        name = "a2a+p2p" if sizes else "a2a"
        candidates += [build(name, way, sizes) for way in ways]
    costs = [(waits(c, *widths, flops), total(c, *widths)) for c in candidates]
    chosen = build("auto", route, sizes)
    assert chosen.exchange in ("p2p", "a2a", "a2a+p2p")
    assert (waits(chosen, *widths, flops), total(chosen, *widths)) == min(costs)
    if costs[0] == min(costs):
        assert chosen.exchange == "p2p", "p2p where equal"
    assert route in ("auto", chosen.route)
    best = total(chosen, *widths)
    for candidate in candidates if best else ():
        if candidate.exchange != chosen.exchange and size > 1:
            least = min(total(c, *widths) for c in candidates if c.exchange == candidate.exchange)
            assert not least or f"{candidate.exchange} {least / best:.2g}x" in chosen.reason
    assert total(build("all_gather", "ring"), *widths) >= total(build("p2p", "direct"), *widths)


@pytest.mark.parametrize(
    ("tokens", "chosen", "reason"),
    [
        (512, "a2a", "moves the fewest bytes, p2p 1.2x"),
        (4096, "p2p", "waits for the fewest bytes, a2a 0.83x"),
        (32768, "p2p", "hides its messages behind computing, a2a 0.83x"),
    ],
)
def test_long_shards_hide_their_messages(tokens: int, chosen: str, reason: str) -> None:
    """8 ranks with 32 query and 8 key heads of 128: a2a moves less, and hides nothing."""
    mask = Mask.causal(tokens)
    layout = SequenceLayout.make(mask, 8, "zigzag")
    schedule = Schedule.build(mask, layout, "auto", "auto", 32, 8, head_dim=128)
    assert (schedule.exchange, schedule.reason) == (chosen, reason)


@pytest.mark.parametrize(
    ("tokens", "kv_heads", "asked", "parts"),
    [
        (65536, 32, None, 4),  # messages take longer than computing
        (65536, 3, None, 2),  # too little for three parts
        (65536, 1, None, 1),
        (262144, 32, None, 1),  # computing hides them
        (4096, 32, None, 1),  # too little to split
        (262144, 32, 8, 8),
    ],
)
def test_messages_that_computing_does_not_hide_are_split(
    tokens: int, kv_heads: int, asked: int | None, parts: int
) -> None:
    mask, num_heads = Mask.causal(tokens), 32 if kv_heads != 3 else 3
    layout = SequenceLayout.make(mask, 8, "zigzag")
    schedule = Schedule.build(
        *(mask, layout, "p2p", "ring", num_heads, kv_heads), head_dim=128, message_parts=asked
    )
    assert schedule.message_parts == parts
    assert schedule.within(Mask.causal(tokens, window=(9, 0))).message_parts == parts
    assert schedule.parts(0)[-1][1] == kv_heads


@pytest.mark.parametrize(
    ("gigabytes", "exchange", "parts"), [(0.02, "p2p", 4), (0.1, "p2p", 1), (5.0, "p2p", 1)]
)
def test_a_slow_link_that_is_stated_splits_messages(
    gigabytes: float, exchange: str, parts: int
) -> None:
    """Two hosts of CPUs: 0.17 TFLOP/s each, 4 key/value heads of 64, 4,096 tokens."""
    mask = Mask.causal(4096)
    layout = SequenceLayout.make(mask, 2, "zigzag")
    rates = Rates(gigabytes, 0.17)
    schedule = Schedule.build(*(mask, layout, "auto", "auto", 8, 4), head_dim=64, rates=rates)
    assert (schedule.exchange, schedule.message_parts) == (exchange, parts)
    usual = Schedule.build(mask, layout, "auto", "auto", 8, 4, head_dim=64)
    assert usual.message_parts == 1


@given(any_schedules(), st.data())
@property_settings(60)
def test_an_all_to_all_costs_what_is_received(other: Schedule, data: st.DataObject) -> None:
    size = other.layout.cp_size
    num_heads, num_kv = data.draw(heads(size))
    schedule = Schedule.build(
        other.mask, other.layout, "a2a", num_heads=num_heads, num_kv_heads=num_kv
    )
    counted = Heads(num_heads=num_heads, num_kv_heads=num_kv, head_dim=3, v_head_dim=5)
    if size > 1:
        assert all_to_all_elements(other.layout, counted, size) == total(schedule, 3, 5)


@pytest.mark.parametrize(
    ("mask", "cp_size", "num_heads", "num_kv", "sizes", "chosen", "reason"),
    [
        (Mask.causal(64), 4, 8, 2, None, ("p2p", (1, 4)), "moves the fewest bytes, a2a 2x"),
        (Mask.causal(64), 4, 8, 8, None, ("a2a", (4, 1)), "moves the fewest bytes, p2p 1.5x"),
        (Mask.causal(64), 16, 32, 8, None, ("a2a", (16, 1)), "moves the fewest bytes, p2p 2x"),
        (Mask.causal(64), 8, 6, 6, None, ("p2p", (1, 8)),
         "moves the fewest bytes, a2a cannot share 6 heads among 8"),
        (Mask.causal(64), 8, 8, 8, (4, 2), ("a2a+p2p", (4, 2)),
         "moves the fewest bytes, p2p 2.3x"),
        (Mask.causal(64), 8, 12, 3, (4, 2), ("p2p", (1, 8)),
         "moves the fewest bytes, a2a+p2p 1.1x"),
        (Mask.documents([8] * 8), 4, 8, 8, None, ("p2p", (1, 4)), "moves nothing, a2a some"),
        (Mask.causal(64), 1, 8, 8, None, ("p2p", (1, 1)), "one rank exchanges nothing"),
    ],
)  # fmt: skip
def test_the_reason_is_given(
    mask: Mask,
    cp_size: int,
    num_heads: int,
    num_kv: int,
    sizes: Sizes | None,
    chosen: tuple[str, Sizes],
    reason: str,
) -> None:
    layout = SequenceLayout.make(mask, cp_size, "zigzag")
    schedule = Schedule.build(mask, layout, "auto", "auto", num_heads, num_kv, sizes, head_dim=16)
    assert (schedule.exchange, schedule.hierarchical_sizes) == chosen
    assert schedule.reason == reason


def test_auto_takes_the_route_on_which_fewer_keys_travel() -> None:
    """With a short window over contiguous shards, a ring would carry keys almost all around."""
    mask = Mask.causal(64, window=(3, 0))
    layout = SequenceLayout.make(mask, 8, "contiguous")
    auto = Schedule.build(mask, layout, route="auto")
    assert auto.route == "direct"
    assert auto.kv_tokens_received(3) == 3
    causal = Mask.causal(64)
    assert Schedule.build(causal, SequenceLayout.make(causal, 8), route="auto").route == "ring"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exchange": "auto"}, "--cp-comm-type auto: needs to know the number of heads"),
        ({"exchange": "a2a"}, "--cp-comm-type a2a: needs to know the number of heads"),
        ({"exchange": "a2a+p2p", "num_heads": 4},
         "--hierarchical-context-parallel-sizes None: a2a+p2p needs two sizes (works: 2 2)"),
        ({"exchange": "a2a+p2p", "num_heads": 4, "hierarchical_sizes": (3, 2)},
         "3 2: must be two sizes whose product is --context-parallel-size 4 (works: 2 2)"),
        ({"exchange": "auto", "num_heads": 4, "hierarchical_sizes": (4,)},
         "4: must be two sizes whose product is"),
    ],
)  # fmt: skip
def test_missing_heads_are_refused(options: dict[str, object], message: str) -> None:
    mask = Mask.causal(8)
    with pytest.raises(ConfigError, match=re.escape(message)):
        Schedule.build(mask, SequenceLayout.make(mask, 4), **options)  # type: ignore[arg-type]
