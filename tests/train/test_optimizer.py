"""The learning rate at steps where it is easily computed by hand, and weight decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cp_megatron.config import OptimizerConfig
from cp_megatron.config.schema import DecayStyle
from cp_megatron.train.optimizer import learning_rate, make_optimizer

LR, MIN_LR = 1.0, 0.2


def rates(style: DecayStyle, steps: int, *, warmup: int = 0, end: int | None = None) -> list[float]:
    config = OptimizerConfig(
        lr=LR, min_lr=MIN_LR, lr_decay_style=style, lr_warmup_iters=warmup, lr_decay_iters=end
    )
    return [learning_rate(step, config, steps) for step in range(1, steps + 1)]


def test_the_warm_up_rises_from_its_first_step_to_the_peak() -> None:
    found = rates("cosine", 10, warmup=4)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert found[4] < LR


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_the_decay_ends_at_the_last_step(style: DecayStyle) -> None:
    found = rates(style, 10, warmup=2)
    assert found[-1] == pytest.approx(MIN_LR)
    assert found[1:] == sorted(found[1:], reverse=True)
    # Half of the 8 steps of decay: both styles are half way down.
    assert found[5] == pytest.approx((LR + MIN_LR) / 2)


def test_linear_and_cosine_differ_between_the_middle_and_the_ends() -> None:
    assert rates("linear", 8)[1] == pytest.approx(MIN_LR + 0.75 * (LR - MIN_LR))
    assert rates("cosine", 8)[1] == pytest.approx(MIN_LR + 0.8535533905932737 * (LR - MIN_LR))


def test_after_the_decay_the_rate_stays() -> None:
    found = rates("cosine", 10, end=4)
    assert found[2] > MIN_LR
    assert found[3:] == pytest.approx([MIN_LR] * 7)


def test_constant_stays_at_the_peak() -> None:
    assert rates("constant", 5, warmup=2) == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0])


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
