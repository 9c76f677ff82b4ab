"""Computing tiles and summing up what they give: results in forward, gradients in backward.

Shapes: B = batch, S = tokens of the shard, K = keys of an arrival, H = query heads, G = key/value
heads, D = head dim, E = value head dim. Sums are float32 (float64 for float64), whatever types the
kernels return.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from einops import rearrange
from torch import Tensor

from cp_megatron.comm.trace import traced
from cp_megatron.context_parallel.keys import KeyValues
from cp_megatron.context_parallel.rank_plan import RankPlan, RankRound, TileCall
from cp_megatron.kernels.dropout import Dropout, TileDropout
from cp_megatron.kernels.interface import BackwardInputs, DroppingKernel, Kernel, accumulation_dtype
from cp_megatron.kernels.merge import merge_
from cp_megatron.plan.heads import HeadGroup
from cp_megatron.plan.tiling import Span, Tile


@dataclass(frozen=True)
class Portion:
    """Some heads of one arrival, which are computed together.

    Attributes:
        heads: the query heads, a part of all that this rank computes.
        keys: the keys and values that they read, [B, K, g, D] and [B, K, g, E].
        grads: memory for the gradients of ``keys``, of the same shapes; None in forward.
    """

    heads: slice
    keys: KeyValues
    grads: KeyValues | None = None


class Expansion(Protocol):
    """Turns messages that are not keys and values into what kernels read."""

    def portions(
        self,
        tiles: Sequence[Tile],
        keys: KeyValues,
        groups: Sequence[HeadGroup],
        grads: KeyValues | None,
    ) -> Iterator[Portion]:
        """Yields the heads in ``groups``, with keys and values where ``tiles`` read them.

        The caller adds to each portion's gradients, which begin as zeros. When it asks for the next
        portion, they are turned into gradients of the message, and these are added to ``grads``.

        Args:
            tiles: what will be computed.
            keys: the arrival.
            groups: the heads.
            grads: memory for the gradients of ``keys``; None in forward.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """The parameters that all tiles of one attention share.

    Attributes:
        kernel: computes a tile.
        scale: the factor of the scores.
        dropout: which pairs are dropped, with heads counted from this rank's first; None drops
            nothing.
        rows: positions of the queries, as runs.
        expansion: makes keys and values of messages; None if messages contain them.
    """

    kernel: Kernel
    scale: float
    dropout: Dropout | None
    rows: tuple[Span, ...]
    expansion: Expansion | None = None

    def portions(
        self,
        round_: RankRound,
        keys: KeyValues,
        groups: Sequence[HeadGroup],
        grads: KeyValues | None = None,
    ) -> Iterator[Portion]:
        """Yields the heads in ``groups`` with what they read of an arrival."""
        if self.expansion is not None:
            yield from self.expansion.portions(round_.tiles, keys, groups, grads)
            return
        for queries, heads in groups:
            yield Portion(slice(*queries), keys.heads(heads), grads and grads.heads(heads))

    def tile_calls(self, round_: RankRound) -> Sequence[TileCall]:
        """Returns what the kernel computes in one call each; dropout differs between tiles."""
        if self.kernel.joins and self.dropout is None:
            return round_.joined_calls
        return round_.calls

    def kernel_of(
        self, round_: RankRound, tile: TileCall, head: int, device: torch.device
    ) -> Kernel:
        """Returns the kernel of a tile whose first query head is ``head``."""
        if self.dropout is None:
            return self.kernel
        rows, columns = (_positions(spans, device) for spans in (self.rows, round_.keys))
        # kernels/select.py chooses only a kernel that can drop.
        kernel = cast(DroppingKernel, self.kernel)
        return kernel.dropping(
            TileDropout(self.dropout, rows[tile.rows], columns[tile.columns], head)
        )


def _positions(spans: Sequence[Span], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])


class MergedResults:
    """out [B, S, H, E] and lse [B, H, S] of the shard's queries, merged tile by tile.

    The memory is not cleared first: the ``first`` tile of a row is stored and the others are
    merged. If nothing is merged, out keeps the type that the kernel returns. A result that covers
    everything is kept, without a copy unless a kernel padded its heads.
    """

    def __init__(self, plan: RankPlan, call: Call, q: Tensor) -> None:
        self._call = call
        self._q = q.to(call.kernel.compute_dtype(q.dtype))
        self._dtype = accumulation_dtype(q.dtype) if plan.merges else None
        self._exact = accumulation_dtype(q.dtype)
        self._sums: tuple[Tensor, Tensor] | None = None

    def add(self, round_: RankRound, keys: KeyValues, groups: Sequence[HeadGroup]) -> None:
        """Computes the tiles of a round for the heads in ``groups``."""
        if not round_.tiles:
            return
        call = self._call
        for part in call.portions(round_, keys, groups):
            heads, read = part.heads, part.keys.to(self._q.dtype)
            for tile in call.tile_calls(round_):
                kernel = call.kernel_of(round_, tile, heads.start, self._q.device)
                with traced("attention tile"):
                    out, lse = tile.forward(
                        kernel,
                        self._q[:, tile.rows, heads],
                        read.k[:, tile.columns],
                        read.v[:, tile.columns],
                        call.scale,
                    )
                    self._add(tile, heads, out, lse)

    def _add(self, tile: TileCall, heads: slice, new_out: Tensor, new_lse: Tensor) -> None:
        batch, shard_len, num_heads, _ = self._q.shape
        if self._sums is None:
            dtype = self._dtype or new_out.dtype
            if new_lse.shape == (batch, num_heads, shard_len):
                whole = new_out.to(dtype)
                if whole.untyped_storage().nbytes() > whole.nbytes:
                    whole = whole.clone()  # else the padding of a narrow head would be kept, too
                self._sums = whole, new_lse.to(self._exact)
                return
            shape = (batch, shard_len, num_heads, new_out.shape[-1])
            self._sums = (
                new_out.new_empty(shape, dtype=dtype),
                new_lse.new_empty((batch, num_heads, shard_len), dtype=self._exact),
            )
        out, lse = self._sums[0][:, tile.rows, heads], self._sums[1][:, heads, tile.rows]
        if tile.first:
            out.copy_(new_out)
            lse.copy_(new_lse)
        else:
            merge_(out, lse, new_out, new_lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Returns out and lse; complete after the last round."""
        assert self._sums is not None
        return self._sums


@dataclass(frozen=True)
class BackwardQueries:
    """The tensors of backward that belong to the queries, in the kernel's type.

    q [B, S, H, D], dout and out [B, S, H, E], lse [B, H, S], and the sum dq [B, S, H, D]; dlse,
    [B, H, S] or None, is the gradient of the lse itself.
    """

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    dq: Tensor
    dlse: Tensor | None = None

    @classmethod
    def of(
        cls, plan: RankPlan, call: Call, x: BackwardInputs, dlse: Tensor | None = None
    ) -> BackwardQueries:
        """Converts the operands and allocates dq, which is not cleared."""
        dout, q, _, _, out, lse = _operands(call, x)
        sums = plan.merges or dlse is not None
        dtype = accumulation_dtype(x.q.dtype) if sums else q.dtype
        dq = torch.empty(x.q.shape, dtype=dtype, device=x.q.device)
        return cls(q, dout, out, lse, dq, dlse)

    def inputs(self, keys: KeyValues) -> BackwardInputs:
        """Returns the inputs of the kernel for some keys and values."""
        return BackwardInputs(self.dout, self.q, keys.k, keys.v, self.out, self.lse)


def _operands(call: Call, x: BackwardInputs) -> BackwardInputs:
    """Converts all but keys and values to the kernel's type."""
    compute = call.kernel.compute_dtype(x.q.dtype)
    dout, q, out = x.dout.to(compute).contiguous(), x.q.to(compute), x.out.to(compute)
    return x._replace(dout=dout, q=q, out=out)


def gradients_at_once(
    plan: RankPlan, call: Call, x: BackwardInputs, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns dq, dk and dv if one call of the kernel computes them; None otherwise.

    They have the type that the kernel returns, because nothing is added to them.
    """
    if not plan.is_alone or dlse is not None or call.expansion is not None:
        return None
    own, tiles = plan.rounds[0], call.tile_calls(plan.rounds[0])
    if len(tiles) > 1 or len(plan.groups) > 1:
        return None
    ((heads, _),) = plan.groups
    kernel = call.kernel_of(own, tiles[0], heads[0], x.q.device)
    inputs = _operands(call, x)
    k, v = x.k.to(inputs.q.dtype), x.v.to(inputs.q.dtype)
    with traced("attention tile, backward"):
        dq, dk, dv = tiles[0].backward(kernel, inputs._replace(k=k, v=v), call.scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


class Gradients:
    """Sums of the gradients of one arrival of keys; gradients of queries go to ``queries.dq``.

    The memory is not cleared first: the first contribution is stored and the others are added.

    Args:
        packed: memory for the sums, a message as long as ``keys``.
    """

    def __init__(
        self,
        call: Call,
        queries: BackwardQueries,
        round_: RankRound,
        keys: KeyValues,
        packed: Tensor,
    ) -> None:
        self._call, self._round, self._queries, self._keys = call, round_, queries, keys
        self.grads = KeyValues.unpack(packed, keys)
        if call.expansion is not None:  # it adds to the gradients of the message
            packed.zero_()

    @classmethod
    def of_shard(
        cls, plan: RankPlan, call: Call, queries: BackwardQueries, shard: KeyValues
    ) -> Gradients:
        """Gradients of this rank's keys. They outlive the pass, so they get memory of their own."""
        own, dtype = plan.rounds[0], accumulation_dtype(shard.k.dtype)
        if not (plan.sums_own_keys or queries.dlse is not None or call.expansion is not None):
            dtype = queries.q.dtype
        shape = shard.message_shape(shard.k.shape[1])
        packed = torch.empty(shape, dtype=dtype, device=queries.dq.device)
        return cls(call, queries, own, shard, packed)

    def zero(self, groups: Sequence[HeadGroup], *, queries: bool) -> None:
        """Clears the gradients of keys and, with ``queries``, those of the heads' queries."""
        for (q0, q1), (k0, k1) in groups:
            self.grads.k[:, :, k0:k1].zero_()
            self.grads.v[:, :, k0:k1].zero_()
            if queries:
                self._queries.dq[:, :, q0:q1].zero_()

    def store_own(self, groups: Sequence[HeadGroup]) -> None:
        """Computes the gradients of this rank's keys; ``first`` tiles cover everything once."""
        self._accumulate(groups, store_rows=True, store_columns=True)

    def store_remote(self, groups: Sequence[HeadGroup]) -> None:
        """Computes the gradients of another rank's keys. Only the rows have gradients already."""
        tiles = self._round.tiles
        num_keys = self._keys.k.shape[1]
        whole = len(tiles) == 1 and tiles[0].k1 - tiles[0].k0 == num_keys
        if not whole:
            self.zero(groups, queries=False)
        self._accumulate(groups, store_whole=whole)

    def add(self, groups: Sequence[HeadGroup], *, queries: bool) -> None:
        """Computes the tiles and adds to gradients that exist, with ``queries`` to all of them.

        Without it, those of the heads' queries do not exist, and ``first`` tiles cover them.
        """
        self._accumulate(groups, store_rows=not queries)

    def _accumulate(
        self,
        groups: Sequence[HeadGroup],
        *,
        store_rows: bool = False,
        store_columns: bool = False,
        store_whole: bool = False,
    ) -> None:
        """Computes the tiles of the round and writes or adds their gradients.

        Args:
            groups: the heads.
            store_rows: ``first`` tiles overwrite the gradients of their rows.
            store_columns: ``first`` tiles overwrite the gradients of their columns.
            store_whole: the only tile overwrites the gradients of all columns.
        """
        call, queries = self._call, self._queries
        for part in call.portions(self._round, self._keys, groups, self.grads):
            assert part.grads is not None
            inputs = queries.inputs(part.keys.to(queries.q.dtype))
            for tile in call.tile_calls(self._round):
                kernel = call.kernel_of(self._round, tile, part.heads.start, inputs.q.device)
                with traced("attention tile, backward"):
                    tensors = inputs.part(tile.rows, tile.columns, part.heads)
                    dq, dk, dv = tile.backward(kernel, tensors, call.scale)
                store_keys = store_whole or (store_columns and tile.first)
                dq_sum = queries.dq[:, tile.rows, part.heads]
                _write(dq_sum, dq, store=store_rows and tile.first)
                _write(part.grads.k[:, tile.columns], dk, store=store_keys)
                _write(part.grads.v[:, tile.columns], dv, store=store_keys)
                if queries.dlse is not None:
                    tensors = _of_lse(tensors, queries.dlse[:, part.heads, tile.rows])
                    dq, dk, _ = tile.backward(call.kernel, tensors, call.scale)
                    dq_sum += dq
                    part.grads.k[:, tile.columns].add_(dk)


def _write(target: Tensor, value: Tensor, *, store: bool) -> None:
    if store:
        target.copy_(value)
    else:
        target += value


def _of_lse(x: BackwardInputs, dlse: Tensor) -> BackwardInputs:
    """Returns inputs for which a kernel's dq and dk are those of the lse alone.

    A kernel computes dS = P (dout v^T - sum(dout out)), and the lse adds P dlse to it. That is dS
    for one value channel of ones, dout = dlse and out = 0. This needs a second call. One more
    channel in the first call would not do: the kernel may not take a wider head, and dropout, which
    changes P in the first call, does not change the lse.

    Args:
        x: the inputs of the first call.
        dlse: [B, H, Q].
    """
    dout = rearrange(dlse, "b h q -> b q h 1").to(x.dout.dtype).contiguous()
    ones = x.v.new_ones((*x.v.shape[:3], 1))
    return x._replace(dout=dout, v=ones, out=torch.zeros_like(dout))
