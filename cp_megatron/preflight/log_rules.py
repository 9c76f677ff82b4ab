"""The rules of --wandb-..., --plot and --profile, checked before torch is imported."""

from __future__ import annotations

from importlib.util import find_spec

from cp_megatron.config import LogConfig
from cp_megatron.errors import ConfigError
from cp_megatron.metrics.plots import require_matplotlib
from cp_megatron.preflight.rules import refuse_unused

_PROFILE = (
    *("profile_step_start", "profile_step_end", "profile_ranks", "profile_memory"),
    "pytorch_profiler_collect_shapes",
)
_WANDB = ("wandb_entity", "wandb_exp_name", "wandb_save_dir")


def check_log(
    log: LogConfig,
    *,
    first_step: int,
    last_step: int,
    world_size: int,
    given: frozenset[str],
) -> None:
    """The packages are installed, the profiled steps are in the run, every flag has an effect.

    Args:
        log: the flags.
        first_step: the number of steps finished before this run.
        last_step: the number of steps finished after it.
        world_size: the number of ranks.
        given: the flags that the user typed.

    Raises:
        ConfigError: one of these does not hold.
    """
    project = log.wandb_project
    if project is None:
        reason, works = "without --wandb-project", "--wandb-project NAME"
        refuse_unused(log, _WANDB, given, reason=reason, works=works)
    elif find_spec("wandb") is None:
        works = "pip install 'cp_megatron[log]', or --wandb-project None"
        raise ConfigError("--wandb-project", project, "needs the package wandb", works)
    # Curves are drawn by default if matplotlib is installed, so only --plot itself demands it.
    if log.plot and "--plot" in given:
        require_matplotlib("--plot")
    if log.profile:
        _check_steps(log, first_step, last_step)
        _check_ranks(log.profile_ranks, world_size)
    else:
        refuse_unused(log, _PROFILE, given, reason="without --profile", works="--profile")


def _check_steps(log: LogConfig, first: int, last: int) -> None:
    start, end = log.profile_step_start, log.profile_step_end
    begin = min(max(first + 1, start), last - 1)
    works = f"--profile-step-start {begin} --profile-step-end {min(begin + 2, last)}"
    if not first <= start < last:
        rule = f"must be in the run, which goes from step {first} to step {last}"
        raise ConfigError("--profile-step-start", start, rule, works)
    if not start < end <= last:
        rule = f"must be after --profile-step-start {start} and in the run, which ends at {last}"
        raise ConfigError("--profile-step-end", end, rule, works)


def _check_ranks(ranks: tuple[int, ...], world_size: int) -> None:
    missing = [rank for rank in ranks if not 0 <= rank < world_size]
    if missing or not ranks:
        value = " ".join(str(rank) for rank in ranks)
        rule = f"there is no rank {missing[0]}" if missing else "must name a rank"
        works = "0" if world_size == 1 else f"0 to {world_size - 1}"
        raise ConfigError("--profile-ranks", value, rule, works)
