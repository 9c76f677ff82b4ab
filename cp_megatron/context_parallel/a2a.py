"""Trading tokens for heads and back. Who trades what is planned in plan/heads.py.

Shapes: B batch, S tokens of the shard, M tokens of the group of traders together, h heads of a
tensor, m of them computed here, d width of a head.

    tokens_to_heads   [B, S, h, d] -> [B, M, m, d]     all heads of my tokens -> my heads of all
    heads_to_tokens   [B, M, m, d] -> [B, S, h, d]     and back

A trade holds what it sends and what it receives. A share of the heads of all tokens is as large as
all heads of a share of the tokens, so neither grows with the number of ranks, unless key/value
heads are repeated.

Each is the other's transpose: a head that was sent to several ranks comes back as their sum.
Where all ranks of the context parallel group trade, one collective moves everything. Where only
neighbours do, messages are sends and receives inside that group, so that no group of traders has to
be made, which would take a message from every rank of the world.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from cp_megatron.comm.checksums import LinkSums
from cp_megatron.comm.p2p import post
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.tiles import Span

Shape = tuple[int, int, int]
"""[tokens, B, heads * d] of a message."""

# The rooms of a ring's keys: a trade is over before rounds begin, and begins when they are over.
SENT, RECEIVED = "keys 0", "keys 1"


@dataclass(frozen=True)
class Part:
    """A tensor that takes part in a trade.

    Attributes:
        tensor: [B, S, h, d] on the way to heads, [B, M, m, d] on the way back.
        heads: per trader, the heads it computes.
    """

    tensor: Tensor
    heads: Sequence[Span]


def tokens_to_heads(
    trade: HeadExchange,
    group: dist.ProcessGroup | None,
    memory: Workspace,
    sums: LinkSums,
    parts: Sequence[Part],
) -> list[Tensor]:
    """This rank's heads of every token that the traders hold, by position.

    Args:
        trade: this rank's view.
        group: the context parallel group.
        memory: where messages live.
        sums: notes what is sent and received.
        parts: [B, S, h, d] each, of one type; they travel in one message per trader.

    Returns:
        Per part [B, M, m, d], views of one tensor, which is not in ``memory``.
    """
    first = parts[0].tensor
    batch, num_tokens = first.shape[:2]
    dims = [part.tensor.shape[-1] for part in parts]
    counts = [[_count(part.heads[i]) for part in parts] for i in range(len(trade.peers))]
    sent = [(num_tokens, batch, _width(found, dims)) for found in counts]
    outgoing = _rooms(memory, SENT, sent, first.dtype)
    for i, message in enumerate(outgoing):
        chosen = [part.tensor[:, :, slice(*part.heads[i])] for part in parts]
        _store(message, chosen, [(0, num_tokens)])
    mine = sent[trade.index]
    incoming = _exchange(trade, group, memory, sums, outgoing, [mine] * len(trade.peers))
    # [S, B, w] of each trader -> [M, B, w] by position
    together = first.new_empty((num_tokens * len(trade.peers), *mine[1:]))
    for rows, part in zip(trade.rows, incoming):
        offset = 0
        for start, stop in rows:
            together[start:stop] = part[offset : offset + stop - start]
            offset += stop - start
    return _unpack(together, counts[trade.index], dims)


def heads_to_tokens(
    trade: HeadExchange,
    group: dist.ProcessGroup | None,
    memory: Workspace,
    sums: LinkSums,
    parts: Sequence[Part],
) -> list[Tensor]:
    """Every head of this rank's tokens; heads that several traders computed are summed.

    Args:
        trade: this rank's view.
        group: the context parallel group.
        memory: where messages live.
        sums: notes what is sent and received.
        parts: [B, M, m, d] each, of one type; they travel in one message per trader.

    Returns:
        Per part [B, S, h, d], not in ``memory``.
    """
    batch, num_tokens = parts[0].tensor.shape[0], sum(_count(span) for span in trade.rows[0])
    dims = [part.tensor.shape[-1] for part in parts]
    counts = [[_count(part.heads[i]) for part in parts] for i in range(len(trade.peers))]
    shapes = [(num_tokens, batch, _width(found, dims)) for found in counts]
    sent = [shapes[trade.index]] * len(trade.peers)
    outgoing = _rooms(memory, SENT, sent, parts[0].tensor.dtype)
    for message, rows in zip(outgoing, trade.rows):
        _store(message, [part.tensor for part in parts], rows)
    incoming = _exchange(trade, group, memory, sums, outgoing, shapes)
    unpacked = [_unpack(x, found, dims) for x, found in zip(incoming, counts)]
    found = []
    for number, (part, dim) in enumerate(zip(parts, dims)):
        num_heads = max(stop for _, stop in part.heads)
        # The first trader that computes a head stores it, others add.
        whole = part.tensor.new_empty((batch, num_tokens, num_heads, dim))
        stored = 0
        for i, (start, stop) in enumerate(part.heads):
            tensor = unpacked[i][number]
            fresh = max(start, stored)
            whole[:, :, start:fresh] += tensor[:, :, : fresh - start]
            whole[:, :, fresh:stop] = tensor[:, :, fresh - start :]
            stored = stop
        found.append(whole)
    return found


def _exchange(
    trade: HeadExchange,
    group: dist.ProcessGroup | None,
    memory: Workspace,
    sums: LinkSums,
    outgoing: Sequence[Tensor],
    shapes: Sequence[Shape],
) -> list[Tensor]:
    """What each trader sends to this rank, of these shapes, for ``outgoing`` to each of them.

    The messages of ``outgoing`` lie in one room, one after the other.
    """
    incoming = _rooms(memory, RECEIVED, shapes, outgoing[0].dtype)
    others = [i for i in range(len(trade.peers)) if i != trade.index]
    with traced("trade heads"):
        if group is not None and group.size() == len(trade.peers):
            sizes = [message.numel() for message in incoming]
            counts = [message.numel() for message in outgoing]
            sent = memory.room(SENT, (sum(counts),), outgoing[0].dtype)
            received = memory.room(RECEIVED, (sum(sizes),), outgoing[0].dtype)
            for i in others:
                sums.sent(outgoing[i], trade.peers[i])
            dist.all_to_all_single(received, sent, sizes, counts, group=group)
            for i in others:
                sums.received(incoming[i], trade.peers[i])
            return incoming
        post(
            group,
            sends=[(outgoing[i], trade.peers[i]) for i in others],
            receives=[(incoming[i], trade.peers[i]) for i in others],
            sums=sums,
        ).wait()
    incoming[trade.index] = outgoing[trade.index]
    return incoming


def _rooms(
    memory: Workspace, name: str, shapes: Sequence[Shape], dtype: torch.dtype
) -> list[Tensor]:
    """Messages of these shapes, one after the other in one room."""
    sizes = [math.prod(shape) for shape in shapes]
    room = memory.room(name, (sum(sizes),), dtype)
    return [x.view(shape) for x, shape in zip(room.split(sizes), shapes)]


def _store(message: Tensor, tensors: Sequence[Tensor], spans: Sequence[Span]) -> None:
    """Tokens ``spans`` of [B, T, m, d] each -> [S, B, sum of m * d]."""
    counts, dims = [x.shape[2] for x in tensors], [x.shape[3] for x in tensors]
    for target, tensor in zip(_unpack(message, counts, dims), tensors):
        offset = 0
        for start, stop in spans:
            target[:, offset : offset + stop - start] = tensor[:, start:stop]
            offset += stop - start


def _unpack(packed: Tensor, counts: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    """[S, B, sum of m * d] -> [B, S, m, d] each, as views."""
    parts = packed.split([count * dim for count, dim in zip(counts, dims)], dim=-1)
    return [rearrange(x, "s b (n d) -> b s n d", n=n) for x, n in zip(parts, counts)]


def _width(counts: Sequence[int], dims: Sequence[int]) -> int:
    return sum(count * dim for count, dim in zip(counts, dims))


def _count(span: Span) -> int:
    return span[1] - span[0]
