"""Turns the products of the output layer into logits, by a multiplier and a softcap.

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
        multiplier: the factor of the products.
        softcap: the bound of the logits; None: they have none.
    """

    multiplier: float = 1.0
    softcap: float | None = None

    def forward(self, products: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products [.., v/tp] in the type of sums -> logits [.., v/tp] in the same type.

        The products are overwritten. Autograd can differentiate this method; a caller that does
        without it calls ``backward_``.

        Returns:
            The logits, and the tanh that ``backward_`` needs; None without a softcap.
        """
        if self.softcap is None:
            return (products if self.multiplier == 1.0 else products.mul_(self.multiplier)), None
        bounded = products.mul_(self.multiplier / self.softcap).tanh_()
        return bounded * self.softcap, bounded

    def backward_(self, grad: Tensor, bounded: Tensor | None) -> None:
        """Turns the gradient of the logits [n, v/tp] in place into that of multiplier * products.

        The factor is 1 - tanh^2. ``bounded`` is overwritten.
        """
        if bounded is not None:
            grad.addcmul_(grad, bounded.square_(), value=-1)

    def logits(self, products: Tensor) -> Tensor:
        """Products [.., v/tp] of any floating dtype -> logits of that type, rounded once."""
        if self == LogitTransform():
            return products
        exact, _ = self.forward(products.to(accumulation_dtype(products.dtype)))
        return exact.to(products.dtype)


@dataclass(frozen=True, kw_only=True)
class VocabularyPart:
    """This rank's columns of the vocabulary.

    Attributes:
        first: the id of the first column.
        num_valid: number of columns that are not padding. The others, whatever they hold, are
            never predicted.
        transform: how products become logits.
    """

    first: int
    num_valid: int
    transform: LogitTransform


def rounded(multiplier: float, dtype: torch.dtype) -> float:
    """The nearest number to ``multiplier`` that ``dtype`` has."""
    return torch.tensor(multiplier, dtype=dtype, device="cpu").item()
