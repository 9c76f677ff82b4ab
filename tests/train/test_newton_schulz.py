"""Newton-Schulz iterations bring singular values near 1 and keep singular vectors."""

from __future__ import annotations

import pytest
import torch

from cp_megatron.config.schema.optimizer_config import MuonCoefficients
from cp_megatron.train.newton_schulz import coefficients, orthogonalize


@pytest.mark.parametrize(
    ("kind", "steps", "bound"),
    [("simple", 5, 0.35), ("quintic", 5, 0.2), ("polar_express", 9, 0.01)],
)
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_singular_values_come_near_one(
    kind: MuonCoefficients, steps: int, bound: float, shape: tuple[int, int]
) -> None:
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    x = u * torch.linspace(0.2, 1, min(shape), dtype=torch.float64) @ v
    found = u.mT @ orthogonalize(x, coefficients(kind, steps), torch.float64) @ v.mT
    values = found.diagonal(dim1=-2, dim2=-1)
    assert (values - 1).abs().max() < bound
    assert (found - torch.diag_embed(values)).abs().max() < 1e-10


def test_zeros_stay_zeros_and_the_input_stays() -> None:
    x = torch.zeros(1, 2, 3)
    assert torch.equal(orthogonalize(x, coefficients("quintic", 5), torch.bfloat16).float(), x)


def test_coefficients_repeat() -> None:
    assert coefficients("quintic", 7)[5:] == coefficients("quintic", 2)
    assert len(set(coefficients("polar_express", 20)[7:])) == 1
