"""What --wandb-..., --plot and --profile need, asked before torch is imported."""

from __future__ import annotations

from importlib.util import find_spec

from cp_megatron.config import LogConfig
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.metrics.plots import require_matplotlib

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
    """The packages are there, the profiled steps lie in the run, no flag is without an effect.

    Args:
        log: the flags.
        first_step: steps finished before this run.
        last_step: steps finished after it.
        world_size: ranks in all.
        given: the flags that the user typed.

    Raises:
        ConfigError: one of these does not hold.
    """
    _check_wandb(log, given)
    # By default a run draws its curves where it can; who asks for them is told now that it can not.
    if log.plot and "--plot" in given:
        require_matplotlib("--plot")
    _refuse_idle(log, _PROFILE, given, used=log.profile, needs="--profile")
    if log.profile:
        _check_steps(log, first_step, last_step)
        _check_ranks(log.profile_ranks, world_size)


def _check_wandb(log: LogConfig, given: frozenset[str]) -> None:
    project = log.wandb_project
    _refuse_idle(log, _WANDB, given, used=project is not None, needs="--wandb-project NAME")
    if project is not None and find_spec("wandb") is None:
        works = "pip install 'cp_megatron[log]', or --wandb-project None"
        raise ConfigError("--wandb-project", project, "needs the package wandb", works)


def _refuse_idle(
    log: LogConfig, names: tuple[str, ...], given: frozenset[str], *, used: bool, needs: str
) -> None:
    for name in () if used else names:
        row = settings()[name]
        if row.flag in given:
            value = "" if row.kind == "bool" else getattr(log, name)
            raise ConfigError(row.flag, value, "has no effect without another flag", needs)


def _check_steps(log: LogConfig, first: int, last: int) -> None:
    start, end = log.profile_step_start, log.profile_step_end
    begin = min(max(first + 1, start), last - 1)
    works = f"--profile-step-start {begin} --profile-step-end {min(begin + 2, last)}"
    if not first <= start < last:
        rule = f"this run goes from step {first} to step {last}"
        raise ConfigError("--profile-step-start", start, rule, works)
    if not start < end <= last:
        rule = f"must lie after --profile-step-start {start} and in the run, which ends at {last}"
        raise ConfigError("--profile-step-end", end, rule, works)


def _check_ranks(ranks: tuple[int, ...], world_size: int) -> None:
    missing = [rank for rank in ranks if not 0 <= rank < world_size]
    if missing or not ranks:
        value = " ".join(str(rank) for rank in ranks)
        rule = f"there is no rank {missing[0]}" if missing else "must name a rank"
        works = "0" if world_size == 1 else f"0 to {world_size - 1}"
        raise ConfigError("--profile-ranks", value, rule, works)
