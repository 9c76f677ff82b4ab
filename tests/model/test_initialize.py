"""Initial weights are a pure function of the seed, the name and the shape."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cp_megatron.config import ModelConfig
from cp_megatron.model.initialize import initial_value
from cp_megatron.spec import Init, ParameterSpec

CONFIG = ModelConfig(num_layers=8, init_method_std=0.02)


def value(
    name: str = "w", *shape: int, init: Init = "normal", rows: int | None = None, seed: int = 1
) -> Tensor:
    spec = ParameterSpec(name=name, shape=shape or (256, 64), init=init, rows=rows)
    return initial_value(spec, config=CONFIG, seed=seed)


def test_repeatable_and_different_by_name_and_seed() -> None:
    torch.manual_seed(0)
    first = value()
    torch.manual_seed(1)
    assert torch.equal(first, value())
    assert not torch.equal(first, value("v"))
    assert not torch.equal(first, value(seed=2))


def test_the_numbers_stay_what_they_are() -> None:
    # A change here changes every run that anyone wants to repeat.
    expected = torch.tensor([-0.00179546, -0.02151385, 0.04224532])
    torch.testing.assert_close(value("embedding.weight", 4, 8)[0, :3], expected, atol=1e-7, rtol=0)


def test_the_default_dtype_and_device_do_not_matter() -> None:
    expected = value()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(expected, value())
    finally:
        torch.set_default_dtype(torch.float32)


def test_scales() -> None:
    assert math.isclose(value().std().item(), 0.02, rel_tol=0.02)
    assert math.isclose(value(init="scaled_normal").std().item(), 0.02 / 4, rel_tol=0.02)
    assert torch.equal(value(init="ones"), torch.ones(256, 64))
    assert torch.equal(value(init="zeros"), torch.zeros(256, 64))


def test_padding_is_zero_and_leaves_the_other_rows_alone() -> None:
    padded, longer = value("e", 384, 16, rows=257), value("e", 512, 16, rows=257)
    assert not padded[257:].any()
    assert padded[256].any()
    assert torch.equal(padded[:257], longer[:257])


def test_only_the_model_decides() -> None:
    spec = ParameterSpec(name="w", shape=(256, 64), init="normal", split={"tp": 0})
    other = replace(CONFIG, num_layers=2)
    assert torch.equal(value(), initial_value(spec, config=other, seed=1))
