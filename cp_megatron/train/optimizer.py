"""AdamW over sharded parameters; the learning rate is set by every step."""

from __future__ import annotations

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
