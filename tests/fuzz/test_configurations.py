"""What the checks accept runs, and what they refuse is reported in one line: no hang, no traceback.

A command line is determined by its seed. The test with a thousand of them is marked slow.
"""

from __future__ import annotations

import io
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from rich.console import Console

from cp_megatron.cli.parse import parse_arguments
from cp_megatron.cli.refusal import error_line
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.signals import StopRequest
from cp_megatron.config.fields import settings
from cp_megatron.errors import ConfigError
from cp_megatron.memory.memory_report import print_prediction
from cp_megatron.preflight.check import check
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.start_table import print_start
from cp_megatron.spec import ModelSpec
from cp_megatron.train.loop import DivergedError
from cp_megatron.train.progress import ProgressView
from cp_megatron.train.run import assemble
from tests.fuzz.configurations import OUTSIDE, Line, line_of, make_folder
from tests.launch.test_end_to_end import SCRIPT, ours_in_trace, run
from tests.ranks import RanksFailed, run_ranks

SECONDS = 5.0
"""CPU seconds that one command line may take; most take a tenth."""
MEMORY = 512 << 20
"""Bytes that the checks of all lines may add to this process."""
LATER = {"save", "split"}
"""Settings whose mistakes only the run itself finds: a folder that cannot be made, a part of the
data that is too short for a row."""


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The current folder, and back."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def launch_of(rank: int, world: int) -> Launch:
    return Launch(
        rank=rank, local_rank=rank, world_size=world, local_world_size=world, under_torchrun=True
    )


def judged(line: Line) -> RunPlan | ConfigError:
    """The result of the checks before torch is imported; any other exception is a bug."""
    began = time.process_time()
    output, table = io.StringIO(), Console(file=io.StringIO(), width=80)
    try:
        with redirect_stdout(output), redirect_stderr(output):
            arguments = parse_arguments(line.words)
            plan = check(
                arguments.config,
                launch_of(0, line.world),
                given=arguments.given,
                argv=line.words,
            )
        print_start(plan, None, table)
        if plan.config.memory.memory_report:
            print_prediction(plan, table)
        return plan
    except ConfigError as error:
        refused = error
    finally:
        assert not output.getvalue(), output.getvalue()
        assert time.process_time() - began < SECONDS, line
    text = error_line(refused, "pretrain.py")
    assert len(text.splitlines()) == 1, text
    assert refused.rule, text
    return refused


def judged_all(folder: Path, count: int) -> dict[int, RunPlan | ConfigError]:
    """The verdict on every line by its seed; a line that breaks the program is told whole."""
    make_folder(folder)
    found = {}
    with inside(folder):
        for seed in range(count):
            try:
                found[seed] = judged(line_of(seed))
            except Exception as error:
                raise AssertionError(f"seed {seed}: {line_of(seed)}") from error
    return found


@pytest.fixture(scope="module", params=[60, pytest.param(1000, marks=pytest.mark.slow)])
def verdicts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, RunPlan | ConfigError]:
    return judged_all(tmp_path_factory.mktemp("lines"), request.param)


def accepted(verdicts: dict[int, RunPlan | ConfigError]) -> dict[int, RunPlan]:
    return {seed: plan for seed, plan in verdicts.items() if isinstance(plan, RunPlan)}


def sample(verdicts: dict[int, RunPlan | ConfigError], count: int) -> list[int]:
    """Seeds of accepted lines that a test can run, by world size, so that ranks stay together."""
    fitting = [seed for seed, plan in accepted(verdicts).items() if is_small(plan, line_of(seed))]
    assert len(fitting) >= count
    return sorted(fitting[:count], key=lambda seed: line_of(seed).world)


def is_small(plan: RunPlan, line: Line) -> bool:
    config = plan.config
    length = config.data.seq_length
    spec = ModelSpec.of(config.model, vocab_size=plan.padded_vocab_size, seq_length=length)
    rows = max(config.data.global_batch_size or 0, config.train.eval_iters)
    tokens = rows * config.data.seq_length
    return (
        spec.num_parameters() < 2_000_000
        and tokens <= 8192
        and config.data.seq_length <= 256
        and not line.names & LATER
    )


def test_the_checks_have_a_plan_or_one_line(verdicts: dict[int, RunPlan | ConfigError]) -> None:
    share = len(accepted(verdicts)) / len(verdicts)
    assert 0.2 < share < 0.6
    said = frozenset[str]().union(*(line_of(seed).names for seed in range(2000)))
    assert settings().keys() - said <= OUTSIDE.keys(), "a setting that no line says"


def test_the_checks_take_no_memory(tmp_path: Path) -> None:
    judged_all(tmp_path, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with inside(tmp_path):
        for seed in range(1000, 1050):
            judged(line_of(seed))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY >> 10


def train(rank: int, world: int, folder: Path, words: tuple[str, ...]) -> int | str:
    """The program without its words; the last step, or how the numbers ended."""
    with inside(folder):
        launch = launch_of(rank, world)
        arguments = parse_arguments(words)
        plan = check(arguments.config, launch, given=arguments.given).on_device("cpu")
        group = dist.group.WORLD
        assert group is not None
        assembled = assemble(plan, launch, group)
        stop, iters = StopRequest(), plan.last_step
        view = ProgressView(Console(quiet=True), quiet=True, start_step=0, train_iters=iters)
        if iters > 2:
            stop(15, None)  # one step, and the end in good order
        try:
            return replace(assembled, view=view).train(stop)
        except DivergedError as error:
            return str(error)
        finally:
            if assembled.writer is not None:
                assembled.writer.close()


@pytest.mark.timeout(1200)
def test_what_is_accepted_trains(
    verdicts: dict[int, RunPlan | ConfigError], tmp_path: Path
) -> None:
    count = 8 if len(verdicts) < 1000 else 60
    late, diverged = [], 0
    for seed in sample(verdicts, count):
        line, folder = line_of(seed), tmp_path / str(seed)
        folder.mkdir()
        make_folder(folder)
        try:
            ends = run_ranks(train, line.world, folder, line.words)
        except RanksFailed as error:
            late.append(f"seed {seed}: {' '.join(line.words)}\n{error}")
            continue
        assert len(set(ends)) == 1, line
        diverged += isinstance(ends[0], str)
    assert not late, "\n\n".join(late)
    assert diverged <= count // 10


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_what_is_accepted_runs_as_a_program(tmp_path: Path) -> None:
    verdicts = judged_all(tmp_path, 200)
    (tmp_path / "ended").mkdir()
    for seed in sample(verdicts, 22)[1::2][:10]:
        line, folder = line_of(seed), tmp_path / "ended" / str(seed)
        folder.mkdir()
        make_folder(folder)
        start = ["torchrun", "--nproc-per-node", str(line.world), SCRIPT]
        ended = run([*start, *line.words], folder)
        assert (ended.code, ended.noise) == (0, []), f"seed {seed}: {line}\n{ended.err}"
        assert not ours_in_trace(ended)
        assert "train longer with:" in ended.out
