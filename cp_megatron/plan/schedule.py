"""The rounds of all ranks: which keys arrive, which tiles run, what is sent on.

A ring of N ranks. In round 0 a rank computes its own keys; in round t it computes the keys of rank
``r + t``, which reached it from ``r + 1``. Everything travels towards lower ranks. While a round
computes, the keys of the next one are under way:

    rank 0    own    keys of 1    keys of 2    keys of 3        time ->
    rank 1    own    keys of 2    keys of 3    keys of 0
    rank 2    own    keys of 3    keys of 0    keys of 1
    rank 3    own    keys of 0    keys of 1    keys of 2

**Why downwards.** Under zigzag the late half of a shard is read by lower ranks only. Sent down, it
passes exactly those and is dropped at rank 0; sent up it would circle the whole ring. In general a
key is passed on while some rank further down the path reads it: all ranks together receive 0.75 of
what a ring of whole shards moves under a causal mask, and far less where documents end the reach.

**Gradients** of keys follow their keys down: each rank adds its part and passes the sum on. Once
the last reader of a key has added its part, the sum goes home to the key's owner at once, so a
gradient never travels where its key did not, and the bytes are the forward's.

Messages of slot t are posted together, before the tiles of round t; both ends know this from the
same arithmetic:

    slot t   keys for round t + 1;   gradients finished or passed on by round t - 1

The ``direct`` route differs only in who sends: keys come from their owner, gradients go straight
home.

Sources: Ring Attention (Liu et al. 2023, arXiv:2310.01889) for the rounds; needed-only downward
routing is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cp_megatron.errors import ConfigError
from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import IntArray, Mask
from cp_megatron.plan.tiles import Piece, Span, Tile, key_intervals, own_tiles, remote_tiles

EXCHANGES = ("p2p",)
ROUTES = ("ring", "direct")


@dataclass(frozen=True)
class Message:
    """Keys of rank ``owner``, or their gradients, between this rank and ``peer``.

    ``spans`` says where they lie in this rank's buffer: the shard, or the arrival of a round.
    """

    peer: int
    owner: int
    spans: tuple[Span, ...]

    @property
    def num_tokens(self) -> int:
        """Key positions in the message."""
        return sum(stop - start for start, stop in self.spans)


@dataclass(frozen=True, kw_only=True)
class Round:
    """What one rank does in one round. A message that would be empty is None and never sent.

    Attributes:
        owner: whose keys are computed.
        keys: positions of the arrival, as runs, in local order.
        tiles: what is computed; columns count in the arrival.
        send_keys: for the receiver's next round; spans in the own shard (round 0 or ``direct``)
            or in this round's arrival.
        receive_keys: fills the next round's arrival.
        pass_grads: partial key gradients after this round, for rank - 1; spans in this arrival.
        return_grads: finished key gradients after this round, for the owner; spans likewise.
        receive_passed: what rank + 1 passes; spans in the next round's arrival.
        receive_returned: what comes home; spans in the own shard.
    """

    owner: int
    keys: tuple[Span, ...]
    tiles: tuple[Tile, ...]
    send_keys: Message | None = None
    receive_keys: Message | None = None
    pass_grads: Message | None = None
    return_grads: Message | None = None
    receive_passed: Message | None = None
    receive_returned: Message | None = None

    @property
    def num_keys(self) -> int:
        """Length of the arrival."""
        return sum(stop - start for start, stop in self.keys)


@dataclass(frozen=True)
class Schedule:
    """The p2p schedule of a mask on a layout. Each rank's part is computed when asked for."""

    mask: Mask
    layout: SequenceLayout
    exchange: str
    route: str
    num_kv_heads: int | None = None

    @classmethod
    def build(
        cls,
        mask: Mask,
        layout: SequenceLayout,
        exchange: str = "p2p",
        route: str = "ring",
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        hierarchical_sizes: tuple[int, int] | None = None,
    ) -> Schedule:
        """Plans the exchange. ``auto`` is p2p by ring.

        Raises:
            ConfigError: the exchange or route is unknown, or layout and mask differ in length.
        """
        exchange = "p2p" if exchange == "auto" else exchange
        route = "ring" if route == "auto" else route
        if exchange not in EXCHANGES:
            raise ConfigError("--cp-comm-type", exchange, "is no exchange of this version", "p2p")
        if route not in ROUTES:
            raise ConfigError("route", route, "is no route", ", ".join(ROUTES))
        if hierarchical_sizes is not None:
            raise ConfigError("hierarchical sizes", hierarchical_sizes, "p2p has no hierarchy")
        held = layout.shard_len * layout.cp_size
        if held != mask.seq_len:
            raise ConfigError("layout", held, f"must hold the mask's {mask.seq_len} positions")
        return cls(mask, layout, exchange, route, num_kv_heads)

    def rounds(self, rank: int) -> tuple[Round, ...]:
        """What ``rank`` does, in order. Round t computes the keys of rank ``(rank + t) % N``."""
        return _RankPlanner(self, rank).rounds()

    def pairs(self, rank: int) -> int:
        """Attended (query, key) pairs that ``rank`` computes."""
        return sum(tile.pairs for turn in self.rounds(rank) for tile in turn.tiles)

    def kv_tokens_received(self, rank: int) -> int:
        """Key positions ``rank`` receives in forward, those it only passes on included."""
        return sum(turn.receive_keys.num_tokens for turn in self.rounds(rank) if turn.receive_keys)

    def bytes_received(
        self, rank: int, head_dim: int, element_size: int, v_head_dim: int | None = None
    ) -> int:
        """Bytes ``rank`` receives in forward for one batch row.

        Keys and values of a position travel together, ``head_dim + v_head_dim`` elements for each
        of the ``num_kv_heads`` the schedule was built with, or for one head without.
        """
        width = head_dim + (head_dim if v_head_dim is None else v_head_dim)
        return self.kv_tokens_received(rank) * (self.num_kv_heads or 1) * width * element_size

    def plot(self, path: str) -> None:
        """Draws who computes which tile in which round as an SVG file."""
        from cp_megatron.plan.plot import write_svg

        write_svg(self, path)


class _RankPlanner:
    """Plans one rank; holds what is worked out once per owner of keys."""

    def __init__(self, schedule: Schedule, rank: int) -> None:
        self.mask, self.layout = schedule.mask, schedule.layout
        self.is_ring = schedule.route == "ring"
        self.rank = rank
        self.size = schedule.layout.cp_size
        owners = [(chunk, r) for r, chunks in enumerate(self.layout.chunks) for chunk in chunks]
        owners.sort()
        self.chunk_owner = np.asarray([r for _, r in owners], dtype=np.int64)
        starts = np.asarray([start for (start, _), _ in owners], dtype=np.int64)
        stops = np.asarray([stop for (_, stop), _ in owners], dtype=np.int64)
        self.reads = key_intervals(self.mask, starts, stops)
        self.flows: dict[int, _KeyFlow] = {}

    def rounds(self) -> tuple[Round, ...]:
        shard = self.pieces(self.rank, [(0, self.layout.shard_len)])
        tiles = own_tiles(self.mask, shard)
        rounds = []
        for t in range(self.size):
            owner = (self.rank + t) % self.size
            if t:
                keys = self.pieces(owner, self.arrival(self.rank, t))
                tiles = remote_tiles(self.mask, shard, keys)
            else:
                keys = shard
            rounds.append(
                Round(
                    owner=owner,
                    keys=tuple((piece.start, piece.stop) for piece in keys),
                    tiles=tuple(tiles),
                    send_keys=self.send_keys(t),
                    receive_keys=self.receive_keys(t),
                    **self.gradient_messages(t),
                )
            )
        return tuple(rounds)

    def flow(self, owner: int) -> _KeyFlow:
        """Which hops read which keys of ``owner``."""
        if owner not in self.flows:
            self.flows[owner] = _KeyFlow.of(self.layout, owner, self.chunk_owner, self.reads)
        return self.flows[owner]

    def pieces(self, owner: int, spans: list[Span]) -> list[Piece]:
        """The positions behind ``spans`` of the owner's shard, as runs in a packed buffer."""
        pieces: list[Piece] = []
        local = packed = 0
        for start, stop in self.layout.chunks[owner]:
            for a, b in spans:
                low, high = max(a, local), min(b, local + stop - start)
                if low < high:
                    pieces.append(Piece(start + low - local, start + high - local, packed))
                    packed += high - low
            local += stop - start
        return pieces

    def arrival(self, rank: int, hop: int) -> list[Span]:
        """Spans of the owner's shard that reach ``rank``, ``hop`` ranks below the owner."""
        owner = (rank + hop) % self.size
        flow = self.flow(owner)
        return flow.passing(hop) if self.is_ring else flow.read_at(hop)

    def send_keys(self, t: int) -> Message | None:
        if t + 1 >= self.size:
            return None
        if not self.is_ring:
            peer = (self.rank - t - 1) % self.size
            return _message(peer, self.rank, self.arrival(peer, t + 1))
        peer = (self.rank - 1) % self.size
        spans = self.arrival(peer, t + 1)
        held = [(0, self.layout.shard_len)] if t == 0 else self.arrival(self.rank, t)
        return _message(peer, (self.rank + t) % self.size, _relative(spans, held))

    def receive_keys(self, t: int) -> Message | None:
        if t + 1 >= self.size:
            return None
        peer = (self.rank + (1 if self.is_ring else t + 1)) % self.size
        num_tokens = sum(stop - start for start, stop in self.arrival(self.rank, t + 1))
        owner = (self.rank + t + 1) % self.size
        return _message(peer, owner, [(0, num_tokens)] if num_tokens else [])

    def gradient_messages(self, t: int) -> dict[str, Message | None]:
        """The messages that carry key gradients once round ``t`` is computed."""
        if t == 0:
            return {}
        me, size = self.rank, self.size
        owner, reader = (me + t) % size, (me - t) % size
        held = self.arrival(me, t)
        if not self.is_ring:
            return {
                "return_grads": _message(owner, owner, _relative(held, held)),
                "receive_returned": _message(reader, me, self.arrival(reader, t)),
            }
        flow = self.flow(owner)
        messages = {
            "pass_grads": _message((me - 1) % size, owner, _relative(flow.unfinished(t), held)),
            "return_grads": _message(owner, owner, _relative(flow.finished(t), held)),
            "receive_returned": _message(reader, me, self.flow(me).finished(t)),
        }
        if t + 1 < size:
            next_owner = (me + t + 1) % size
            passed = _relative(self.flow(next_owner).unfinished(t), self.arrival(me, t + 1))
            messages["receive_passed"] = _message((me + 1) % size, next_owner, passed)
        return messages


@dataclass(frozen=True)
class _KeyFlow:
    """One owner's shard, cut into runs of keys that the same ranks read.

    Hop h is the rank h places below the owner. Per run: its span in the shard, and which hops
    read it (bool [runs, N], hop 0 never).
    """

    spans: list[Span]
    readers: npt.NDArray[np.bool_]

    @classmethod
    def of(
        cls,
        layout: SequenceLayout,
        owner: int,
        chunk_owner: IntArray,
        reads: tuple[IntArray, IntArray],
    ) -> _KeyFlow:
        size = layout.cp_size
        hop = (owner - chunk_owner) % size
        spans: list[Span] = []
        readers = []
        offset = 0
        for start, stop in layout.chunks[owner]:
            first, end = np.clip(reads[0], start, stop), np.clip(reads[1], start, stop)
            edges = np.unique(np.concatenate([first, end, [start, stop]]))
            for low, high in zip(edges[:-1].tolist(), edges[1:].tolist()):
                reading = np.zeros(size, dtype=np.bool_)
                reading[hop[(first <= low) & (end >= high)]] = True
                reading[0] = False
                spans.append((offset + low - start, offset + high - start))
                readers.append(reading)
            offset += stop - start
        return cls(spans, np.stack(readers))

    def _select(self, chosen: npt.ArrayLike) -> list[Span]:
        """The spans of the chosen runs, bool [runs]."""
        return _merge([span for span, take in zip(self.spans, np.asarray(chosen)) if take])

    def passing(self, hop: int) -> list[Span]:
        """Keys that some rank ``hop`` or more below the owner reads."""
        return self._select(self.readers[:, hop:].any(axis=1))

    def read_at(self, hop: int) -> list[Span]:
        """Keys that the rank ``hop`` below reads."""
        return self._select(self.readers[:, hop])

    def unfinished(self, hop: int) -> list[Span]:
        """Keys with a reader up to ``hop`` and another below it."""
        before = self.readers[:, : hop + 1].any(axis=1)
        return self._select(before & self.readers[:, hop + 1 :].any(axis=1))

    def finished(self, hop: int) -> list[Span]:
        """Keys whose last reader is at ``hop``."""
        return self._select(self.readers[:, hop] & ~self.readers[:, hop + 1 :].any(axis=1))


def _message(peer: int, owner: int, spans: list[Span]) -> Message | None:
    return Message(peer, owner, tuple(spans)) if spans else None


def _merge(spans: list[Span]) -> list[Span]:
    """Joins spans that meet; ``spans`` ascend."""
    merged: list[Span] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _relative(spans: list[Span], held: list[Span]) -> list[Span]:
    """Where ``spans`` lie in a buffer that holds ``held`` one after the other.

    Each span lies inside one of the held ones, because held spans are merged.
    """
    placed = []
    offset = 0
    for start, stop in held:
        inside = [span for span in spans if start <= span[0] and span[1] <= stop]
        placed += [(offset + a - start, offset + b - start) for a, b in inside]
        offset += stop - start
    return _merge(placed)
