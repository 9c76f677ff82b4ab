"""States: pieces, chains, heads and halos of any documents on any layout."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.plan import Mask, SequenceLayout
from cp_megatron.plan.halo import halo_of, plan_halos
from cp_megatron.plan.states import Piece, StatePlan, StateSize
from tests.plan.cases import property_settings

PRIME = 10007
KINDS = ("contiguous", "zigzag", "balanced", "cards")


def layout_of(mask: Mask, size: int, kind: str) -> SequenceLayout:
    """A layout of the project, or tokens dealt to the ranks one by one, like cards."""
    if kind != "cards":
        return SequenceLayout.make(mask, size, kind)
    chunks = tuple(tuple((i, i + 1) for i in range(r, mask.seq_len, size)) for r in range(size))
    return SequenceLayout(chunks, "contiguous")


@st.composite
def rows(draw: st.DrawFn) -> tuple[Mask, SequenceLayout]:
    """Documents of 1 token to whole rows on 1 to 8 ranks."""
    size, kind = draw(st.integers(1, 8)), draw(st.sampled_from(KINDS))
    total = 2 * size * draw(st.integers(1, 12))
    cuts = draw(st.sets(st.integers(1, total - 1), max_size=12))
    edges = [0, *sorted(cuts), total]
    mask = Mask.documents([b - a for a, b in pairwise(edges)])
    return mask, layout_of(mask, size, kind)


def after_every_token(mask: Mask) -> list[int]:
    """The state after each token: S = a S + b modulo a prime, with the token's own a and b."""
    states: list[int] = []
    for position in range(mask.seq_len):
        before = 0 if position in mask.starts else states[-1]
        states.append((factor(position) * before + position + 1) % PRIME)
    return states


def factor(position: int) -> int:
    return position * position % 97 + 2


@given(rows())
@property_settings(80)
def test_chains_give_every_piece_its_state(row: tuple[Mask, SequenceLayout]) -> None:
    """Each piece is scanned by itself; states that enter follow from M and U along the chains."""
    mask, layout = row
    plan, expected = StatePlan.of(mask, layout, 4), after_every_token(mask)
    assert [piece.start for piece in plan.pieces[1:]] == [x.stop for x in plan.pieces[:-1]]
    assert (plan.pieces[0].start, plan.pieces[-1].stop) == (0, mask.seq_len)
    assert all(a.rank != b.rank for a, b in pairwise(plan.pieces))
    entering = dict.fromkeys(range(len(plan.pieces)), 0)
    reached = set()
    for first, *others in plan.chains:
        state, before = scan(mask, plan.pieces[first], 0)[-1], first
        for number in others:
            assert plan.pieces[before].leaves
            assert plan.pieces[number].enters
            entering[number] = state
            reached.add(number)
            if plan.pieces[number].is_through:
                increment = scan(mask, plan.pieces[number], 0)[-1]
                transition = (scan(mask, plan.pieces[number], 1)[-1] - increment) % PRIME
                state = (transition * state + increment) % PRIME
            before = number
    assert reached == {n for n, piece in enumerate(plan.pieces) if piece.enters}
    for number, piece in enumerate(plan.pieces):
        held = layout.positions(piece.rank)[piece.offset :][: piece.stop - piece.start]
        assert held.tolist() == list(range(piece.start, piece.stop))
        assert scan(mask, piece, entering[number]) == expected[piece.start : piece.stop]


def scan(mask: Mask, piece: Piece, state: int) -> list[int]:
    """The states after the tokens of a piece that ``state`` enters."""
    found = []
    for position in range(piece.start, piece.stop):
        before = 0 if position in mask.starts else state
        state = (factor(position) * before + position + 1) % PRIME
        found.append(state)
    return found


@given(rows(), st.integers(1, 5))
@property_settings(80)
def test_every_token_finds_the_tokens_of_its_convolution(
    row: tuple[Mask, SequenceLayout], width: int
) -> None:
    mask, layout = row
    halos = plan_halos(mask, layout, StatePlan.of(mask, layout, 1), width)
    for rank, halo in enumerate(halos):
        sent = [
            layout.positions(source)[other.send[rank]].tolist()
            for source, other in enumerate(halos)
        ]
        assert [len(part) for part in sent] == list(halo.num_received)
        arrived = [position for part in sent for position in part]
        assert arrived == halo.received.tolist()
        mine = set(layout.positions(rank).tolist())
        assert not mine & set(arrived)
        needed = {
            position
            for token in mine
            for position in range(token - width + 1, token)
            if position >= mask.starts[mask.starts <= token].max()
        }
        assert needed - mine == set(arrived)


def test_a_literal_zigzag() -> None:
    """One document on two ranks: rank 1 holds the middle as one piece."""
    mask = Mask.causal(8)
    plan = StatePlan.of(mask, SequenceLayout.make(mask, 2, "zigzag"), 3)
    assert plan.pieces == (
        Piece(0, 0, 2, 0, enters=False, leaves=True, is_through=False),
        Piece(1, 2, 6, 0, enters=True, leaves=True, is_through=True),
        Piece(0, 6, 8, 2, enters=True, leaves=False, is_through=False),
    )
    assert plan.chains == ((0, 1, 2),)
    assert plan.heads == ((0, 1), (1, 3))
    size = StateSize.of(2, 5, "matrix")
    assert size == (4, 10, 4)
    assert plan.elements(size, backward=False) == ((10, 10), (14, 10))
    assert plan.elements(size, backward=True) == ((10, 10), (10, 10))
    # One head of rank 1's U and M, and S_in for the two heads that rank 1 follows.
    assert plan.bytes_received(0, size) == (14 + 2 * 10) * 4
    assert plan.bytes_received(1, size) == (2 * 10 + 10) * 4


def test_a_piece_that_ends_one_document_and_begins_another() -> None:
    mask = Mask.documents([5, 7])
    plan = StatePlan.of(mask, SequenceLayout.make(mask, 3, "contiguous"), 2)
    assert plan.chains == ((0, 1), (1, 2))
    assert [piece.is_through for piece in plan.pieces] == [False, False, False]
    assert plan.heads == ((0, 0), (0, 1), (1, 2))
    assert halo_of(mask, 4, 4) == (1, 4)
    assert halo_of(mask, 5, 4) == (5, 5)


def test_documents_that_stay_on_their_rank_send_nothing() -> None:
    mask = Mask.documents([4, 4])
    plan = StatePlan.of(mask, SequenceLayout.make(mask, 2, "contiguous"), 2)
    assert (plan.chains, plan.longest_chain, plan.num_dependent_messages) == ((), 0, 0)
    assert plan.bytes_received(0, StateSize(1, 1)) == 0


@pytest.mark.parametrize(
    ("layout", "size", "mean"),
    [
        ("zigzag", 2, 2.5),
        ("contiguous", 2, 1.0),
        ("zigzag", 8, 9.0),
        ("contiguous", 8, 4.4),
        ("zigzag", 32, 11.2),
        ("contiguous", 32, 5.6),
        ("zigzag", 64, 11.6),
        ("contiguous", 64, 5.8),
    ],
)
def test_the_bytes_of_qwen3_next(layout: str, size: int, mean: float) -> None:
    """One document of 128K tokens, 32 value heads of 128, MiB that a rank receives in forward."""
    mask = Mask.causal(2**17)
    plan = StatePlan.of(mask, SequenceLayout.make(mask, size, layout), 32)
    head = StateSize.of(128, 128, "matrix")
    received = [plan.bytes_received(rank, head) / 2**20 for rank in range(size)]
    assert sum(received) / size == pytest.approx(mean, abs=0.06)
    # Twice the tokens are as many bytes.
    longer = Mask.causal(2**18)
    doubled = StatePlan.of(longer, SequenceLayout.make(longer, size, layout), 32)
    assert [doubled.bytes_received(rank, head) / 2**20 for rank in range(size)] == received


def test_every_piece_but_the_first_of_a_chain_needs_a_state() -> None:
    """A thousand ranks and 350 documents."""
    mask = Mask.documents([3000] * 349 + [2**20 - 3000 * 349])
    plan = StatePlan.of(mask, SequenceLayout.make(mask, 1024, "balanced"), 32)
    links = sum(len(chain) - 1 for chain in plan.chains)
    assert links > 1024
    assert sum(map(len, plan.entering)) == sum(map(len, plan.leaving)) == links


def test_masks_without_a_direction_are_refused() -> None:
    layout = SequenceLayout.make(Mask.full(8), 2, "contiguous")
    with pytest.raises(ConfigError, match="left to right"):
        StatePlan.of(Mask.full(8), layout, 1)
    with pytest.raises(ConfigError, match="window"):
        StatePlan.of(Mask.causal(8, (3, 0)), layout, 1)
    with pytest.raises(ConfigError, match="positions"):
        StatePlan.of(Mask.causal(6), layout, 1)
