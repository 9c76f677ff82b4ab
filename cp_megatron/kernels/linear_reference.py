"""Linear recurrences block by block in torch's own functions: the reference on any device.

One head, token t, all vectors columns, with decay a_t = exp(g_t) and learning rate b_t:

    S_t = a_t S_{t-1} + k_t u_t^T        o_t = scale * S_t^T q_t
    u_t = b_t (v_t - a_t S_{t-1}^T k_t)  the delta rule; without b, u_t = v_t

a_t is a number (gated DeltaNet, Mamba-2) or one per channel of the key (KDA, GLA). In a block that
the state S enters, with G the running sum of g, this is (Yang et al. 2024, arXiv:2406.06484 and
2412.06464, in which T = (1 + A)^-1 is called the WY or UT transform)

    A_ij = b_i k_i^T e^(G_i - G_j) k_j      for j < i         (1 + A) u = b (v - e^G k S)
    P_ij = scale q_i^T e^(G_i - G_j) k_j    for j <= i        o = scale e^G q S + P u
    S_out = e^(G_end) S + K^T u             K_j = e^(G_end - G_j) k_j

restricted by three masks to tokens of one document (``plan/state_blocks.py``). Only differences
G_i - G_j with j <= i are exponentiated. They are at most 0, so nothing overflows.

Shapes: B batch, n blocks, C tokens of a block, G key heads, H value heads (a multiple of G),
D key dim, E value dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SUB_BLOCK = 16
"""Tokens whose products with a decay per channel are computed pair by pair."""


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


def apply_transition(transition: Tensor, state: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiplies M, or M^T, [.., D, D], [.., D, 1] or [.., 1, 1] by S [.., D, E]."""
    if transition.shape[-1] == 1:  # a factor of each row, or a matrix with one element
        return transition * state
    return (transition.mT if transposed else transition) @ state


@dataclass(frozen=True)
class _Decayed:
    """What both functions below compute first.

    Attributes:
        k: keys of every value head, [B, n, H, C, D].
        q: the same of queries, with the scale.
        running: running sum of g, [B, n, H, C, 1 or D].
        entering: running, -inf where the entering state is not read.
        products: P of the equations, [B, n, H, C, C].
        lower: A of the equations; None without the delta rule.
        kept: K of the equations, [B, n, H, C, D].
    """

    q: Tensor
    k: Tensor
    running: Tensor
    entering: Tensor
    products: Tensor
    lower: Tensor | None
    kept: Tensor

    @classmethod
    def of(cls, x: BlockInputs, masks: BlockMasks, scale: float) -> _Decayed:
        repeats = x.v.shape[2] // x.k.shape[2]
        q, k = (y.repeat_interleave(repeats, dim=2) for y in (x.q * scale, x.k))
        running = x.g.cumsum(3)
        if running.ndim == 4:
            running = running[..., None]
        reads = masks.reads[:, None]  # [n, 1, C, C]
        lower = None
        if x.beta is not None:
            lower = x.beta[..., None] * _products(k, k, running, reads.tril(-1))
        entering = running.masked_fill(~masks.enters[:, None, :, None], float("-inf"))
        left = (running[..., -1:, :] - running).masked_fill(
            ~masks.leaves[:, None, :, None], float("-inf")
        )
        return cls(q, k, running, entering, _products(q, k, running, reads), lower, left.exp() * k)

    def solve(self, right: Tensor) -> Tensor:
        """Solves (1 + A) x = ``right`` for x, both [B, n, H, C, any]."""
        assert self.lower is not None
        # The diagonal is not read.
        return torch.linalg.solve_triangular(self.lower, right, upper=False, unitriangular=True)

    def end(self, carries: Tensor) -> Tensor:
        """Returns e^(G_end), or 0 where no state passes the block: [B, n, H, 1 or D, 1]."""
        return self.running[..., -1, :, None].exp() * carries[:, None, None, None]


def summarize(x: BlockInputs, masks: BlockMasks, scale: float) -> BlockMaps:
    """Computes the affine maps of all blocks."""
    d = _Decayed.of(x, masks, scale)
    reads, transition = d.entering.exp() * d.q, d.end(masks.carries)
    if x.beta is None:
        return BlockMaps(transition, d.kept.mT @ x.v, reads, d.products @ x.v)
    beta = x.beta[..., None]
    right = torch.cat((beta * x.v, beta * (d.entering.exp() * d.k)), dim=-1)
    own, entered = d.solve(right).split((x.v.shape[-1], d.k.shape[-1]), dim=-1)
    identity = torch.eye(d.k.shape[-1], dtype=own.dtype, device=own.device)
    return BlockMaps(
        transition * identity - d.kept.mT @ entered,
        d.kept.mT @ own,
        reads - d.products @ entered,
        d.products @ own,
    )


def step(x: BlockInputs, masks: BlockMasks, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """Computes what leaves every block, given the state that enters it, for autograd.

    Args:
        x, masks, scale: the blocks.
        state: [B, n, H, D, E].

    Returns:
        out [B, n, H, C, E] and the states that leave, [B, n, H, D, E].
    """
    d = _Decayed.of(x, masks, scale)
    decay = d.entering.exp()
    u = x.v
    if x.beta is not None:
        u = d.solve(x.beta[..., None] * (x.v - (decay * d.k) @ state))
    out = (decay * d.q) @ state + d.products @ u
    return out, d.end(masks.carries) * state + d.kept.mT @ u


def _products(rows: Tensor, keys: Tensor, running: Tensor, mask: Tensor) -> Tensor:
    """Computes rows_i^T e^(G_i - G_j) keys_j where ``mask`` [n, 1, C, C] is True, else 0."""
    if running.shape[-1] == 1:
        decay = (running - running.mT).masked_fill(~mask, float("-inf")).exp()
        return (rows @ keys.mT) * decay
    return torch.cat(
        [
            _products_of_rows(rows, keys, running, mask, start)
            for start in range(0, rows.shape[-2], SUB_BLOCK)
        ],
        dim=-2,
    )


def _products_of_rows(
    rows: Tensor, keys: Tensor, running: Tensor, mask: Tensor, start: int
) -> Tensor:
    """Computes the rows of one sub-block, with a decay per channel.

    With the keys before it, e^(G_i - G_j) is e^(G_i - G_start) times e^(G_start - G_j), and both
    are at most 1. With its own keys, it is computed for every pair.
    """
    stop, length = min(start + SUB_BLOCK, rows.shape[-2]), rows.shape[-2]
    here, own = slice(start, stop), running[..., start:stop, :]
    reference = running[..., start : start + 1, :]
    before = (rows[..., here, :] * (own - reference).exp()) @ (
        keys[..., :start, :] * (reference - running[..., :start, :]).exp()
    ).mT
    pairs = own[..., :, None, :] - own[..., None, :, :]  # [.., i, j, D]
    pairs = pairs.masked_fill(~mask[..., here, here, None], float("-inf")).exp()
    inside = torch.einsum(
        "...id,...jd,...ijd->...ij", rows[..., here, :], keys[..., here, :], pairs
    )
    after = inside.new_zeros((*inside.shape[:-1], length - stop))
    found = torch.cat((before, inside, after), dim=-1)
    return found.masked_fill(~mask[..., here, :], 0.0)
