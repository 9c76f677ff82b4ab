"""Running a p2p schedule: ring attention, forward and backward. The plan is in plan/schedule.py.

Shapes: B batch, S tokens of the shard, K keys of an arrival, H query heads, G key/value heads,
D head dim, E value head dim. A message is [tokens, B, G * (D + E)]: keys and values of a token
side by side, tokens outermost, so that a run of tokens is one contiguous piece of memory.

Each round: post what the next round needs, compute this round's tiles, merge, wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from cp_megatron.comm.p2p import Pending, post
from cp_megatron.kernels.interface import Kernel, accumulation_dtype
from cp_megatron.kernels.merge import merge_
from cp_megatron.plan.schedule import Message, Round
from cp_megatron.plan.tiles import Span, Tile


@dataclass(frozen=True, kw_only=True)
class Ring:
    """One rank's part of a schedule and what it runs on."""

    rounds: tuple[Round, ...]
    group: dist.ProcessGroup | None
    kernel: Kernel


@dataclass(frozen=True)
class _KeyValues:
    """Keys [B, K, G, D], values [B, K, G, E] and, once something was sent or received, both packed.

    ``packed`` is [K, B, G * (D + E)]; for an arrival keys and values are views of it.
    """

    k: Tensor
    v: Tensor
    packed: Tensor | None = None

    @classmethod
    def unpack(cls, packed: Tensor, like: _KeyValues) -> _KeyValues:
        """The views of a message; ``like`` gives the number of heads and their widths."""
        num_heads, dim = like.k.shape[2:]
        # [K, B, G * D + G * E] -> [B, K, G, D] and [B, K, G, E]
        k = rearrange(packed[..., : num_heads * dim], "k b (n d) -> b k n d", n=num_heads)
        v = rearrange(packed[..., num_heads * dim :], "k b (n e) -> b k n e", n=num_heads)
        return cls(k, v, packed)

    def pack(self) -> _KeyValues:
        """With ``packed`` filled in."""
        if self.packed is not None:
            return self
        # [B, K, G, D] and [B, K, G, E] -> [K, B, G * (D + E)]
        k, v = (rearrange(x, "b k n d -> k b (n d)") for x in (self.k, self.v))
        return _KeyValues(self.k, self.v, torch.cat([k, v], dim=-1))

    def empty(self, num_tokens: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised message of ``num_tokens``."""
        batch, _, num_heads, dim = self.k.shape
        width = num_heads * (dim + self.v.shape[-1])
        return torch.empty(num_tokens, batch, width, dtype=dtype, device=self.k.device)

    def to(self, dtype: torch.dtype) -> _KeyValues:
        """Keys and values as operands of the kernel."""
        return _KeyValues(self.k.to(dtype), self.v.to(dtype))


def ring_forward(
    ring: Ring, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of the shard's queries over every key the mask lets them see.

    Args:
        ring: this rank's part of the schedule.
        q: [B, S, H, D].
        k: [B, S, G, D].
        v: [B, S, G, E].
        scale: what scores are multiplied with.

    Returns:
        out [B, S, H, E] and lse [B, H, S], float32 (float64 for float64).
    """
    compute = ring.kernel.compute_dtype(q.dtype)
    q = q.to(compute)
    shard = arrival = _KeyValues(k, v)
    result: tuple[Tensor, Tensor] | None = None
    for turn in ring.rounds:
        sends = []
        if turn.send_keys:
            shard = shard.pack()
            arrival = shard if turn is ring.rounds[0] else arrival
            source = shard if turn.send_keys.owner == ring.rounds[0].owner else arrival
            assert source.packed is not None
            sends.append((_take(source.packed, turn.send_keys.spans), turn.send_keys.peer))
        incoming = _buffer_for(turn.receive_keys, shard, k.dtype)
        pending = post(ring.group, sends=sends, receives=_receives((turn.receive_keys, incoming)))
        keys = arrival.to(compute)
        for tile in turn.tiles:
            result = _forward_tile(ring.kernel, tile, q, keys, scale, result)
        pending.wait()
        if incoming is not None:
            arrival = _KeyValues.unpack(incoming, shard)
    assert result is not None
    return result


def ring_backward(
    ring: Ring,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the shard's queries, and of its keys and values from the queries of all ranks.

    Args:
        ring: this rank's part of the schedule.
        dout: [B, S, H, E], the gradient of ``out``.
        q, k, v: as in forward.
        out: [B, S, H, E], forward's result.
        lse: [B, H, S], forward's result.
        scale: as in forward.

    Returns:
        dq [B, S, H, D], dk [B, S, G, D], dv [B, S, G, E], float32 (float64 for float64).
    """
    compute = ring.kernel.compute_dtype(q.dtype)
    rows = _Rows(q.to(compute), dout.to(compute).contiguous(), out.to(compute), lse)
    shard = arrival = _KeyValues(k, v)
    dq = torch.empty(q.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
    # The own tiles need no message: half of their heads are kept for the end, where they hide the
    # last gradients' way home as the first half hides the first keys' way here.
    num_heads = k.shape[2]
    middle = num_heads // 2 if len(ring.rounds) > 1 else 0
    own = latest = _GradientsOf(ring.kernel, rows, shard.to(compute), scale, dq)
    own.zero(slice(0, middle), queries=True)
    before: Round | None = None
    for turn in (*ring.rounds, None):
        if turn and turn.send_keys:
            shard = shard.pack()
            arrival = shard if before is None else arrival
        slot = _BackwardSlot.post(ring, before, turn, shard, arrival, latest.grads)
        if turn is None:
            own.add(ring.rounds[0].tiles, slice(0, middle))
        elif before is None:
            own.store_own(turn.tiles, slice(middle, num_heads))
        else:
            latest = _GradientsOf(ring.kernel, rows, arrival.to(compute), scale, dq)
            latest.store_remote(turn.tiles, slice(0, num_heads))
        slot.wait_and_add(arrival=latest.grads, own=own.grads)
        if slot.keys is not None:
            arrival = _KeyValues.unpack(slot.keys, shard)
        before = turn
    return dq, own.grads.k, own.grads.v


@dataclass(frozen=True)
class _Rows:
    """What backward needs of the queries, in the kernel's type."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True, kw_only=True)
class _BackwardSlot:
    """The messages of one slot: keys for the next round, gradients of the round before."""

    pending: Pending
    keys: Tensor | None
    passed: tuple[Message | None, Tensor | None]
    returned: tuple[Message | None, Tensor | None]

    @classmethod
    def post(
        cls,
        ring: Ring,
        before: Round | None,
        turn: Round | None,
        shard: _KeyValues,
        arrival: _KeyValues,
        grads: _KeyValues,
    ) -> _BackwardSlot:
        """Both ends list keys first, then gradients passed on, then gradients going home."""
        sends = []
        send_keys = turn.send_keys if turn else None
        if send_keys:
            source = shard if send_keys.owner == ring.rounds[0].owner else arrival
            assert source.packed is not None
            sends.append((_take(source.packed, send_keys.spans), send_keys.peer))
        for message in (before.pass_grads, before.return_grads) if before else ():
            if message:
                assert grads.packed is not None
                sends.append((_take(grads.packed, message.spans), message.peer))
        dtype = accumulation_dtype(shard.k.dtype)
        receive_keys = turn.receive_keys if turn else None
        keys = _buffer_for(receive_keys, shard, shard.k.dtype)
        passed = before.receive_passed if before else None
        returned = before.receive_returned if before else None
        passed_buffer = _buffer_for(passed, shard, dtype)
        returned_buffer = _buffer_for(returned, shard, dtype)
        receives = _receives(
            (receive_keys, keys), (passed, passed_buffer), (returned, returned_buffer)
        )
        return cls(
            pending=post(ring.group, sends=sends, receives=receives),
            keys=keys,
            passed=(passed, passed_buffer),
            returned=(returned, returned_buffer),
        )

    def wait_and_add(self, *, arrival: _KeyValues, own: _KeyValues) -> None:
        """Adds what was passed to this round's gradients, what came home to the shard's."""
        self.pending.wait()
        for (message, buffer), target in ((self.passed, arrival), (self.returned, own)):
            if message is None or buffer is None:
                continue
            offset = 0
            for start, stop in message.spans:
                part = _KeyValues.unpack(buffer[offset : offset + stop - start], own)
                target.k[:, start:stop] += part.k
                target.v[:, start:stop] += part.v
                offset += stop - start


def _forward_tile(
    kernel: Kernel,
    tile: Tile,
    q: Tensor,
    keys: _KeyValues,
    scale: float,
    result: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Computes a tile and stores or merges it into ``result`` (out [B, S, H, E], lse [B, H, S])."""
    rows, columns = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
    new_out, new_lse = kernel.forward(
        q[:, rows], keys.k[:, columns], keys.v[:, columns], tile.band, scale
    )
    dtype = accumulation_dtype(q.dtype)
    if result is None:
        if tile.q1 - tile.q0 == q.shape[1]:
            return new_out.to(dtype), new_lse.to(dtype)
        batch, shard_len, num_heads, _ = q.shape
        out = new_out.new_empty(batch, shard_len, num_heads, keys.v.shape[-1], dtype=dtype)
        result = out, new_lse.new_empty(batch, num_heads, shard_len, dtype=dtype)
    out, lse = result
    if tile.first:
        out[:, rows] = new_out
        lse[:, :, rows] = new_lse
    else:
        merge_(out[:, rows], lse[:, :, rows], new_out, new_lse)
    return result


class _GradientsOf:
    """Gradients of the keys of one arrival, summed over tiles; their queries' go into ``dq``.

    Memory is not cleared first: what is written first is stored, the rest added. ``heads`` are
    key/value heads, and stand for the query heads that read them too.
    """

    def __init__(
        self, kernel: Kernel, rows: _Rows, keys: _KeyValues, scale: float, dq: Tensor
    ) -> None:
        self._kernel, self._rows, self._keys = kernel, rows, keys
        self._scale, self._dq = scale, dq
        self._group = rows.q.shape[2] // keys.k.shape[2]
        self.grads = _KeyValues.unpack(keys.empty(keys.k.shape[1], dq.dtype), keys)

    def zero(self, heads: slice, *, queries: bool) -> None:
        """Clears the keys' gradients, and with ``queries`` those of the heads' queries."""
        self.grads.k[:, :, heads] = 0
        self.grads.v[:, :, heads] = 0
        if queries:
            self._dq[:, :, self._q_heads(heads)] = 0

    def store_own(self, tiles: Sequence[Tile], heads: slice) -> None:
        """The shard's own keys: its ``first`` tiles cover each row and each column once."""
        for tile in tiles:
            self._accumulate(tile, heads, store_rows=tile.first, store_columns=tile.first)

    def store_remote(self, tiles: Sequence[Tile], heads: slice) -> None:
        """Another rank's keys: the rows have gradients already, the columns none."""
        num_keys = self._keys.k.shape[1]
        whole = len(tiles) == 1 and tiles[0].k1 - tiles[0].k0 == num_keys
        if not whole:
            self.zero(heads, queries=False)
        for tile in tiles:
            self._accumulate(tile, heads, store_rows=False, store_columns=whole)

    def add(self, tiles: Sequence[Tile], heads: slice) -> None:
        """Adds to what is there."""
        for tile in tiles if heads.stop > heads.start else ():
            self._accumulate(tile, heads, store_rows=False, store_columns=False)

    def _accumulate(
        self, tile: Tile, heads: slice, *, store_rows: bool, store_columns: bool
    ) -> None:
        rows, keys, q_heads = self._rows, self._keys, self._q_heads(heads)
        q, k = slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        dq, dk, dv = self._kernel.backward(
            rows.dout[:, q, q_heads],
            rows.q[:, q, q_heads],
            keys.k[:, k, heads],
            keys.v[:, k, heads],
            rows.out[:, q, q_heads],
            rows.lse[:, q_heads, q],
            tile.band,
            self._scale,
        )
        _write(self._dq[:, q, q_heads], dq, store=store_rows)
        _write(self.grads.k[:, k, heads], dk, store=store_columns)
        _write(self.grads.v[:, k, heads], dv, store=store_columns)

    def _q_heads(self, heads: slice) -> slice:
        return slice(heads.start * self._group, heads.stop * self._group)


def _write(target: Tensor, value: Tensor, *, store: bool) -> None:
    if store:
        target.copy_(value)
    else:
        target += value


def _take(packed: Tensor, spans: Sequence[Span]) -> Tensor:
    """Runs of tokens as one contiguous message; a single run without a copy."""
    if len(spans) == 1:
        return packed[spans[0][0] : spans[0][1]]
    return torch.cat([packed[start:stop] for start, stop in spans])


def _buffer_for(message: Message | None, like: _KeyValues, dtype: torch.dtype) -> Tensor | None:
    return like.empty(message.num_tokens, dtype) if message else None


def _receives(*expected: tuple[Message | None, Tensor | None]) -> list[tuple[Tensor, int]]:
    return [
        (buffer, message.peer) for message, buffer in expected if message and buffer is not None
    ]
