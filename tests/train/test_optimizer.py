"""AdamW follows the flags, and decays matrices only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cp_megatron.config import OptimizerConfig
from cp_megatron.train.optimizer import make_optimizer, update


def test_matrices_decay_and_vectors_do_not() -> None:
    model = nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = make_optimizer(model.parameters(), OptimizerConfig(lr=0.5, weight_decay=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in model.named_parameters():
        shrunk = 1 - 0.5 * 0.1 if value.ndim == 2 else 1.0
        torch.testing.assert_close(value, before[name] * shrunk)


def test_the_moments_follow_the_flags() -> None:
    config = OptimizerConfig(adam_beta1=0.6, adam_beta2=0.7, adam_eps=1e-3)
    optimizer = make_optimizer(nn.Linear(2, 2).parameters(), config)
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.6, 0.7), 1e-3)


def test_a_model_of_matrices_alone_is_fine() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2, bias=False).parameters(), OptimizerConfig())
    assert len(optimizer.param_groups) == 1


def trained(dtype: torch.dtype, *, skip: bool | None, divisor: float | None) -> list[torch.Tensor]:
    """Parameters and state after two updates, the second of which is asked for as given."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=dtype)
    optimizer = make_optimizer(model.parameters(), OptimizerConfig(lr=0.1, weight_decay=0.1))
    for number in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        second = number == 1
        update(
            optimizer,
            skip=torch.tensor(skip) if second and skip is not None else None,
            divisor=torch.tensor(divisor).double() if second and divisor is not None else None,
        )
    state = [x for held in optimizer.state.values() for x in held.values()]
    return [*(x.detach() for x in (*model.parameters(), *state))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_update_changes_nothing_and_another_is_as_usual(dtype: torch.dtype) -> None:
    plain = trained(dtype, skip=None, divisor=None)
    assert all(map(torch.equal, trained(dtype, skip=False, divisor=1.0), plain))
    assert not all(map(torch.equal, trained(dtype, skip=False, divisor=3.0), plain))
    once = trained(dtype, skip=True, divisor=3.0)
    assert [float(x) for x in once if x.ndim == 0] == [1.0, 1.0], "the counts of updates"
    assert not any(map(torch.equal, once, plain))
    assert all(map(torch.equal, once, trained(dtype, skip=True, divisor=float("nan"))))


def test_gradients_are_divided_exactly() -> None:
    parameter = nn.Parameter(torch.zeros(1000, dtype=torch.float64))
    optimizer = make_optimizer([parameter], OptimizerConfig())
    gradient = torch.randn(1000, dtype=torch.float64)
    parameter.grad = gradient.clone()
    update(optimizer, skip=None, divisor=torch.tensor(1.1, dtype=torch.float64))
    assert torch.equal(parameter.grad, gradient / torch.tensor(1.1, dtype=torch.float64))
