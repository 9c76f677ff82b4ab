"""Initial weights: every global tensor is a pure function of the seed and its name.

So a run starts from the same numbers on every grid, in every dtype, and with any range of layers
on a rank: a rank draws the global tensor and keeps its part. Of stacked matrices it draws its own,
each by its name and its number.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from cp_megatron.config.schema import ModelConfig
from cp_megatron.spec import ParameterSpec


def initial_value(
    spec: ParameterSpec, *, config: ModelConfig, seed: int, part: Iterable[int] | None = None
) -> Tensor:
    """The global initial value of one parameter, float32 on the CPU.

    Args:
        spec: the parameter; its name must be the fully qualified one in the whole model.
        config: gives the standard deviation and the number of layers.
        seed: the run's seed.
        part: the numbers of those matrices of a stacked parameter that are drawn; None: all.
    """
    if spec.stacked:
        numbers = range(spec.shape[0]) if part is None else part
        one = replace(spec, shape=spec.shape[1:], stacked=False)
        names = (replace(one, name=f"{spec.name}.{number}") for number in numbers)
        return torch.stack([initial_value(x, config=config, seed=seed) for x in names])
    if spec.init == "zeros":
        return torch.zeros(spec.shape, dtype=torch.float32)
    if spec.init == "ones":
        return torch.ones(spec.shape, dtype=torch.float32)
    std = config.init_method_std
    if spec.init == "scaled_normal":
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.blake2b(f"weight {seed} {spec.name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    value = torch.zeros(spec.shape, dtype=torch.float32, device="cpu")
    if spec.init == "decay":
        return value.uniform_(0.01, 16, generator=generator).log_()
    if spec.init == "convolution":
        bound = 1 / math.sqrt(spec.shape[-1])
        return value.uniform_(-bound, bound, generator=generator)
    # The padding of the vocabulary stays 0, and its size does not change the other rows.
    drawn = value if spec.rows is None else value[: spec.rows]
    drawn.normal_(0.0, std, generator=generator)
    return value
