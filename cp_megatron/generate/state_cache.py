"""Keeps the states of recurrences, and the last inputs of convolutions, from one pass to the next.

Shapes: B = batch, S = new tokens, G = key heads, H = value heads, D = key dim, E = value dim,
c channels, W width of a convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.linear_interface import LinearInputs, apply_transition
from cp_megatron.kernels.load_kernel import load_linear_kernel
from cp_megatron.plan import Mask
from cp_megatron.plan.states import Piece


class StateCache:
    """The states of all layers for one batch of rows.

    Layers are numbered in the order in which the model calls them. What a pass computes is kept
    when all layers have run, so that a pass that was interrupted can be repeated.
    """

    def __init__(self) -> None:
        self._states: dict[int, Tensor] = {}  # [B, H, D, E] in the type of sums
        self._inputs: dict[int, Tensor] = {}  # [B, W - 1, c]
        self._next: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}

    def __bool__(self) -> bool:
        return bool(self._states or self._inputs)

    def commit(self) -> None:
        """Keeps what the pass that has ended computed."""
        self._states, self._inputs = map(dict, self._next)

    def convolve(self, layer: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Computes the convolution of the new tokens; the arguments are those of ``short_conv``.

        Returns:
            [B, S, c].
        """
        before = weight.shape[1] - 1
        earlier = self._inputs.get(layer, x.new_zeros(x.shape[0], before, x.shape[2]))
        known = torch.cat((earlier, x), dim=1)
        self._next[1][layer] = known[:, known.shape[1] - before :].clone()
        # [B, W - 1 + S, c] -> [B, c, S] -> [B, S, c]
        return F.conv1d(known.mT, weight.unsqueeze(1), bias, groups=x.shape[2]).mT

    def recur(self, layer: int, x: LinearInputs) -> Tensor:
        """Computes the recurrence of the new tokens, and keeps the state after them.

        Returns:
            [B, S, H, E] in v's type.
        """
        (batch, tokens, heads, v_dim), dim = x.v.shape, x.q.shape[3]
        exact = accumulation_dtype(x.v.dtype)
        empty = torch.zeros(batch, heads, dim, v_dim, dtype=exact, device=x.v.device)
        state = self._states.get(layer, empty)
        if tokens == 1:
            self._next[0][layer], out = _step(x, state)
            return out
        # The tokens are a piece that the state enters and leaves.
        piece = Piece(0, 1, tokens + 1, 0, enters=True, leaves=True, is_through=True)
        mask = Mask.causal(tokens + 1)
        kernel = load_linear_kernel("reference", mask, [piece], x.v.device)
        summary = kernel.summarize(x)
        moved = apply_transition(summary.transitions[:, 0], state)
        self._next[0][layer] = moved + summary.increments[:, 0]
        return kernel.apply(x, summary, state.unsqueeze(1))


def _step(x: LinearInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence of ``kernels/linear_reference.py``.

    Returns:
        the next state [B, H, D, E], and the output [B, 1, H, E].
    """
    exact, groups = state.dtype, x.v.shape[2] // x.q.shape[2]
    q, k = (y[:, 0].to(exact).repeat_interleave(groups, dim=1) for y in (x.q, x.k))  # [B, H, D]
    decay, u = x.g[:, 0].to(exact).exp(), x.v[:, 0].to(exact)
    # [B, H] or [B, H, D] -> a factor of each row of the state
    state = state * (decay[..., None, None] if decay.ndim == 2 else decay[..., None])
    if x.beta is not None:
        u = x.beta[:, 0, :, None].to(exact) * (u - torch.einsum("bhd,bhde->bhe", k, state))
    state = state + k[..., :, None] * u[..., None, :]
    out = x.scale * torch.einsum("bhd,bhde->bhe", q, state)
    return state, out.unsqueeze(1).to(x.v.dtype)
