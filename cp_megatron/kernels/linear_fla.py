"""Linear recurrences by ``fla``, the package flash-linear-attention. Only this file imports it.

Its functions take packed sequences, the states that enter them, and return the output and the
states that leave. The pieces are cut into *segments*, each within one document. Those that a state
enters or leaves are computed apart from whole documents, because a state would otherwise be written
for every document.

With the delta rule, M of a segment is read off its results: values [v, 0] and the entering state
[0, I] give the output [out, Q_eff] and the leaving state [U, M]. Without it, M is the product of
the decays.

The four functions are called with arguments of fla 0.6: no normalization, no gate inside.

Shapes: as in ``linear_interface.py``; T tokens of some segments, s these segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype
from cp_megatron.kernels.linear_interface import LinearInputs, LinearSummary
from cp_megatron.plan.mask import Mask
from cp_megatron.plan.states import Piece

Recurrence = Callable[..., tuple[Tensor, Tensor | None]]


class FlaFunctions(NamedTuple):
    """The functions of the package, or a double of them."""

    chunk_gated_delta_rule: Recurrence
    chunk_kda: Recurrence
    chunk_simple_gla: Recurrence
    chunk_gla: Recurrence


@cache
def load_fla() -> FlaFunctions:
    """Loads the package.

    Raises:
        ImportError: it is not installed, or does not support this machine.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    return FlaFunctions(chunk_gated_delta_rule, chunk_kda, chunk_simple_gla, chunk_gla)


class _Segment(NamedTuple):
    start: int  # its first token in the shard
    stop: int
    enters: bool
    leaves: bool


class _Segments:
    """Some segments of a shard, one after the other."""

    def __init__(self, segments: Sequence[_Segment], device: torch.device) -> None:
        lengths = [x.stop - x.start for x in segments]
        self._edges = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        places = [np.arange(x.start, x.stop) for x in segments]
        self.tokens = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *places])).to(device)
        self.entering = [i for i, x in enumerate(segments) if x.enters]
        self.leaving = [i for i, x in enumerate(segments) if x.leaves]
        self.through = [i for i in self.leaving if segments[i].enters]
        self._by_batch: dict[int, Tensor] = {}
        self.spans = list(zip(self._edges[:-1].tolist(), self._edges[1:].tolist()))

    def edges(self, batch: int) -> Tensor:
        """int64 [B * s + 1]: the cumulative lengths of ``batch`` rows, made once.

        The package caches what it derives from them by the identity of the tensor.
        """
        if batch not in self._by_batch:
            total = self._edges[-1]
            rows = [self._edges[1:] + row * total for row in range(batch)]
            edges = np.concatenate([[0], *rows]).astype(np.int64)
            self._by_batch[batch] = torch.from_numpy(edges).to(self.tokens.device)
        return self._by_batch[batch]


class LinearFla:
    """A ``LinearKernel``.

    Args:
        functions: those of the package.
        mask: the documents.
        pieces: those of this rank, in order.
        device: where the tokens are.
    """

    def __init__(
        self, functions: FlaFunctions, mask: Mask, pieces: Sequence[Piece], device: torch.device
    ) -> None:
        self._functions = functions
        segments = [segment for piece in pieces for segment in _cut(mask, piece)]
        carried = [x for x in segments if x.enters or x.leaves]
        self._whole = _Segments([x for x in segments if not (x.enters or x.leaves)], device)
        self._carried = _Segments(carried, device)
        self._entering = _Segments([x for x in carried if x.enters], device)
        self._leaving = _Segments([x for x in carried if x.leaves], device)

    def summarize(self, x: LinearInputs) -> LinearSummary:
        """Computes the states that leave, from empty ones and, for M, from the identity."""
        of, (dim, width) = self._leaving, (x.k.shape[3], x.v.shape[3])
        x = _taken(x, of)
        if x.beta is None or not of.through:
            states = self._run(x, of, None, states=True)[1]
            return LinearSummary(states, self._decays(x, of))
        initial = self._empty(x, of, width + dim)
        _set_identity(initial, of.through, width)
        padded = x._replace(v=F.pad(x.v, (0, dim)))
        states = self._run(padded, of, initial, states=True)[1]
        return LinearSummary(states[..., :width].contiguous(), states[:, of.through, ..., width:])

    def apply(self, x: LinearInputs, summary: LinearSummary, entering: Tensor | None) -> Tensor:
        """Runs all tokens, now from the states that enter."""
        out = torch.empty_like(x.v)
        for of in (self._whole, self._carried):
            if len(of.tokens):
                part = _taken(x, of)
                initial = self._initial(part, of, entering)
                out[:, of.tokens] = self._run(part, of, initial, states=False)[0].to(out.dtype)
        return out

    def adjoint(self, x: LinearInputs, dout: Tensor) -> Tensor:
        """Computes Q_eff^T dout of each segment that a state enters."""
        of, dim = self._entering, x.k.shape[3]
        x, dout = _taken(x, of), dout[:, of.tokens].to(accumulation_dtype(x.v.dtype))
        grads = self._empty(x, of)
        if not of.spans:
            return grads
        if x.beta is None:
            reads = None
        else:
            initial = self._empty(x, of, dim)
            _set_identity(initial, of.entering, 0)
            zeros = x.v.new_zeros(*x.v.shape[:3], dim)
            reads = self._run(x._replace(v=zeros), of, initial, states=False)[0]
        for i, span in enumerate(of.spans):
            here = slice(*span)
            read = _decayed_queries(x, here) if reads is None else reads[:, here].to(dout.dtype)
            grads[:, i] = torch.einsum("bshd,bshe->bhde", read, dout[:, here])
        return grads

    def backward(
        self, x: LinearInputs, dout: Tensor, entering: Tensor | None, leaving: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Differentiates the package's functions by its own autograd."""
        given = [y for y in x[:5] if y is not None]
        grads = [torch.empty_like(y) for y in given]
        for of in (self._whole, self._carried):
            if not len(of.tokens):
                continue
            part = _taken(x, of)
            inputs = [y.detach().requires_grad_() for y in part[:5] if y is not None]
            q, k, v, g, *rate = inputs
            part = LinearInputs(q, k, v, g, rate[0] if rate else None, x.scale)
            initial, states = self._initial(part, of, entering), bool(of.leaving)
            dresults = [dout[:, of.tokens].to(x.v.dtype)]
            with torch.enable_grad():
                out, last = self._run(part, of, initial, states=states)
                results = [out]
                if states:
                    assert leaving is not None
                    results, dresults = [out, last[:, of.leaving]], [*dresults, leaving]
            found = torch.autograd.grad(results, inputs, dresults)
            for target, grad in zip(grads, found):
                target[:, of.tokens] = grad.to(target.dtype)
        return tuple(grads)

    def _run(
        self, x: LinearInputs, of: _Segments, initial: Tensor | None, *, states: bool
    ) -> tuple[Tensor, Tensor]:
        """Calls the function for these inputs.

        Args:
            x: the tokens of the segments, [B, T, ..].
            of: the segments.
            initial: [B, s, H, D, E], or None for empty ones.
            states: whether the states that leave are needed.

        Returns:
            out [B, T, H, E], and the states that leave, [B, s, H, D, E]; without ``states``, an
            empty tensor.
        """
        batch, heads = x.v.shape[0], x.v.shape[2]
        if not of.spans:
            width = x.v.shape[3]
            return x.v, x.v.new_empty(batch, 0, heads, x.k.shape[3], width, dtype=_exact(x))
        function, q, k = self._function(x), x.q, x.k
        if x.beta is None:  # these two functions need as many key heads as value heads
            q, k = (y.repeat_interleave(heads // y.shape[2], dim=2) for y in (q, k))
        tokens: dict[str, Any] = {"q": q, "k": k, "v": x.v, "g": x.g}
        tokens |= {} if x.beta is None else {"beta": x.beta}
        packed = {name: rearrange(y, "b t ... -> 1 (b t) ...") for name, y in tokens.items()}
        start = None if initial is None else rearrange(initial, "b s ... -> (b s) ...")
        out, last = function(
            **packed,
            scale=x.scale,
            initial_state=start,
            output_final_state=states,
            cu_seqlens=of.edges(batch),
        )
        out = rearrange(out, "1 (b t) h e -> b t h e", b=batch)
        if not states:
            return out, out.new_empty(0)
        assert last is not None
        return out, rearrange(last, "(b s) h d e -> b s h d e", b=batch)

    def _function(self, x: LinearInputs) -> Recurrence:
        with_rule, per_channel = x.beta is not None, x.g.ndim == 4
        if with_rule:
            functions = self._functions
            return functions.chunk_kda if per_channel else functions.chunk_gated_delta_rule
        return self._functions.chunk_gla if per_channel else self._functions.chunk_simple_gla

    @staticmethod
    def _empty(x: LinearInputs, of: _Segments, width: int | None = None) -> Tensor:
        """Returns empty states [B, s, H, D, E], or of another width than E."""
        sizes = x.v.shape[0], len(of.spans), x.v.shape[2], x.k.shape[3]
        return x.v.new_zeros(*sizes, width or x.v.shape[3], dtype=_exact(x))

    def _initial(self, x: LinearInputs, of: _Segments, entering: Tensor | None) -> Tensor | None:
        """Returns the states that enter the segments; None if none does."""
        if entering is None or not of.entering:
            return None
        initial = self._empty(x, of)
        initial[:, of.entering] = entering
        return initial

    @staticmethod
    def _decays(x: LinearInputs, of: _Segments) -> Tensor:
        """Returns M of the through segments, the product of their decays if there is no beta."""
        sizes = x.v.shape[0], len(of.through), x.v.shape[2]
        if x.beta is not None:
            dim = x.k.shape[3]
            return x.v.new_empty(*sizes, dim, dim, dtype=_exact(x))
        decays = x.v.new_empty(*sizes, x.k.shape[3] if x.g.ndim == 4 else 1, 1, dtype=_exact(x))
        for row, i in enumerate(of.through):
            total = x.g[:, slice(*of.spans[i])].sum(1, dtype=_exact(x)).exp()
            decays[:, row] = total.view(decays[:, row].shape)
        return decays


def _exact(x: LinearInputs) -> torch.dtype:
    return accumulation_dtype(x.v.dtype)


def _cut(mask: Mask, piece: Piece) -> list[_Segment]:
    """Cuts a piece at the starts of documents."""
    starts = mask.starts
    inside = starts[(starts > piece.start) & (starts < piece.stop)].tolist()
    edges = [edge - piece.start + piece.offset for edge in (piece.start, *inside, piece.stop)]
    last = len(edges) - 2
    return [
        _Segment(edges[i], edges[i + 1], piece.enters and i == 0, piece.leaves and i == last)
        for i in range(last + 1)
    ]


def _taken(x: LinearInputs, of: _Segments) -> LinearInputs:
    """Takes the tokens of the segments from a shard."""
    q, k, v, g = (y[:, of.tokens] for y in x[:4])
    beta = None if x.beta is None else x.beta[:, of.tokens]
    return LinearInputs(q, k, v, g, beta, x.scale)


def _set_identity(states: Tensor, segments: Sequence[int], column: int) -> None:
    """Writes the identity into columns from ``column`` on of the states of some segments."""
    dim = states.shape[3]
    identity = torch.eye(dim, dtype=states.dtype, device=states.device)
    states[:, segments, ..., column : column + dim] = identity


def _decayed_queries(x: LinearInputs, tokens: slice) -> Tensor:
    """Returns Q_eff of a segment without the delta rule, scale e^G q, [B, T, H, D]."""
    running = x.g[:, tokens].cumsum(1, dtype=_exact(x)).exp() * x.scale
    q = x.q[:, tokens].repeat_interleave(x.v.shape[2] // x.q.shape[2], dim=2)
    return (running if running.ndim == 4 else running[..., None]) * q
