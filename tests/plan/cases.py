"""Random masks, layouts and schedules, including one-token documents and very wide windows."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cp_megatron.plan import Mask, Schedule, SequenceLayout
from cp_megatron.plan.exchange import EXCHANGES, ROUTES
from cp_megatron.plan.layout import KINDS, sequence_divisor
from cp_megatron.plan.mask import Window


def property_settings(max_examples: int) -> settings:
    """Runs the same examples on every run and machine, without a deadline."""
    return settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@st.composite
def masks(draw: st.DrawFn, seq_len: int) -> Mask:
    """Any mask over ``seq_len`` positions."""
    window = draw(st.none() | windows(seq_len))
    kind = draw(st.sampled_from(["causal", "full", "documents", "documents"]))
    if kind == "causal":
        return Mask.causal(seq_len, window)
    if kind == "full":
        return Mask.full(seq_len, window)
    return Mask.documents(draw(lengths(seq_len)), draw(st.booleans()), window)


def windows(seq_len: int) -> st.SearchStrategy[Window]:
    """(left, right), each from -1 (unlimited) to more than the row."""
    side = st.just(-1) | st.integers(0, 4) | st.integers(0, seq_len + 2)
    return st.tuples(side, side)


@st.composite
def lengths(draw: st.DrawFn, seq_len: int) -> list[int]:
    """Document lengths that add up to ``seq_len``; many of them are 1."""
    longest = draw(st.sampled_from([1, 2, 7, seq_len]))
    found: list[int] = []
    while (left := seq_len - sum(found)) > 0:
        found.append(draw(st.integers(1, min(longest, left))))
    return found


@st.composite
def heads(draw: st.DrawFn, all_to_all_size: int) -> tuple[int, int]:
    """Query heads that ``all_to_all_size`` ranks can share, and any key/value heads for them."""
    num_heads = all_to_all_size * draw(st.integers(1, 6))
    return num_heads, draw(st.sampled_from([n for n in range(1, 13) if num_heads % n == 0]))


@st.composite
def schedules(
    draw: st.DrawFn,
    exchanges: tuple[str, ...] = ("p2p",),
    kinds: tuple[str, ...] = KINDS,
    min_cp: int = 1,
    max_cp: int = 8,
    max_width: int = 5,
) -> Schedule:
    """A schedule of a short row on ``min_cp`` to ``max_cp`` ranks."""
    cp_size = draw(st.integers(min_cp, max_cp))
    kind = draw(st.sampled_from(kinds))
    mask = draw(masks(sequence_divisor(kind, cp_size) * draw(st.integers(1, max_width))))
    layout = SequenceLayout.make(mask, cp_size, kind)
    exchange, route = draw(st.sampled_from(exchanges)), draw(st.sampled_from(ROUTES))
    if exchange in ("p2p", "all_gather"):
        return Schedule.build(mask, layout, exchange, route)
    divisors = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
    all_to_all_size = cp_size if exchange == "a2a" else draw(st.sampled_from(divisors))
    num_heads, num_kv_heads = draw(heads(all_to_all_size))
    sizes = (all_to_all_size, cp_size // all_to_all_size) if exchange == "a2a+p2p" else None
    return Schedule.build(mask, layout, exchange, route, num_heads, num_kv_heads, sizes)


def any_schedules(max_cp: int = 8) -> st.SearchStrategy[Schedule]:
    """Like ``schedules``, under every exchange."""
    return schedules((*EXCHANGES, "a2a+p2p"), max_cp=max_cp)


def large_schedules() -> list[Schedule]:
    """Schedules of up to 64 ranks: every route and layout, and every kind of mask in turn."""
    found = []
    for number, cp_size in enumerate((64, 33, 24, 16)):
        seq_len = 2 * cp_size * (2 if cp_size == 64 else 3)
        short = [1, 5, 2, 9, 1, 1, 30] * 10
        packed = [n for i, n in enumerate(short) if sum(short[: i + 1]) <= seq_len]
        packed.append(seq_len - sum(packed))
        mask = (
            Mask.causal(seq_len),
            Mask.documents([n for n in packed if n]),
            Mask.full(seq_len, window=(17, 5)),
            Mask.documents([n for n in packed if n], causal=False, window=(-1, 4)),
        )[number]
        kind = KINDS[(number + 1) % len(KINDS)]
        layout = SequenceLayout.make(mask, cp_size, kind)
        found += [Schedule.build(mask, layout, route=route) for route in ROUTES]
    return found
