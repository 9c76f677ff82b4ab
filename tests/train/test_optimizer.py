"""AdamW follows the flags, and decays matrices only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cp_megatron.config import ModelConfig, OptimizerConfig
from cp_megatron.model import Transformer
from cp_megatron.train.optimizer import decay_groups, make_optimizer, stacked_vectors, update


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


def trained(
    dtype: torch.dtype, skip: bool | None, gradient: float = 1.0, factor: float | None = None
) -> list[torch.Tensor]:
    """Parameters and state after two updates, the second of which is asked for as given."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3, dtype=dtype)
    optimizer = make_optimizer(model.parameters(), OptimizerConfig(lr=0.1, weight_decay=0.1))
    for second in (False, True):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * (gradient if second else 1)
        asked = second and skip is not None
        multiplied = None if factor is None or not second else torch.tensor(factor, dtype=dtype)
        update(optimizer, skip=torch.tensor(skip) if asked else None, factor=multiplied)
    state = [x for held in optimizer.state.values() for x in held.values()]
    return [*(x.detach() for x in (*model.parameters(), *state))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_update_changes_nothing_and_another_is_as_usual(dtype: torch.dtype) -> None:
    plain, skipped = trained(dtype, None), trained(dtype, True)
    assert all(map(torch.equal, trained(dtype, False), plain))
    assert [float(x) for x in skipped if x.ndim == 0] == [1.0, 1.0], "the counts of updates"
    assert not any(map(torch.equal, skipped, plain))
    assert all(map(torch.equal, skipped, trained(dtype, True, float("nan"))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factor_multiplies_gradients(dtype: torch.dtype) -> None:
    for ours, expected in zip(trained(dtype, None, factor=0.3), trained(dtype, None, 0.3)):
        torch.testing.assert_close(ours, expected)
    assert not torch.equal(trained(dtype, None, factor=0.3)[0], trained(dtype, None)[0])


def test_biases_of_experts_are_vectors_that_do_not_decay() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, num_experts=2)
    with torch.device("meta"):
        module = Transformer(model, seq_length=8, vocab_size=8, tp=None, sequence_parallel=False)
    vectors = stacked_vectors(module)
    group, kept = decay_groups(module.parameters(), OptimizerConfig(weight_decay=0.1), vectors)
    assert (group["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    experts = module.get_submodule("layers.0.mlp.experts")
    for name, parameter in experts.named_parameters():
        holder = kept if name.endswith("_bias") else group
        assert any(parameter is x for x in holder["params"]), name
    assert len(vectors) == 2
