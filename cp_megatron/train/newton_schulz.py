"""Newton-Schulz iterations: a matrix with the same singular vectors and singular values near 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, cycle, islice, repeat

import torch
from torch import Tensor

from cp_megatron.config.schema.optimizer_config import MuonCoefficients

_LEAST_NORM = 1e-15
"""A matrix of zeros has the result zero."""

_SETS: Mapping[MuonCoefficients, Sequence[tuple[float, float, float]]] = {
    # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; as in torch.optim.Muon
    "simple": [(3.4445, -4.7750, 2.0315)],
    # Cesista et al. 2025, https://leloykun.github.io/ponder/muon-opt-coeffs/
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    # Amsel et al. 2025, arXiv:2505.16932, algorithm 1, with its safety factor 1.01
    "polar_express": [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ],
}


def coefficients(kind: MuonCoefficients, steps: int) -> list[tuple[float, float, float]]:
    """The coefficients (a, b, c) of each step, rounded as Megatron-LM's optimizers have them.

    After its last step, Polar Express repeats that step; the others begin again.
    """
    known = _SETS[kind]
    endless = chain(known, repeat(known[-1])) if kind == "polar_express" else cycle(known)
    return list(islice(endless, steps))


def orthogonalize(
    matrices: Tensor, steps: Sequence[tuple[float, float, float]], dtype: torch.dtype
) -> Tensor:
    """Applies x -> a x + b (x x^T) x + c (x x^T)^2 x to matrices of Frobenius norm 1.

    Args:
        matrices: [matrices, m, n]; they are not modified.
        steps: the coefficients (a, b, c) of each step.
        dtype: the type of the products and of the result.

    Returns:
        [matrices, m, n].
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices  # the products are of the shorter side
    exact = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=exact)
    x = (x / norm.clamp(min=_LEAST_NORM)).to(dtype)
    for a, b, c in steps:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if is_tall else x
