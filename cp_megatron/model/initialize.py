"""Initial weights: every global tensor is a pure function of the seed and its name.

So a run starts from the same numbers on every grid, in every dtype, and whatever range of layers
a rank holds: a rank draws the global tensor and keeps its part.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from cp_megatron.config.schema import ModelConfig
from cp_megatron.tensor_parallel import ParameterSpec


def initial_value(
    name: str, shape: torch.Size, spec: ParameterSpec, *, config: ModelConfig, seed: int
) -> Tensor:
    """The global initial value of one parameter, float32 on the CPU.

    Matrices and embeddings are normal with standard deviation ``config.init_method_std``, the two
    output projections of a layer that over sqrt(2 x layers) (Radford et al. 2019); norm weights
    are 1, biases 0. Vocabulary padding is 0 and does not change the other rows.

    Args:
        name: the parameter's fully qualified name in the whole model.
        shape: its global shape.
        spec: its kind.
        config: gives the standard deviation and the number of layers.
        seed: the run's seed.
    """
    if spec.init == "zeros":
        return torch.zeros(shape, dtype=torch.float32)
    if spec.init == "ones":
        return torch.ones(shape, dtype=torch.float32)
    std = config.init_method_std
    if spec.init == "scaled_normal":
        std /= math.sqrt(2 * config.num_layers)
    generator = torch.Generator("cpu").manual_seed(_seed(seed, name))
    value = torch.zeros(shape, dtype=torch.float32, device="cpu")
    drawn = value if spec.rows is None else value[: spec.rows]
    drawn.normal_(0.0, std, generator=generator)
    return value


def _seed(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"weight {seed} {name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
