"""Trading tokens for heads and back. Who trades what is planned in plan/heads.py.

Shapes: B batch, S tokens of the shard, M tokens of the group of traders together, h heads of a
tensor, m of them computed here, d width of a head.

    tokens_to_heads   [B, S, h, d] -> [B, M, m, d]     all heads of my tokens -> my heads of all
    heads_to_tokens   [B, M, m, d] -> [B, S, h, d]     and back

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

from cp_megatron.comm.p2p import post
from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.keys import take
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.tiles import Span


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
    trade: HeadExchange, group: dist.ProcessGroup | None, parts: Sequence[Part]
) -> list[Tensor]:
    """This rank's heads of every token that the traders hold, by position.

    Args:
        trade: this rank's view.
        group: the context parallel group.
        parts: [B, S, h, d] each, of one type; they travel in one message per trader.

    Returns:
        Per part [B, M, m, d], views of one buffer.
    """
    num_tokens = parts[0].tensor.shape[1]
    mine = [_count(part.heads[trade.index]) for part in parts]
    widths = [count * part.tensor.shape[-1] for count, part in zip(mine, parts)]
    outgoing = [
        _pack([part.tensor[:, :, slice(*part.heads[i])] for part in parts])
        for i in range(len(trade.peers))
    ]
    like = outgoing[trade.index]
    incoming = _exchange(trade, group, outgoing, [sum(widths)] * len(trade.peers))
    # [S, B, w] of each trader -> [M, B, w] by position
    together = like.new_empty((num_tokens * len(trade.peers), *like.shape[1:]))
    for rows, part in zip(trade.rows, incoming):
        offset = 0
        for start, stop in rows:
            together[start:stop] = part[offset : offset + stop - start]
            offset += stop - start
    return _unpack(together, mine, widths)


def heads_to_tokens(
    trade: HeadExchange, group: dist.ProcessGroup | None, parts: Sequence[Part]
) -> list[Tensor]:
    """Every head of this rank's tokens; heads that several traders computed are summed.

    Args:
        trade: this rank's view.
        group: the context parallel group.
        parts: [B, M, m, d] each, of one type; they travel in one message per trader.

    Returns:
        Per part [B, S, h, d].
    """
    # [B, M, m, d] -> [M, B, w]
    together = _pack([part.tensor for part in parts])
    outgoing = [take(together, rows) for rows in trade.rows]
    num_tokens, batch = outgoing[trade.index].shape[:2]
    dims = [part.tensor.shape[-1] for part in parts]
    counts = [[_count(part.heads[i]) for part in parts] for i in range(len(trade.peers))]
    widths = [sum(count * dim for count, dim in zip(found, dims)) for found in counts]
    incoming = _exchange(trade, group, outgoing, widths)
    found = []
    for number, (part, dim) in enumerate(zip(parts, dims)):
        num_heads = max(stop for _, stop in part.heads)
        # The first trader that computes a head stores it, others add.
        whole = part.tensor.new_empty((batch, num_tokens, num_heads, dim))
        stored = 0
        for i, (start, stop) in enumerate(part.heads):
            split = [count * d for count, d in zip(counts[i], dims)]
            tensor = _unpack(incoming[i], counts[i], split)[number]
            fresh = max(start, stored)
            whole[:, :, start:fresh] += tensor[:, :, : fresh - start]
            whole[:, :, fresh:stop] = tensor[:, :, fresh - start :]
            stored = stop
        found.append(whole)
    return found


def _exchange(
    trade: HeadExchange,
    group: dist.ProcessGroup | None,
    outgoing: Sequence[Tensor],
    widths: Sequence[int],
) -> list[Tensor]:
    """What each trader sends to this rank, [S, B, its width], for ``outgoing`` to each of them."""
    shapes = [(*outgoing[trade.index].shape[:2], width) for width in widths]
    if group is not None and group.size() == len(trade.peers):
        sent = torch.cat([x.reshape(-1) for x in outgoing])
        sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        with traced("trade heads"):
            counts = [x.numel() for x in outgoing]
            dist.all_to_all_single(received, sent, sizes, counts, group=group)
        return [x.view(shape) for x, shape in zip(received.split(sizes), shapes)]
    incoming = [outgoing[trade.index].new_empty(shape) for shape in shapes]
    incoming[trade.index] = outgoing[trade.index]
    others = [i for i in range(len(trade.peers)) if i != trade.index]
    with traced("trade heads"):
        post(
            group,
            sends=[(outgoing[i], trade.peers[i]) for i in others],
            receives=[(incoming[i], trade.peers[i]) for i in others],
        ).wait()
    return incoming


def _pack(tensors: Sequence[Tensor]) -> Tensor:
    """[B, S, m, d] each -> [S, B, sum of m * d], contiguous."""
    flat = [rearrange(x, "b s n d -> s b (n d)") for x in tensors]
    return torch.cat(flat, dim=-1) if len(flat) > 1 else flat[0].contiguous()


def _unpack(packed: Tensor, counts: Sequence[int], widths: Sequence[int]) -> list[Tensor]:
    """[S, B, sum of m * d] -> [B, S, m, d] each, as views."""
    parts = packed.split(list(widths), dim=-1)
    return [rearrange(x, "s b (n d) -> b s n d", n=n) for x, n in zip(parts, counts)]


def _count(span: Span) -> int:
    return span[1] - span[0]
