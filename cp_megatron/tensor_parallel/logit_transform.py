"""What lies between the products of the output layer and the logits: a multiplier and a softcap.

Shapes: n tokens, v padded vocabulary; this rank has v/tp columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cp_megatron.kernels.interface import accumulation_dtype


@dataclass(frozen=True, kw_only=True)
class LogitTransform:
    """logit = softcap * tanh(multiplier * product / softcap), in the type of sums.

    The softcap is that of Gemma 2 (2024, arXiv:2408.00118, section 2). The padding of the
    vocabulary is set to -inf afterwards, because a softcap would turn -inf into -softcap.

    Attributes:
        multiplier: of the products.
        softcap: the bound of the logits; None: there is none.
    """

    multiplier: float = 1.0
    softcap: float | None = None

    def forward(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products [.., v/tp] in the type of sums, whose memory is used again -> logits.

        Autograd may differentiate it.

        Returns:
            The logits and, if there is a softcap, the tanh, for ``backward_``.
        """
        if self.softcap is None:
            return (products if self.multiplier == 1.0 else products.mul_(self.multiplier)), None
        bounded = products.mul_(self.multiplier / self.softcap).tanh_()
        return bounded * self.softcap, bounded

    def backward_(self, grad: Tensor, bounded: Tensor | None) -> None:
        """Turns the gradient of the logits [n, v/tp] in place into that of multiplier * products.

        The derivative is 1 - tanh^2. The memory of ``bounded`` is used again.
        """
        if bounded is not None:
            grad.addcmul_(grad, bounded.square_(), value=-1)

    def logits(self, products: Tensor) -> Tensor:
        """Products [.., v/tp] of any floating dtype -> logits of that type, rounded once."""
        if self == LogitTransform():
            return products
        exact, _ = self.forward(products.to(accumulation_dtype(products.dtype)))
        return exact.to(products.dtype)


def rounded(multiplier: float, dtype: torch.dtype) -> float:
    """The nearest number to ``multiplier`` that ``dtype`` has."""
    return torch.tensor(multiplier, dtype=dtype, device="cpu").item()
