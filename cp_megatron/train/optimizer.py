"""AdamW, and its learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW

from cp_megatron.config import OptimizerConfig


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over sharded parameters.

    Weight decay applies to matrices and embeddings, not to vectors (norms, biases).
    """
    parameters = list(parameters)
    decayed = [parameter for parameter in parameters if parameter.ndim > 1]
    kept = [parameter for parameter in parameters if parameter.ndim <= 1]
    rates = (decayed, config.weight_decay), (kept, 0.0)
    return AdamW(
        [{"params": some, "weight_decay": rate} for some, rate in rates if some],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        fused=True,
    )


def learning_rate(step: int, config: OptimizerConfig, train_iters: int) -> float:
    """The learning rate of step number ``step``, from 1.

    It rises linearly from 0 to ``lr`` over ``lr_warmup_iters`` steps, the last of which has the
    peak rate. Then it decays to ``min_lr``, which it reaches at step ``lr_decay_iters`` (by default
    the last) and keeps.
    """
    warmup = config.lr_warmup_iters
    if step <= warmup:
        return config.lr * step / warmup
    if config.lr_decay_style == "constant":
        return config.lr
    end = config.lr_decay_iters or train_iters
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    is_linear = config.lr_decay_style == "linear"
    share = 1.0 - progress if is_linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * share
