"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.ranges import (
    BelowOne,
    Count,
    NonNegative,
    Positive,
    Range,
    SampleCount,
    Samples,
    Size,
)

DecayStyle = Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"]
WsdDecayStyle = Literal["exponential", "linear", "cosine", "minus_sqrt"]


OptimizerName = Literal["adam", "muon"]
MuonScale = Literal["spectral", "unit_rms_norm", "shape_scaling"]
MuonCoefficients = Literal["simple", "quintic", "polar_express"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    optimizer: OptimizerName = "adam"
    """adam is AdamW for all parameters; muon is Muon for the matrices of layers, those of each
    expert and of routers included, and AdamW for the embedding, the output layer, vectors and
    convolutions."""
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
    muon_momentum: BelowOne = 0.9
    """Decay of the running mean of a matrix's gradients."""
    muon_nesterov: bool = False
    """Add the newest gradient to the running mean once more (Nesterov's momentum)."""
    muon_scale_mode: MuonScale = "spectral"
    """Factor of an update of m rows and n columns: the root of max(m, n), of m / n, or of
    max(1, m / n)."""
    muon_extra_scale_factor: Positive = 1.0
    """Another factor of Muon's updates; with spectral, 0.2 gives them the size of AdamW's."""
    muon_coefficient_type: MuonCoefficients = "quintic"
    """Coefficients of the Newton-Schulz iterations that orthogonalize an update."""
    muon_num_ns_steps: Annotated[int, Range(1, 99)] = 5
    """Number of these iterations."""
    clip_grad: NonNegative = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
