"""Exchanging heads for tokens by all-to-all, and back. plan/heads.py plans the exchange.

Shapes: B = batch, S = tokens of the shard, M = tokens of all peers together, h = heads of a tensor,
m = those of them that this rank computes, d = width of a head.

    to_heads    [B, S, h, d] -> [B, M, m, d]     all heads of my tokens -> my heads of all tokens
    to_tokens   [B, M, m, d] -> [B, S, h, d]     and back

An exchange needs a buffer for what it sends and one for what it receives. Some of the heads of all
tokens take as much memory as all heads of some of the tokens, so neither buffer grows with the
number of ranks, unless key/value heads are repeated.

Each direction is the transpose of the other: a head that was sent to several ranks comes back as
the sum of their results. If all ranks of the context parallel group take part, one collective moves
everything. If only neighbours do, they send and receive within that group: a process group of their
own would need a message from every rank of the world.
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
from cp_megatron.comm.send_receive import all_to_all, post
from cp_megatron.comm.trace import traced, waiting_for
from cp_megatron.context_parallel.buffers import Workspace
from cp_megatron.plan.buffer_sizes import RECEIVED_HEADS, SENT_HEADS, message_widths
from cp_megatron.plan.heads import HeadExchange
from cp_megatron.plan.tiling import Span, num_positions, pack

Shape = tuple[int, int, int]
"""[tokens, B, heads * d] of a message."""


@dataclass(frozen=True)
class PartitionedHeads:
    """A tensor whose heads are divided among peers.

    Attributes:
        tensor: [B, S, h, d] before ``to_heads``, [B, M, m, d] before ``to_tokens``.
        heads: for each peer, the heads that it computes.
    """

    tensor: Tensor
    heads: Sequence[Span]


@dataclass(frozen=True)
class HeadAllToAll:
    """The all-to-all of one pass. ``memory`` provides buffers of messages, not of results."""

    exchange: HeadExchange
    group: dist.ProcessGroup | None
    memory: Workspace
    sums: LinkSums

    def to_heads(self, parts: Sequence[PartitionedHeads]) -> list[Tensor]:
        """Returns this rank's heads of every token that the peers hold, by position.

        The parts, [B, S, h, d], have one type and share one message per peer. The results,
        [B, M, m, d] for each part, are views of one tensor.
        """
        first, exchange = parts[0].tensor, self.exchange
        num_tokens = first.shape[1]
        sent, received = self._shapes(parts, num_tokens, to_heads=True)
        outgoing = self._take(SENT_HEADS, sent, first.dtype)
        for i, message in enumerate(outgoing):
            chosen = [part.tensor[:, :, slice(*part.heads[i])] for part in parts]
            _store(message, chosen, [(0, num_tokens)])
        incoming = self._exchange(outgoing, received)
        # [S, B, w] of each peer -> [M, B, w] by position
        together = first.new_empty((num_tokens * len(received), *received[0][1:]))
        for rows, message in zip(exchange.rows, incoming):
            for start, stop, offset in pack(rows):
                together[start:stop] = message[offset : offset + stop - start]
        return _unpack(together, *_heads_of_peer(parts, exchange.index))

    def to_tokens(self, parts: Sequence[PartitionedHeads]) -> list[Tensor]:
        """Returns every head of this rank's tokens; heads that several peers computed are summed.

        The parts, [B, M, m, d], have one type and share one message per peer. The results are
        [B, S, h, d] for each part.
        """
        first, exchange = parts[0].tensor, self.exchange
        batch, num_tokens = first.shape[0], num_positions(exchange.rows[0])
        sent, received = self._shapes(parts, num_tokens, to_heads=False)
        outgoing = self._take(SENT_HEADS, sent, first.dtype)
        for message, rows in zip(outgoing, exchange.rows):
            _store(message, [part.tensor for part in parts], rows)
        incoming = self._exchange(outgoing, received)
        unpacked = [_unpack(x, *_heads_of_peer(parts, i)) for i, x in enumerate(incoming)]
        results = []
        for number, part in enumerate(parts):
            num_heads = max(stop for _, stop in part.heads)
            # The first peer that computes a head stores it, the others add to it.
            whole = first.new_empty((batch, num_tokens, num_heads, part.tensor.shape[-1]))
            stored = 0
            for i, (start, stop) in enumerate(part.heads):
                tensor = unpacked[i][number]
                fresh = max(start, stored)
                whole[:, :, start:fresh].add_(tensor[:, :, : fresh - start])
                whole[:, :, fresh:stop] = tensor[:, :, fresh - start :]
                stored = stop
            results.append(whole)
        return results

    def _shapes(
        self, parts: Sequence[PartitionedHeads], num_tokens: int, *, to_heads: bool
    ) -> tuple[list[Shape], list[Shape]]:
        tensors = [(part.heads, part.tensor.shape[-1]) for part in parts]
        batch = parts[0].tensor.shape[0]
        sent, received = message_widths(self.exchange, tensors, to_heads=to_heads)
        return [(num_tokens, batch, w) for w in sent], [(num_tokens, batch, w) for w in received]

    def _take(self, name: str, shapes: Sequence[Shape], dtype: torch.dtype) -> list[Tensor]:
        """Messages of these shapes, one after the other in one buffer."""
        sizes = [math.prod(shape) for shape in shapes]
        buffer = self.memory.take(name, (sum(sizes),), dtype)
        return [x.view(shape) for x, shape in zip(buffer.split(sizes), shapes)]

    def _exchange(self, outgoing: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
        """Sends ``outgoing`` to the peers; returns what they send, of the given shapes."""
        peers, index, dtype = self.exchange.peers, self.exchange.index, outgoing[0].dtype
        incoming = self._take(RECEIVED_HEADS, shapes, dtype)
        with traced("all-to-all of heads"):
            if self.group is not None and self.group.size() == len(peers):
                sizes, counts = ([x.numel() for x in messages] for messages in (incoming, outgoing))
                sent = self.memory.take(SENT_HEADS, (sum(counts),), dtype)
                received = self.memory.take(RECEIVED_HEADS, (sum(sizes),), dtype)
                all_to_all(self.group, sent, received, (counts, sizes), self.sums)
                return incoming
            others = [i for i in range(len(peers)) if i != index]
            pending = post(
                self.group,
                sends=[(outgoing[i], peers[i]) for i in others],
                receives=[(incoming[i], peers[i]) for i in others],
                sums=self.sums,
            )
            with waiting_for("heads"):
                pending.wait()
        incoming[index] = outgoing[index]
        return incoming


def _store(message: Tensor, tensors: Sequence[Tensor], spans: Sequence[Span]) -> None:
    """Tokens ``spans`` of [B, T, m, d] each -> [S, B, sum of m * d]."""
    counts, dims = [x.shape[2] for x in tensors], [x.shape[3] for x in tensors]
    for target, tensor in zip(_unpack(message, counts, dims), tensors):
        for start, stop, offset in pack(spans):
            target[:, offset : offset + stop - start] = tensor[:, start:stop]


def _unpack(packed: Tensor, counts: Sequence[int], dims: Sequence[int]) -> list[Tensor]:
    """[S, B, sum of m * d] -> [B, S, m, d] each, as views."""
    parts = packed.split([count * dim for count, dim in zip(counts, dims)], dim=-1)
    return [rearrange(x, "s b (n d) -> b s n d", n=n) for x, n in zip(parts, counts)]


def _heads_of_peer(parts: Sequence[PartitionedHeads], i: int) -> tuple[list[int], list[int]]:
    """For each part, the number of heads that peer ``i`` computes, and their width."""
    counts = [num_positions([part.heads[i]]) for part in parts]
    return counts, [part.tensor.shape[-1] for part in parts]
