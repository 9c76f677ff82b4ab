"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cp_megatron.config.schema.ranges import (
    Count,
    Epochs,
    NonNegative,
    Positive,
    Range,
    Samples,
    Size,
)

DType = Literal["auto", "float64", "float32", "bfloat16"]
Device = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, in which precision and on which device the run trains."""

    train_iters: Size | None = 200
    """Training steps in all, including those before a resume."""
    train_samples: Samples | None = None
    """Rows to train on in all, in place of steps; an incomplete last batch is left out. The
    learning rate then is a function of rows."""
    train_epochs: Epochs | None = None
    """Passes over the training data in all, in place of steps; the last batch is filled up with
    rows of the next pass. The learning rate then is a function of rows."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 1234
    """The seed that determines everything random: weights, order of the data, dropout."""
    dtype: DType = "auto"
    """Compute type; auto is bfloat16 on CUDA (with float32 master weights) and float32 on CPU."""
    bf16: bool = False
    """Compute in bfloat16, as --dtype bfloat16 does."""
    deterministic: bool = False
    """Make runs on the same grid repeat bit for bit on cuda too; on cpu they always do."""
    compile: bool = False
    """Compile the norms, rotations and activations of the layers with torch.compile; attention,
    products and messages stay as they are. The first step takes up to a minute longer, and on a CPU
    later steps are no faster."""
    device: Device = "auto"
    """auto is cuda if every local rank has a GPU of its own, otherwise cpu."""
    z_loss_coeff: NonNegative = 0.0
    """Add this times the squared log-sum-exp of every token's logits to the training loss, which
    keeps logits from drifting; the logged loss does not include it."""
    skip_budget: Count = 5
    """Skip a step whose loss or gradient is not finite, but end the run if more than this many of
    any 1,000 consecutive steps are skipped."""
    spike_threshold: Positive | None = None
    """Also skip a step whose loss is more than this many standard deviations (estimated robustly)
    above the median of the last 128; by default none is skipped for its loss."""
    check_interval: Size | None = None
    """Steps between two checks that parameters change by updates only and that messages of context
    parallelism arrive as they were sent; each save is then checked too. By default no checks."""
    log_interval: Size = 10
    """Steps between two lines of metrics; the first and the last step have a line too."""
    eval_interval: Size | None = None
    """Steps between two validations; by default there is one, at the end."""
    eval_iters: Count = 4
    """Global batches per validation; 0 turns validation off."""
    exit_interval: Size | None = None
    """Save and end the program after each step that is a multiple of this; the command that it
    prints continues the run."""
    exit_duration_in_mins: Positive | None = None
    """Save and end the program after the first step that ends later than this many minutes after
    its start; the command that it prints continues the run."""
