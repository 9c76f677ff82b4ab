"""The memory that attention's messages live in, by arithmetic; no torch, no tensor.

``context_parallel`` keeps named rooms from one attention to the next (context_parallel/buffers.py)
and each grows to the largest message that ever lay in it. Which message lies in which room is said
where it is sent; this page says it again, without the messages, and a test holds the two together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from cp_megatron.plan import Schedule
from cp_megatron.plan.gather import Gather
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.rounds import Message, Round
from cp_megatron.plan.tiles import Span
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.sequence import local_heads

# As in context_parallel/all_gather.py, which imports torch.
MAX_PORTIONS, LEAST_PORTION = 4, 4 << 20


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Sizes of one rank's queries, keys and values.

    Attributes:
        batch, num_tokens: rows, and tokens of each on this rank.
        heads, kv_heads, head_dim: of this rank before any trade.
        element: bytes of an element of the activations.
        exact: bytes of one of the sums.
    """

    batch: int
    num_tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    exact: int


def schedules(plan: RunPlan) -> tuple[Schedule, ...]:
    """One for each window that layers have; none where one rank has the whole row.

    Where documents are masked every batch has its own: these are of a row that is one document.
    """
    sequence, model = plan.sequence, plan.config.model
    if plan.grid.cp == 1:
        return ()
    heads = local_heads(model, plan.grid.tp)
    row = Schedule.build(
        sequence.mask,
        sequence.layout,
        sequence.exchange,
        sequence.route,
        *heads,
        sequence.sizes,
        head_dim=model.head_dim,
    )
    sizes = row.hierarchical_sizes if row.exchange == "a2a+p2p" else None
    windows = [model.layer_window(layer) for layer in range(model.num_layers)]
    masks = {mask.window: mask for mask in map(sequence.mask.within, windows)}
    return tuple(
        row
        if mask.window == sequence.mask.window
        else Schedule.build(mask, row.layout, row.exchange, row.route, *heads, sizes)
        for mask in masks.values()
    )


class Rooms:
    """Bytes of each room, grown by what lies in it."""

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}

    def lay(self, name: str, num_bytes: int) -> None:
        """A message in a room."""
        self._sizes[name] = max(num_bytes, self._sizes.get(name, 0))

    @property
    def num_bytes(self) -> int:
        """Of all rooms."""
        return sum(self._sizes.values())


def lay_forward(rooms: Rooms, schedule: Schedule, rank: int, x: Operands) -> None:
    """What one attention's forward lays in ``rooms`` on a rank of the context parallel group."""
    trade, gather = schedule.heads(rank), schedule.gather(rank)
    if trade:
        q, kv = trade.query_heads, trade.kv_heads
        _to_heads(rooms, trade, x, [q, kv, kv], x.element)
    if gather:
        _lay_gather(rooms, gather, schedule.layout.cp_size, x)
    else:
        _lay_keys(rooms, schedule.rounds(rank), _key_bytes(trade, x, x.element))
    if trade:
        _to_tokens(rooms, trade, x, [trade.query_heads], x.element)


def lay_backward(rooms: Rooms, schedule: Schedule, rank: int, x: Operands) -> None:
    """The same of its backward."""
    trade, gather = schedule.heads(rank), schedule.gather(rank)
    if trade:
        _to_heads(rooms, trade, x, [trade.query_heads], x.element)
    if gather:
        _lay_gather(rooms, gather, schedule.layout.cp_size, x)
        _lay_gathered_gradients(rooms, gather, schedule.layout.cp_size, x)
    else:
        rounds = schedule.rounds(rank)
        _lay_keys(rooms, rounds, _key_bytes(trade, x, x.element))
        _lay_gradients(rooms, rounds, _key_bytes(trade, x, x.exact))
    if trade:
        q, kv = trade.query_heads, trade.kv_heads
        repeated = sum(map(_count, kv)) > kv[-1][1]
        if repeated and x.exact != x.element:
            _to_tokens(rooms, trade, x, [q], x.element)
            _to_tokens(rooms, trade, x, [kv, kv], x.exact)
        else:
            _to_tokens(rooms, trade, x, [q, kv, kv], x.exact if repeated else x.element)


def _key_bytes(trade: HeadExchange | None, x: Operands, element: int) -> Callable[[int], int]:
    """Tokens of a message of keys and values -> its bytes."""
    heads = _count(trade.kv_heads[trade.index]) if trade else x.kv_heads
    return lambda num_tokens: num_tokens * x.batch * heads * 2 * x.head_dim * element


def _lay_keys(rooms: Rooms, rounds: tuple[Round, ...], size: Callable[[int], int]) -> None:
    """Keys of a ring: two arrivals in turn, and what is packed to be sent."""
    filled = 0
    for number, turn in enumerate(rounds):
        sent, received = turn.send_keys, turn.receive_keys
        if sent and sent.owner == rounds[0].owner:
            # In round 0 there is no arrival yet.
            rooms.lay("sent keys" if number else f"keys {1 - filled}", size(sent.num_tokens))
        elif sent and len(sent.spans) > 1:
            rooms.lay("sent keys", size(sent.num_tokens))
        if received:
            rooms.lay(f"keys {filled}", size(received.num_tokens))
            filled = 1 - filled


def _lay_gradients(rooms: Rooms, rounds: tuple[Round, ...], size: Callable[[int], int]) -> None:
    """Gradients of a ring: the sums of two rounds, what leaves, what comes in."""

    def lay(name: str, message: Message | None, *, packed: bool = False) -> None:
        if message and not (packed and len(message.spans) == 1):
            rooms.lay(name, size(message.num_tokens))

    for number, turn in enumerate(rounds):
        if number and turn.num_keys:
            rooms.lay(f"gradients {number % 2}", size(turn.num_keys))
        lay("sent gradients, pass", turn.pass_grads, packed=True)
        lay("sent gradients, return", turn.return_grads, packed=True)
        lay("passed", turn.receive_passed)
        lay("returned", turn.receive_returned)


def _portions(gather: Gather, size: int, x: Operands) -> list[int]:
    """Key/value heads of each portion that is gathered."""
    num_bytes = size * gather.width * x.batch * x.kv_heads * 2 * x.head_dim * x.element
    count = min(x.kv_heads, MAX_PORTIONS, max(1, num_bytes // LEAST_PORTION))
    edges = [number * x.kv_heads // count for number in range(count + 1)]
    return [stop - start for start, stop in pairwise(edges)]


def _lay_gather(rooms: Rooms, gather: Gather, size: int, x: Operands) -> None:
    for number, heads in enumerate(_portions(gather, size, x) if gather.width else []):
        token = x.batch * heads * 2 * x.head_dim * x.element
        rooms.lay(f"given {number % 2}", gather.width * token)
        rooms.lay(f"gathered {number % 2}", size * gather.width * token)
        if len(gather.picked) > 1:
            rooms.lay("picked", sum(map(_count, gather.picked)) * token)


def _lay_gathered_gradients(rooms: Rooms, gather: Gather, size: int, x: Operands) -> None:
    for heads in _portions(gather, size, x) if gather.width else []:
        token = x.batch * heads * 2 * x.head_dim * x.exact
        if gather.picked:
            rooms.lay("gradients", sum(map(_count, gather.picked)) * token)
        rooms.lay("spread", size * gather.width * token)
        rooms.lay("returned", gather.width * token)


def _to_heads(
    rooms: Rooms, trade: HeadExchange, x: Operands, parts: list[tuple[Span, ...]], element: int
) -> None:
    mine, all_peers = _traded(trade, x, parts, element)
    rooms.lay("keys 0", all_peers)
    rooms.lay("keys 1", mine)


def _to_tokens(
    rooms: Rooms, trade: HeadExchange, x: Operands, parts: list[tuple[Span, ...]], element: int
) -> None:
    mine, all_peers = _traded(trade, x, parts, element)
    rooms.lay("keys 0", mine)
    rooms.lay("keys 1", all_peers)


def _traded(
    trade: HeadExchange, x: Operands, parts: list[tuple[Span, ...]], element: int
) -> tuple[int, int]:
    """Bytes of this rank's heads of all traders' tokens, and of all their heads of its tokens."""
    token = math.prod((x.num_tokens, x.batch, x.head_dim, element))
    mine = len(trade.peers) * sum(_count(part[trade.index]) for part in parts)
    return mine * token, sum(_count(span) for part in parts for span in part) * token


def _count(span: Span) -> int:
    return span[1] - span[0]
