"""p2p: which keys arrive in which round, and which are forwarded.

In a ring of N ranks, rank r computes its own keys in round 0. In round t it computes the keys of
rank ``r + t``, which it received from rank ``r + 1``. All messages go to lower ranks. While a round
is computed, the keys of the next one are in flight:

    rank 0    own    keys of 1    keys of 2    keys of 3        time ->
    rank 1    own    keys of 2    keys of 3    keys of 0
    rank 2    own    keys of 3    keys of 0    keys of 1
    rank 3    own    keys of 0    keys of 1    keys of 2

**Direction.** Under zigzag, only lower ranks read the late half of a shard. Sent downwards, it
passes exactly those ranks and is dropped at rank 0; sent upwards, it would go around the whole
ring. In general a key is forwarded as long as some rank further down reads it. Under a causal mask
all ranks together receive 0.75 of what a ring of whole shards moves, and far less if documents end
early.

**Gradients** of keys follow their keys downwards: each rank adds its part and passes the sum on.
Once the last reader of a key has added its part, the sum is returned to the key's owner at once.
So a gradient never goes where its key did not, and backward moves as many gradients as forward
moves keys.

All messages of slot t are posted together, before the tiles of round t. Both ends compute the same
list:

    slot t   keys for round t + 1;   gradients finished or passed on by round t - 1

**Parts.** A message may be sent in parts, each with some of the key/value heads. Heads do not
depend on each other, so a part's tiles run as soon as it has arrived, and its gradients leave while
the tiles of the next part run. A step is one part of a round, and a round's parts are computed one
after the other:

    keys     | part 0 ->| part 1 ->|             a message of keys in two parts
    compute  |   own    |  own     |  round 1, part 0  |  round 1, part 1  |
    gradients                                          | part 0 ->         | part 1 ->

With P parts, the slot of a step holds the keys that this part needs P steps later, and the
gradients that the step before has summed. It is waited for before the slot P steps later is
posted. With one part, a step is a round, and its slot is the one above. In backward, a rank's own
keys are computed with half of the heads first and with the others last, so that with two parts each
of these rounds has one step without tiles.

The ``direct`` route differs only in the sender: keys come from their owner, and gradients are
returned to the owner after each round.

Sources: Ring Attention (Liu et al. 2023, arXiv:2310.01889) for the rounds. Sending only needed
keys, downwards, is this project's method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cp_megatron.plan.layout import SequenceLayout
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.readers import Readers
from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.tiling import (
    Span,
    merge_spans,
    num_positions,
    own_tiles,
    pack,
    reading,
    relative_spans,
    remote_tiles,
)


class _Run(NamedTuple):
    """A run of one owner's keys: positions, place in the shard, nearest and farthest reader."""

    start: int
    stop: int
    offset: int
    near: int
    far: int
    row: int


def plan_ring(
    mask: Mask, layout: SequenceLayout, readers: Readers, rank: int, route: str
) -> tuple[Round, ...]:
    """Plans the rounds of ``rank``. Round t computes the keys of rank ``(rank + t) % N``."""
    return _RankPlanner(mask, layout, readers, rank, route == "ring").rounds()


class _RankPlanner:
    """Plans one rank and caches results for each owner of keys."""

    def __init__(
        self, mask: Mask, layout: SequenceLayout, readers: Readers, rank: int, is_ring: bool
    ) -> None:
        self.mask, self.layout, self.readers = mask, layout, readers
        self.rank, self.is_ring = rank, is_ring
        self.size = layout.cp_size
        self.runs: dict[int, list[_Run]] = {}
        self.arrivals: dict[tuple[int, int], list[Span]] = {}

    def rounds(self) -> tuple[Round, ...]:
        shard = pack(self.layout.chunks[self.rank])
        queries = reading(self.mask, shard)
        rounds = []
        for t in range(self.size):
            owner = (self.rank + t) % self.size
            keys = pack(self._positions(owner, t)) if t else shard
            tiles = remote_tiles(self.mask, queries, keys) if t else own_tiles(self.mask, shard)
            rounds.append(
                Round(
                    owner=owner,
                    keys=tuple((run.start, run.stop) for run in keys),
                    tiles=tuple(tiles),
                    send_keys=self.send_keys(t),
                    receive_keys=self.receive_keys(t),
                    **self.gradient_messages(t),
                )
            )
        return tuple(rounds)

    def runs_of(self, owner: int) -> list[_Run]:
        """The runs of ``owner`` that other ranks read."""
        if owner not in self.runs:
            table, (near, far) = self.readers, self.readers.hops
            rows = range(int(table.first[owner]), int(table.first[owner + 1]))
            cut = slice(rows.start, rows.stop)
            columns = (table.start, table.stop, table.offset, near, far)
            found = zip(*(column[cut].tolist() for column in columns), rows)
            self.runs[owner] = [run for run in map(_Run._make, found) if run.far]
        return self.runs[owner]

    def _arrives(self, rank: int, hop: int) -> Callable[[_Run], bool]:
        """Whether a run of the owner ``hop`` places above ``rank`` reaches it."""
        if self.is_ring:
            return lambda run: run.far >= hop
        read = self.readers.read
        return lambda run: bool(read[run.row, rank])

    def arrival(self, rank: int, hop: int) -> list[Span]:
        """Spans, in the shard of the owner ``hop`` ranks above ``rank``, that reach ``rank``."""
        if (rank, hop) not in self.arrivals:
            arrives = self._arrives(rank, hop)
            owner = (rank + hop) % self.size
            self.arrivals[rank, hop] = _spans([run for run in self.runs_of(owner) if arrives(run)])
        return self.arrivals[rank, hop]

    def _positions(self, owner: int, hop: int) -> list[Span]:
        arrives = self._arrives(self.rank, hop)
        return merge_spans([(run.start, run.stop) for run in self.runs_of(owner) if arrives(run)])

    def send_keys(self, t: int) -> Message | None:
        if t + 1 >= self.size:
            return None
        if not self.is_ring:
            peer = (self.rank - t - 1) % self.size
            return _message(peer, self.rank, self.arrival(peer, t + 1))
        peer = (self.rank - 1) % self.size
        spans = self.arrival(peer, t + 1)
        held = [(0, self.layout.shard_len)] if t == 0 else self.arrival(self.rank, t)
        return _message(peer, (self.rank + t) % self.size, relative_spans(spans, held))

    def receive_keys(self, t: int) -> Message | None:
        if t + 1 >= self.size:
            return None
        peer = (self.rank + (1 if self.is_ring else t + 1)) % self.size
        owner, arrival = (self.rank + t + 1) % self.size, self.arrival(self.rank, t + 1)
        return _message(peer, owner, [(0, num_positions(arrival))] if arrival else [])

    def gradient_messages(self, t: int) -> dict[str, Message | None]:
        if t == 0:
            return {}
        me, size = self.rank, self.size
        owner, reader = (me + t) % size, (me - t) % size
        held = self.arrival(me, t)
        if not self.is_ring:
            return {
                "return_grads": _message(owner, owner, relative_spans(held, held)),
                "receive_returned": _message(reader, me, self.arrival(reader, t)),
            }
        below = (me - 1) % size
        messages = {
            "pass_grads": _message(below, owner, relative_spans(self.unfinished(owner, t), held)),
            "return_grads": _message(owner, owner, relative_spans(self.finished(owner, t), held)),
            "receive_returned": _message(reader, me, self.finished(me, t)),
        }
        if t + 1 < size:
            next_owner = (me + t + 1) % size
            passed = relative_spans(self.unfinished(next_owner, t), self.arrival(me, t + 1))
            messages["receive_passed"] = _message((me + 1) % size, next_owner, passed)
        return messages

    def unfinished(self, owner: int, hop: int) -> list[Span]:
        """Keys with a reader up to ``hop`` places below the owner, and another one further down."""
        return _spans([run for run in self.runs_of(owner) if run.near <= hop < run.far])

    def finished(self, owner: int, hop: int) -> list[Span]:
        """Keys whose last reader is ``hop`` places below the owner."""
        return _spans([run for run in self.runs_of(owner) if run.far == hop])


def _spans(runs: list[_Run]) -> list[Span]:
    return merge_spans([(run.offset, run.offset + run.stop - run.start) for run in runs])


def _message(peer: int, owner: int, spans: list[Span]) -> Message | None:
    return Message(peer, owner, tuple(spans)) if spans else None
