"""``auto`` sends latents where that moves fewer bytes, and the schedule counts the bytes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, Schedule, SequenceLayout
from tests.plan.cases import any_schedules, property_settings
from tests.plan.test_auto import total

WIDTHS = st.integers(1, 9)


@given(any_schedules(max_cp=8), st.data())
@property_settings(60)
def test_auto_moves_the_fewest_bytes(other: Schedule, data: st.DataObject) -> None:
    mask, layout, size = other.mask, other.layout, other.layout.cp_size
    heads = data.draw(st.sampled_from([1, 2, 3, 4, size]))
    rotary, plain, value, width = (data.draw(WIDTHS) for _ in range(4))
    latent, dims = (4 * width, rotary), (plain + rotary, value)

    def build(exchange: str, way: str = "auto", **options: Any) -> Schedule:
        return Schedule.build(
            *(mask, layout, exchange, "auto", heads),
            **{"head_dim": dims[0], "v_head_dim": dims[1], **options},
            **({"latent": latent, "exchange_latent": way} if way != "none" else {}),
        )

    expanded, sent = build("p2p", "expanded"), build("p2p", "latent")
    assert (expanded.latent, sent.latent) == (None, latent)
    for rank in range(size):
        tokens = expanded.kv_tokens_received(rank)
        assert expanded.bytes_received(rank, dims[0], 2, dims[1]) == tokens * heads * sum(dims) * 2
        assert sent.bytes_received(rank, dims[0], 2, dims[1]) == tokens * sum(latent) * 2
    candidates = [expanded, sent]
    if heads % size == 0:
        candidates.append(build("a2a"))
        assert candidates[-1].latent is None
    chosen, best = build("auto"), min(total(candidate, *dims) for candidate in candidates)
    assert total(chosen, *dims) == best
    if total(expanded, *dims) == best:
        assert (chosen.exchange, chosen.latent) == ("p2p", None), "expanded once where equal"
    if chosen.latent and size > 1:
        assert f"p2p {total(expanded, *dims) / best:.2g}x" in chosen.reason
    # What one exchange sends does not depend on who chose the exchange.
    assert build(chosen.exchange).latent == chosen.latent
    gathered = build("all_gather")
    assert total(gathered, *dims) == min(
        total(build("all_gather", way), *dims) for way in ("expanded", "latent")
    )
    assert build("auto", "latent").latent == latent
    without = build("auto", "none")
    assert build("auto", "expanded") == without


@pytest.mark.parametrize(
    ("exchange", "options", "message"),
    [
        ("a2a", {"exchange_latent": "latent"}, "latent: contradicts --cp-comm-type a2a"),
        ("p2p", {"exchange_latent": "both"}, "both: is not a way to exchange latents"),
        (
            "p2p",
            {"exchange_latent": "latent", "latent": None},
            "no effect without latent attention",
        ),
        ("p2p", {"latent": (0, 2)}, "0 2: must be positive"),
        ("p2p", {"latent": (4, 8)}, "the second less than the head width 8"),
        ("p2p", {"num_kv_heads": 2}, "a key/value head for each of 4 query heads, not to 2"),
        ("p2p", {"num_heads": None}, "needs to know the number of heads"),
    ],
)
def test_what_cannot_be_sent_is_refused(
    exchange: str, options: dict[str, Any], message: str
) -> None:
    mask = Mask.causal(8)
    given = {"num_heads": 4, "latent": (4, 2), "head_dim": 8, **options}
    with pytest.raises(ConfigError, match=re.escape(message)):
        Schedule.build(mask, SequenceLayout.make(mask, 2), exchange, **given)


def test_reasons_name_what_is_sent() -> None:
    mask = Mask.causal(64)
    layout = SequenceLayout.make(mask, 8, "zigzag")
    widths = {"head_dim": 192, "v_head_dim": 128, "latent": (512, 64)}
    deepseek = Schedule.build(mask, layout, "auto", num_heads=128, **widths)  # type: ignore[arg-type]
    assert deepseek.reason == "moves the fewest bytes, p2p 71x, a2a 24x"
    asked = Schedule.build(mask, layout, "auto", "ring", 128, exchange_latent="latent", **widths)  # type: ignore[arg-type]
    assert asked.reason == "moves the fewest bytes, a2a cannot send latents"
    one = Mask.documents([8] * 8)
    apart = SequenceLayout.make(one, 8, "contiguous")
    nothing = Schedule.build(one, apart, "auto", num_heads=128, **widths)  # type: ignore[arg-type]
    assert nothing.latent is None
    assert nothing.reason == "moves nothing, a2a some"


@pytest.mark.parametrize(("kind", "chunks"), [("contiguous", 1), ("zigzag", 2)])
def test_of_a_window_only_the_keys_of_neighbours_travel(kind: str, chunks: int) -> None:
    """128K tokens on 8 ranks, windows of 128: 127 keys before each chunk, from the rank before."""
    mask = Mask.causal(128 << 10, window=(127, 0))
    layout = SequenceLayout.make(mask, 8, kind)
    schedule = Schedule.build(mask, layout, route="auto")
    for rank in range(8):
        rounds = schedule.rounds(rank)
        owners = {round_.receive_keys.owner for round_ in rounds if round_.receive_keys}
        assert owners <= {rank - 1, rank + 1}
        # The first chunk reads nothing, and both chunks of the last rank are neighbours.
        edges = (rank == 0) + (rank == 7 and chunks == 2)
        assert schedule.kv_tokens_received(rank) == 127 * (chunks - edges)
        assert sum(len(round_.tiles) for round_ in rounds) == 2 * chunks - (rank == 0)
