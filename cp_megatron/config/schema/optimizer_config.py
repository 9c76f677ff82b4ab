"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cp_megatron.config.schema.ranges import (
    BelowOne,
    Count,
    NonNegative,
    Positive,
    SampleCount,
    Samples,
    Size,
)

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: DecayStyle = "cosine"
    """Shape of the decay after the warm-up; WSD stays at the peak until its last
    steps (--lr-wsd-decay-iters)."""
    lr_warmup_iters: Count = 0
    """Steps over which the learning rate rises linearly to its peak."""
    lr_warmup_samples: SampleCount | None = None
    """Rows over which the learning rate rises to its peak, in place of steps."""
    lr_warmup_fraction: BelowOne | None = None
    """Share of the run, up to the end of the decay, over which the learning rate rises to its peak;
    in place of steps."""
    lr_warmup_init: NonNegative = 0.0
    """Learning rate from which the warm-up rises."""
    lr_decay_iters: Size | None = None
    """Step at which the decay ends; by default the last training step."""
    lr_decay_samples: Samples | None = None
    """Number of rows at which the decay ends, in place of a step."""
    lr_wsd_decay_style: WsdDecayStyle = "exponential"
    """Shape of the decay at the end of WSD."""
    lr_wsd_decay_iters: Size | None = None
    """Length of the decay at the end of WSD, in steps. It ends at --lr-decay-iters."""
    lr_wsd_decay_samples: Samples | None = None
    """Length of the decay at the end of WSD, in rows."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) are not decayed."""
    adam_beta1: BelowOne = 0.9
    """Decay of the running mean of the gradients."""
    adam_beta2: BelowOne = 0.95
    """Decay of the running mean of the squared gradients."""
    adam_eps: Positive = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: NonNegative = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
