"""States: how the layers that carry a state along a document cross ranks.

A linear recurrence (gated DeltaNet, Mamba-2, ...) reads a document from left to right and keeps a
state S for each head. A *piece* is a maximal run of adjacent positions of one rank. Whatever state
enters a piece, the piece is an affine map of it, the *transition* M and the *increment* U:

    S_out = M S_in + U

The pieces of a document are its *chain*. The first gives U alone, because a document starts without
a state; those in between give M and U; the last only needs S_in. One document, zigzag, two ranks:

    holds     rank 0 |  rank 1  | rank 0
    piece          0 |     1    | 2
    gives          U |    M, U  | -
    needs          - |    S_in  | S_in

Each rank follows the chains of its share of the heads for all ranks:

    1. one all-to-all brings it every M and U of these heads;
    2. it computes S_in of every piece, by the equation above;
    3. a second all-to-all returns each S_in to the rank that holds the piece.

Backward runs the same way through the chains in reverse. A piece that a state enters gives
G = dS_in without what leaves; dS_in = M^T dS_out + G, with the M of forward; the second all-to-all
returns each dS_out. The number of bytes depends neither on the number of tokens nor, beyond a few
ranks, on the number of ranks, and there are always two dependent messages.

A piece may hold several documents. A state enters its first one and leaves its last one, so only a
piece within one document has a transition.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from cp_megatron.errors import ConfigError
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.tiling import Span

Transition = Literal["matrix", "vector", "scalar"]
"""What M is, for a head: [d, d] (delta rule), [d] (GLA), or a number (Mamba-2)."""


class Piece(NamedTuple):
    """A maximal run of adjacent positions of one rank.

    Attributes:
        rank: holds it.
        start, stop: its positions.
        offset: the place of its first token in the rank's shard.
        enters: whether a state enters, because its first document started before.
        leaves: whether a state leaves, because its last document goes on.
        is_through: whether the state that enters leaves it, because it is within one document.
    """

    rank: int
    start: int
    stop: int
    offset: int
    enters: bool
    leaves: bool
    is_through: bool


class StateSize(NamedTuple):
    """Elements of a head's transition and of its state.

    Attributes:
        transition: of M.
        state: of S, U and G: key dim * value dim.
        element: bytes of one of them: float32, or float64 for float64 activations.
    """

    transition: int
    state: int
    element: int = 4

    @classmethod
    def of(
        cls, key_dim: int, value_dim: int, transition: Transition, element: int = 4
    ) -> StateSize:
        """The sizes for heads of these widths."""
        elements = {"matrix": key_dim * key_dim, "vector": key_dim, "scalar": 1}[transition]
        return cls(elements, key_dim * value_dim, element)


@dataclass(frozen=True)
class StatePlan:
    """The pieces of all ranks and the chains that connect them.

    Attributes:
        pieces: in the order of their positions; a piece's number is its place here.
        chains: for each document on several pieces, their numbers in order.
        heads: for each rank, the heads whose chains it follows; empty if ranks outnumber heads.
    """

    pieces: tuple[Piece, ...]
    chains: tuple[tuple[int, ...], ...]
    heads: tuple[Span, ...]

    @classmethod
    def of(cls, mask: Mask, layout: SequenceLayout, num_heads: int) -> StatePlan:
        """Plans a row of documents.

        Args:
            mask: its documents; causal, without a window.
            layout: which rank holds which tokens, of the same length.
            num_heads: heads that have a state, of one tensor parallel rank.

        Raises:
            ConfigError: the mask is not causal or has a window, or the layout has another length.
        """
        if not mask.is_causal:
            rule = "a state is carried from left to right only"
            raise ConfigError("mask", mask.kind, rule, "a causal mask")
        if mask.has_window:
            works = "cp.within(None), the same tokens without a window"
            raise ConfigError("window", mask.window, "a state has no window", works)
        size = layout.cp_size
        if (held := layout.shard_len * size) != mask.seq_len:
            raise ConfigError("layout", held, f"must hold the mask's {mask.seq_len} positions")
        pieces = tuple(_pieces(mask, layout))
        heads = tuple((r * num_heads // size, (r + 1) * num_heads // size) for r in range(size))
        return cls(pieces, tuple(_chains(pieces)), heads)

    @cached_property
    def entering(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, the pieces that a state enters, in order."""
        return self._numbers([piece.enters for piece in self.pieces])

    @cached_property
    def leaving(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, the pieces that a state leaves, in order."""
        return self._numbers([piece.leaves for piece in self.pieces])

    @cached_property
    def through(self) -> tuple[tuple[int, ...], ...]:
        """For each rank, the pieces that have a transition, in order."""
        return self._numbers([piece.is_through for piece in self.pieces])

    def _numbers(self, chosen: list[bool]) -> tuple[tuple[int, ...], ...]:
        found: list[list[int]] = [[] for _ in self.heads]
        for number, (piece, is_chosen) in enumerate(zip(self.pieces, chosen)):
            if is_chosen:
                found[piece.rank].append(number)
        return tuple(map(tuple, found))

    def elements(self, size: StateSize, *, backward: bool) -> tuple[tuple[int, ...], ...]:
        """What travels for a head: for each rank, what it gives and what it gets back.

        Forward gives U of leaving pieces and M of through pieces, and gets S_in of entering ones;
        backward gives G of entering pieces and gets dS_out of leaving ones.
        """
        found = []
        for enters, leaves, through in zip(self.entering, self.leaving, self.through):
            inward, outward = len(enters) * size.state, len(leaves) * size.state
            forward = outward + len(through) * size.transition, inward
            found.append((inward, outward) if backward else forward)
        return tuple(found)

    def num_heads_of(self, rank: int) -> int:
        """The number of heads whose chains ``rank`` follows."""
        start, stop = self.heads[rank]
        return stop - start

    def messages_received(
        self, rank: int, size: StateSize, *, backward: bool = False
    ) -> tuple[int, int]:
        """The bytes that ``rank`` receives for one batch row in each of the two all-to-alls."""
        travels = self.elements(size, backward=backward)
        mine, num_heads = self.num_heads_of(rank), self.heads[-1][1]
        given = sum(given for given, _ in travels) - travels[rank][0]
        returned = (num_heads - mine) * travels[rank][1]
        return mine * given * size.element, returned * size.element

    def bytes_received(self, rank: int, size: StateSize, *, backward: bool = False) -> int:
        """The number of bytes ``rank`` receives for one batch row, in forward or in backward."""
        return sum(self.messages_received(rank, size, backward=backward))

    @property
    def longest_chain(self) -> int:
        """The number of pieces of the longest chain; 0 if no document is on several pieces."""
        return max(map(len, self.chains), default=0)

    @property
    def num_dependent_messages(self) -> int:
        """The number of messages of a pass that wait for each other: 2, or 0 without chains."""
        return 2 if self.chains else 0


def _pieces(mask: Mask, layout: SequenceLayout) -> list[Piece]:
    """All pieces, by position."""
    runs: list[tuple[int, int, int, int]] = []  # start, stop, rank, offset
    for rank, chunks in enumerate(layout.chunks):
        offset, last = 0, -1
        for start, stop in chunks:
            if start == last:
                begun, _, _, place = runs.pop()
                runs.append((begun, stop, rank, place))
            else:
                runs.append((start, stop, rank, offset))
            offset, last = offset + stop - start, stop
    runs.sort()
    edges = np.asarray([(start, stop) for start, stop, _, _ in runs], dtype=np.int64)
    first = np.searchsorted(mask.starts, edges[:, 0], side="right") - 1
    last_document = np.searchsorted(mask.starts, edges[:, 1] - 1, side="right") - 1
    enters = mask.starts[first] < edges[:, 0]
    leaves = mask.starts[last_document + 1] > edges[:, 1]
    through = enters & leaves & (first == last_document)
    flags = zip(enters.tolist(), leaves.tolist(), through.tolist())
    return [
        Piece(rank, start, stop, offset, *flag)
        for (start, stop, rank, offset), flag in zip(runs, flags)
    ]


def _chains(pieces: tuple[Piece, ...]) -> list[tuple[int, ...]]:
    """A state that leaves a piece enters the next one."""
    chains: list[tuple[int, ...]] = []
    current: list[int] = []
    for number, piece in enumerate(pieces):
        if piece.enters:
            current.append(number)
        if not piece.is_through:
            if current:
                chains.append(tuple(current))
            current = [number] if piece.leaves else []
    return chains
