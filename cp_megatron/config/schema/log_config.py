"""Settings of what a run reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What the run reports, besides metrics.jsonl and TensorBoard events."""

    wandb_project: str | None = None
    """The Weights & Biases project to send metrics to as well; by default none."""
    wandb_entity: str | None = None
    """The team or user that owns the project; by default the one that is logged in."""
    wandb_exp_name: str | None = None
    """The run's name in Weights & Biases; by default the name of its folder."""
    wandb_save_dir: str | None = None
    """The folder for the files of Weights & Biases; by default the run's folder."""
    log_straggler: bool = True
    """Report ranks that arrive late at a step, or whose device is slow, with the metrics."""
    plot: bool = True
    """At the end draw curves.png in the run's folder, if matplotlib is installed."""
    profile: bool = False
    """Write a trace of a few steps, trace-rank<N>.json.gz, for https://ui.perfetto.dev."""
    profile_step_start: int = 10
    """The number of finished steps at which the profile begins; the step before it warms up."""
    profile_step_end: int = 12
    """The number of finished steps at which the profile ends."""
    profile_ranks: tuple[int, ...] = (0,)
    """The ranks that write a trace."""
    profile_memory: bool = False
    """Record allocations and frees in the trace."""
    pytorch_profiler_collect_shapes: bool = False
    """Record the shapes of the inputs of every operation in the trace."""
