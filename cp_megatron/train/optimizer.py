"""AdamW and its learning rate, a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from cp_megatron.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over sharded parameters.

    Matrices and embeddings decay, vectors (norms, biases) do not.
    """
    parameters = list(parameters)
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    kept = [parameter for parameter in parameters if parameter.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """The rate of the step that comes after ``step`` finished ones.

    Linear from 0 to ``lr`` over ``lr_warmup_iters`` (the last of them has the peak rate), then the
    decay to ``min_lr``, reached by the step ``lr_decay_iters`` (by default the last) and kept.
    """
    number, warmup = step + 1, config.lr_warmup_iters
    if number <= warmup:
        return config.lr * number / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    end = config.lr_decay_iters or train_iters
    progress = min(1.0, (number - warmup) / max(1, end - warmup))
    if config.lr_decay_style == "linear":
        share = 1.0 - progress
    else:
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
