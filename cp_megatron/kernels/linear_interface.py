"""The interface of kernels of linear recurrences: all tokens of one rank, without messages.

``linear_reference.py`` gives the equations, ``plan/states.py`` the pieces. A kernel belongs to one
rank's pieces, which it gets when it is made. Forward is two calls and backward two, with an
exchange of states between them:

    summarize   the affine maps that the pieces are of states
    apply       the output, given the states that enter
    adjoint     the gradients of the states that enter, without what leaves
    backward    all gradients, given the states that enter and the gradients of those that leave

Nothing but the inputs and states is kept from forward to backward.

Shapes: B batch, S tokens of the shard, G key heads, H value heads (a multiple of G; head h reads
key head h // (H / G)), D key dim, E value dim; i, o and t the pieces that a state enters, leaves
and passes through, in the order of their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class LinearInputs(NamedTuple):
    """The arguments of a recurrence.

    q, k [B, S, G, D]; v [B, S, H, E]; g [B, S, H] or [B, S, H, D], the logarithm of the decay; beta
    [B, S, H], or None without the delta rule; scale multiplies the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    scale: float


class LinearSummary(NamedTuple):
    """What the pieces do to states, in the type of sums (float32, float64 for float64).

    Attributes:
        increments: U of leaving pieces, [B, o, H, D, E].
        transitions: M of through pieces: [B, t, H, D, D] with the delta rule, otherwise
            [B, t, H, D, 1] or [B, t, H, 1, 1], a factor of each row.
        parts: what else the kernel computed and ``apply`` needs.
    """

    increments: Tensor
    transitions: Tensor
    parts: Sequence[Tensor] = ()


class LinearKernel(Protocol):
    """A backend, made for the pieces of one rank."""

    def summarize(self, x: LinearInputs) -> LinearSummary:
        """Computes everything that does not depend on other ranks."""
        ...

    def apply(self, x: LinearInputs, summary: LinearSummary, entering: Tensor | None) -> Tensor:
        """Returns the output in v's type.

        Args:
            x: as before.
            summary: what ``summarize`` returned. Its tensors may be overwritten.
            entering: the states that enter pieces, [B, i, H, D, E]; None if no rank has a chain.
        """
        ...

    def adjoint(self, x: LinearInputs, dout: Tensor) -> Tensor:
        """Returns the gradients of entering states through ``dout`` [B, S, H, E], [B, i, H, D, E].

        What a state contributes to later pieces is not part of them.
        """
        ...

    def backward(
        self, x: LinearInputs, dout: Tensor, entering: Tensor | None, leaving: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Returns the gradients of q, k, v, g and, if there is one, beta, in their types.

        Args:
            x: as in forward.
            dout: the gradient of the output, [B, S, H, E].
            entering: the states that enter pieces, [B, i, H, D, E]; None if no rank has a chain.
            leaving: the gradients of those that leave, [B, o, H, D, E]; None likewise.
        """
        ...


def apply_transition(transition: Tensor, state: Tensor, *, transposed: bool = False) -> Tensor:
    """Multiplies M, or M^T, [.., D, D], [.., D, 1] or [.., 1, 1] by S [.., D, E]."""
    if transition.shape[-1] == 1:  # a factor of each row, or a matrix with one element
        return transition * state
    return (transition.mT if transposed else transition) @ state
