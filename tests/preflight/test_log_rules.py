"""Flags about what is seen: refused before the start where they can have no effect."""

from __future__ import annotations

import dataclasses

import pytest

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.comm.runtime import Launch
from cp_megatron.config import LogConfig
from cp_megatron.errors import ConfigError
from cp_megatron.metrics import plots
from cp_megatron.preflight import log_rules
from cp_megatron.preflight.check import check
from cp_megatron.preflight.log_rules import check_log


def refusal(log: LogConfig, *given: str, first: int = 0, last: int = 20) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        check_log(log, first_step=first, last_step=last, world_size=4, given=frozenset(given))
    return caught.value


@pytest.mark.parametrize(
    ("start", "end", "first", "flag", "works"),
    [
        (20, 21, 0, "start", "--profile-step-start 19 --profile-step-end 20"),
        (-1, 3, 0, "start", "--profile-step-start 1 --profile-step-end 3"),
        (10, 21, 0, "end", "--profile-step-start 10 --profile-step-end 12"),
        (10, 10, 0, "end", "--profile-step-start 10 --profile-step-end 12"),
        (3, 5, 4, "start", "--profile-step-start 5 --profile-step-end 7"),
        (3, 5, 19, "start", "--profile-step-start 19 --profile-step-end 20"),
    ],
)
def test_steps_outside_the_run(start: int, end: int, first: int, flag: str, works: str) -> None:
    log = LogConfig(profile=True, profile_step_start=start, profile_step_end=end)
    error = refusal(log, first=first)
    assert (error.flag, error.works) == (f"--profile-step-{flag}", works)
    # The suggested flags are accepted.
    words = works.split()
    better = dataclasses.replace(
        log, profile_step_start=int(words[1]), profile_step_end=int(words[3])
    )
    check_log(better, first_step=first, last_step=20, world_size=1, given=frozenset())


@pytest.mark.parametrize("ranks", [(4,), (0, -1), (0, 1, 7), ()])
def test_ranks_that_are_not_there(ranks: tuple[int, ...]) -> None:
    error = refusal(LogConfig(profile=True, profile_ranks=ranks))
    assert (error.flag, error.works) == ("--profile-ranks", "0 to 3")


@pytest.mark.parametrize(
    ("flag", "needs"),
    [
        ("--profile-step-start", "--profile"),
        ("--profile-step-end", "--profile"),
        ("--profile-ranks", "--profile"),
        ("--profile-memory", "--profile"),
        ("--pytorch-profiler-collect-shapes", "--profile"),
        ("--wandb-entity", "--wandb-project NAME"),
        ("--wandb-exp-name", "--wandb-project NAME"),
        ("--wandb-save-dir", "--wandb-project NAME"),
    ],
)
def test_flags_without_the_one_they_belong_to(flag: str, needs: str) -> None:
    error = refusal(LogConfig(profile_memory=True, pytorch_profiler_collect_shapes=True), flag)
    assert (error.flag, error.works) == (flag, needs)


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (log_rules, plots):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    error = refusal(LogConfig(wandb_project="mine"))
    assert error.flag == "--wandb-project"
    assert error.works.startswith("pip install 'cp_megatron[log]'")
    error = refusal(LogConfig(), "--plot")
    assert (error.flag, error.works) == ("--plot", "pip install 'cp_megatron[plot]'")
    # Drawn by default where it can be: no reason to refuse a run.
    check_log(LogConfig(), first_step=0, last_step=1, world_size=1, given=frozenset())
    off = frozenset({"--plot"})  # how --no-plot is listed too
    check_log(LogConfig(plot=False), first_step=0, last_step=1, world_size=1, given=off)


def test_the_command_line_brings_them_and_the_plan_checks_them() -> None:
    words = ["--profile", "--profile-ranks", "0", "1", "--train-iters", "12", "--no-plot"]
    arguments = parse_arguments([*words, "--wandb-project", "p"])
    log = arguments.config.log
    assert (log.profile, log.profile_ranks, log.plot) == (True, (0, 1), False)
    assert log.wandb_project == "p"
    with pytest.raises(ConfigError, match="there is no rank 1"):
        check(arguments.config, Launch(), given=arguments.given)


@pytest.mark.parametrize("words", ["--profile-ranks", "--profile-ranks a", "--profile-ranks 1.5"])
def test_ranks_are_whole_numbers(words: str) -> None:
    with pytest.raises(ConfigError, match="--profile-ranks"):
        parse_arguments(words.split())
