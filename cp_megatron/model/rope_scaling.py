"""The frequencies of rotary positions, and how each ``--rope-type`` changes them.

Pair i of the d/2 pairs of a head turns by position * f_i, with f_i = base^(-2i/d). A model has only
seen the angles of its original length L, so a longer text has angles that it does not know. Every
method slows some pairs down; s is the factor, T the longest document of the row:

    linear     f_i / s for all pairs, which loses fine detail (Chen et al. 2023, arXiv:2306.15595)
    dynamic    once T > L, base * (s T / L - (s - 1))^(d / (d - 2)) is the base; short documents see
               the original ("NTK-aware" by bloc97, dynamic by emozilla; section 3.3 of
               arXiv:2309.00071)
    yarn       depends on how often a pair turns in L: fast pairs keep f_i, slow ones get f_i / s,
               with a ramp in between, and q and k grow by 0.1 ln(s) + 1 (Peng et al. 2023,
               arXiv:2309.00071)
    llama3     the same idea with a ramp that is linear in the turns (arXiv:2407.21783)
    longrope   divides f_i by a list found by search: one up to L, another beyond it (Ding et al.
               2024, arXiv:2402.13753)

    turns in L   many ........ beta_fast ~~~~~~~~ beta_slow ........ few
    frequency         f_i               a ramp                f_i / s

T comes from the mask, which every rank knows. If it were the largest position that a rank holds,
ranks would rotate differently, and queries would not match the keys of other ranks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cp_megatron.config.schema import ModelConfig
from cp_megatron.spec import RotarySpec


def _plain(width: int, base: float) -> Tensor:
    """base^(-2i/d), float64 [d/2]."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device="cpu")
    return base ** (-exponents / width)


def rope_frequencies(config: ModelConfig, rotary: RotarySpec, longest: int) -> tuple[Tensor, float]:
    """The frequencies of a layer's heads, which equal those of Hugging Face transformers.

    Args:
        config: the model, with the settings that its ``rope_type`` needs.
        rotary: the rotation of the layer; d is its width.
        longest: length of the longest document of the row, the same on every rank.

    Returns:
        float64 [d/2] on the CPU, radians per position; and the attention factor, which multiplies
        cosine and sine, and so the scores by its square.
    """
    plain = _plain(rotary.width, rotary.base)
    factor = config.rope_scaling_factor or 1.0
    if not rotary.is_scaled:
        return plain, 1.0
    match config.rope_type:
        case "linear":
            return plain / factor, 1.0
        case "dynamic":
            return _dynamic(config, rotary, factor, longest), 1.0
        case "llama3":
            return _llama3(config, plain, factor), 1.0
        case "yarn":
            return _yarn(config, rotary, plain, factor), _yarn_attention(config)
        case "longrope":
            return _longrope(config, plain, longest)
        case _:
            return plain, 1.0


def _original(config: ModelConfig) -> int:
    assert config.original_length is not None, "checked before the run"
    return config.original_length


def _dynamic(config: ModelConfig, rotary: RotarySpec, factor: float, longest: int) -> Tensor:
    original, d = _original(config), rotary.width
    stretch = factor * max(longest, original) / original - (factor - 1)
    return _plain(d, rotary.base * stretch ** (d / (d - 2)))


def _llama3(config: ModelConfig, plain: Tensor, factor: float) -> Tensor:
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = _original(config) * plain / (2 * math.pi)  # in the original length
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # 1 keeps the frequency
    return plain * (kept + (1 - kept) / factor)


def _yarn(config: ModelConfig, rotary: RotarySpec, plain: Tensor, factor: float) -> Tensor:
    d, base, original = rotary.width, rotary.base, _original(config)

    def pair_that_turns(times: float) -> float:
        """The pair, as a fraction, that turns this often in the original length."""
        return d * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    if first == last:
        last += 0.001  # avoids a division by zero
    pairs = torch.arange(d // 2, dtype=torch.float64, device="cpu")
    slowed = ((pairs - first) / (last - first)).clamp(0, 1)
    return plain * (1 - slowed) + plain / factor * slowed


def _yarn_attention(config: ModelConfig) -> float:
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    if config.mscale and config.mscale_all_dim:
        return config.yarn_growth(config.mscale) / config.yarn_growth(config.mscale_all_dim)
    return config.yarn_growth(1.0)


def _longrope(config: ModelConfig, plain: Tensor, longest: int) -> tuple[Tensor, float]:
    original = _original(config)
    factor = config.rope_scaling_factor or (config.max_position_embeddings or original) / original
    divisors = config.rope_long_factor if longest > original else config.rope_short_factor
    assert divisors is not None, "checked before the run"
    attention = config.rope_attention_factor
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return plain / torch.tensor(divisors, dtype=torch.float64, device="cpu"), attention
