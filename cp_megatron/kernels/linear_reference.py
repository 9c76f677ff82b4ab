"""Linear recurrences block by block in torch's own functions: the reference on any device.

One head, token t, all vectors columns, with decay a_t = exp(g_t) and learning rate b_t:

    S_t = a_t S_{t-1} + k_t u_t^T        o_t = scale * S_t^T q_t
    u_t = b_t (v_t - a_t S_{t-1}^T k_t)  the delta rule; without b, u_t = v_t

a_t is a number (gated DeltaNet, Mamba-2) or one per channel of the key (KDA, GLA). In a block that
the state S enters, with G the running sum of g in each document, this is (Yang et al. 2024,
arXiv:2406.06484 and 2412.06464, in which T = (1 + A)^-1 is called the WY or UT transform)

    A_ij = b_i k_i^T e^(G_i - G_j) k_j      for j < i         (1 + A) u = b (v - e^G k S)
    P_ij = scale q_i^T e^(G_i - G_j) k_j    for j <= i        o = scale e^G q S + P u
    S_out = e^(G_end) S + K^T u             K_j = e^(G_end - G_j) k_j

restricted by three masks to tokens of one document (``plan/state_blocks.py``). Only differences
G_i - G_j with j <= i are exponentiated. They are at most 0, so nothing overflows.

Shapes: B batch, n blocks, C tokens of a block, G key heads, H value heads (a multiple of G),
D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cp_megatron.plan.linear_tiles import SUB_BLOCK


class BlockMasks(NamedTuple):
    """The masks of ``StateBlocks``: reads bool [n, C, C], enters and leaves [n, C], carries [n]."""

    reads: Tensor
    enters: Tensor
    leaves: Tensor
    carries: Tensor


class BlockInputs(NamedTuple):
    """The tokens of blocks, in the type of sums.

    q, k [B, n, G, C, D]; v [B, n, H, C, E]; g [B, n, H, C] or [B, n, H, C, D]; beta [B, n, H, C],
    or None without the delta rule. Padding is zero everywhere.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None


class BlockMaps(NamedTuple):
    """Blocks as affine maps of the state that enters.

    S_out = transition S + increment, out = reads S + local. transition is [B, n, H, D, D] with the
    delta rule, otherwise [B, n, H, D, 1] or [B, n, H, 1, 1], a factor of each row; increment
    [B, n, H, D, E], reads [B, n, H, C, D], local [B, n, H, C, E].
    """

    transition: Tensor
    increment: Tensor
    reads: Tensor
    local: Tensor


@dataclass(frozen=True)
class SolvedBlocks:
    """The terms of the equations that do not depend on a state. They can be differentiated.

    Attributes:
        queries: scale e^G q, 0 where the entering state is not read, [B, n, H, C, D].
        products: P of the equations, [B, n, H, C, C].
        values: u without an entering state, [B, n, H, C, E].
        entered: u = values - entered S, [B, n, H, C, D]; None without the delta rule.
        kept: K of the equations, [B, n, H, C, D].
        end: e^(G_end), or 0 where no state passes the block, [B, n, H, 1 or D, 1].
    """

    queries: Tensor
    products: Tensor
    values: Tensor
    entered: Tensor | None
    kept: Tensor
    end: Tensor

    @classmethod
    def of(cls, x: BlockInputs, masks: BlockMasks, scale: float) -> SolvedBlocks:
        """Computes the terms of all blocks."""
        repeats = x.v.shape[2] // x.k.shape[2]
        q, k = (y.repeat_interleave(repeats, dim=2) if repeats > 1 else y for y in x[:2])
        q = q * scale
        g = x.g[..., None] if x.g.ndim == 4 else x.g  # [B, n, H, C, 1 or D]
        reads = masks.reads[:, None]  # [n, 1, C, C]
        # G begins anew in each document: a sum over all documents of the block would lose the
        # digits of those with long memories to those with short ones.
        running = reads.to(g.dtype) @ g
        total = masks.leaves[:, None, None, :].to(g.dtype) @ g  # [B, n, H, 1, 1 or D]
        entering = running.masked_fill(~masks.enters[:, None, :, None], float("-inf")).exp()
        left = total - running
        kept = left.masked_fill(~masks.leaves[:, None, :, None], float("-inf")).exp() * k
        end = total.mT.exp() * masks.carries[:, None, None, None]
        queries, values, entered = entering * q, x.v, None
        if x.beta is None:
            products = _products([q], k, running, reads)[0]
        else:
            beta = x.beta[..., None]
            products, lower = _products([q, beta * k], k, running, reads)
            # The diagonal is not read: (1 + A)^-1.
            identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(
                lower, identity.expand_as(lower), upper=False, unitriangular=True
            )
            values = inverse @ (beta * x.v)
            entered = inverse @ ((beta * entering) * k)
        return cls(queries, products, values, entered, kept, end)

    def transition(self) -> Tensor:
        """Returns what multiplies the entering state, as in ``BlockMaps``."""
        if self.entered is None:
            return self.end
        moved = (self.kept.mT @ self.entered).neg_()
        moved.diagonal(dim1=-2, dim2=-1).add_(self.end[..., 0])
        return moved

    def increment(self) -> Tensor:
        """Returns the state that leaves if none enters, [B, n, H, D, E]."""
        return self.kept.mT @ self.values

    def reads(self) -> Tensor:
        """Returns what multiplies the entering state in the output, [B, n, H, C, D]."""
        if self.entered is None:
            return self.queries
        return self.queries - self.products @ self.entered

    def maps(self) -> BlockMaps:
        """Returns the blocks as affine maps."""
        local = self.products @ self.values
        return BlockMaps(self.transition(), self.increment(), self.reads(), local)

    def step(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Computes what leaves every block, given the state that enters it, [B, n, H, D, E].

        Returns:
            out [B, n, H, C, E] and the states that leave, [B, n, H, D, E].
        """
        u = self.values if self.entered is None else self.values - self.entered @ state
        out = self.queries @ state + self.products @ u
        return out, self.end * state + self.kept.mT @ u


def _products(rows: Sequence[Tensor], keys: Tensor, running: Tensor, mask: Tensor) -> list[Tensor]:
    """Computes rows_i^T e^(G_i - G_j) keys_j where ``mask`` [n, 1, C, C] is True, else 0."""
    if running.shape[-1] == 1:
        decay = (running - running.mT).masked_fill(~mask, float("-inf")).exp()
        return [(x @ keys.mT) * decay for x in rows]
    starts = range(0, keys.shape[-2], SUB_BLOCK)
    parts = [_products_of_rows(rows, keys, running, mask, start) for start in starts]
    return [torch.cat(of_rows, dim=-2) for of_rows in zip(*parts)]


def _products_of_rows(
    rows: Sequence[Tensor], keys: Tensor, running: Tensor, mask: Tensor, start: int
) -> list[Tensor]:
    """Computes the rows of one sub-block, with a decay per channel.

    With the keys before it, e^(G_i - G_j) is e^(G_i - G_start) times e^(G_start - G_j), and both
    are at most 1; where G is that of different documents, they are bounded and not read. With its
    own keys, it is computed for every pair.
    """
    stop, length = min(start + SUB_BLOCK, keys.shape[-2]), keys.shape[-2]
    here, own = slice(start, stop), running[..., start:stop, :]
    reference = running[..., start : start + 1, :]
    before_start = (reference - running[..., :start, :]).clamp(max=0).exp()
    earlier = (keys[..., :start, :] * before_start).mT
    decay = (own - reference).clamp(max=0).exp()
    pairs = own[..., :, None, :] - own[..., None, :, :]  # [.., i, j, D]
    pairs = pairs.masked_fill(~mask[..., here, here, None], float("-inf")).exp()
    pairs = pairs * keys[..., None, here, :]
    found = []
    for x in rows:
        before = (x[..., here, :] * decay) @ earlier
        inside = (pairs @ x[..., here, :, None]).squeeze(-1)
        after = inside.new_zeros((*inside.shape[:-1], length - stop))
        of_rows = torch.cat((before, inside, after), dim=-1)
        found.append(of_rows.masked_fill(~mask[..., here, :], 0.0))
    return found
