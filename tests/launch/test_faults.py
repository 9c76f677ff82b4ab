"""Real faults: processes are killed, stopped or fail. Which rank is named, and what remains?

Every run is the program under torchrun on gloo ranks: two of them, unless four show more.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.test_end_to_end import MODEL, SCRIPT, Ended, Program, at_step
from tests.train.checkpoints import differing, metrics_of, numbers

STEPS = 6
FLAGS = [
    *MODEL,
    *("--context-parallel-size", "2"),
    *("--log-interval", "1", "--eval-iters", "0"),
    *("--seq-length", "64", "--global-batch-size", "4"),
    *("--data-path", "text"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    (folder / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    return folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The undisturbed run."""
    ended = start(folder, "whole").ended()
    assert ended.code == 0, ended.err
    return folder / "whole"


def start(
    folder: Path,
    save: str,
    *flags: str,
    steps: int = STEPS,
    fault: str = "",
    ranks: int = 2,
    save_interval: int = 2,
    torchrun: Sequence[str] = (),
) -> Program:
    length = ["--train-iters", str(steps), "--save-interval", str(save_interval)]
    launcher = ["torchrun", "--nproc-per-node", str(ranks), *torchrun]
    words = [*launcher, SCRIPT, *FLAGS, "--save", save, *length, *flags]
    return Program(["env", f"CPM_FAULT={fault}", *words], folder)


def ours(ended: Ended) -> list[str]:
    """The program's own lines on standard error, without torchrun's report."""
    return [line for line in ended.err.splitlines() if line.startswith("pretrain.py: ")]


def processes(save: str) -> list[str]:
    """The running processes whose arguments contain ``--save`` with this folder."""
    found = subprocess.run(
        ["ps", "-ww", "-eo", "pid,stat,args"], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in found.splitlines() if f"--save {save}" in line]


def all_gone(save: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not processes(save):
            return True
        time.sleep(0.05)
    return False


def test_a_killed_rank_is_named_and_a_restart_ends_bit_for_bit(folder: Path, whole: Path) -> None:
    program = start(folder, "killed", fault="kill:1:4", torchrun=["--max-restarts", "3"])
    ended = program.ended()
    assert ended.code == 0, ended.err
    (line,) = ours(ended)
    assert re.match(r"pretrain\.py: rank 1 \(process \d+ on \S+, (gone|dead)\) does not ", line)
    assert re.search(r"in step 5, (after )?gloo:", line)
    assert differing(whole / f"step-{STEPS}", folder / "killed" / f"step-{STEPS}") == []
    rows, others = metrics_of(whole), metrics_of(folder / "killed")
    assert [numbers(row) for row in rows] == [numbers(row) for row in others]
    assert all_gone("killed", 1)


@pytest.mark.slow  # tests/faults/test_culprit.py judges, in the default run, what ranks report
def test_a_stopped_rank_is_named_at_the_timeout_and_nothing_stays(folder: Path) -> None:
    program = start(
        folder, "stopped", "--distributed-timeout-minutes", "0.05", fault="stop:1:2"
    ).when(at_step(2))
    began = time.monotonic()
    ended = program.ended()
    assert time.monotonic() - began < 3 + 2 + 5, "the timeout, the naming, torchrun's own end"
    assert ended.code == 1
    (line,) = ours(ended)
    assert re.match(r"pretrain\.py: rank 1 \(process \d+ on \S+, stopped\) does not answer", line)
    assert all_gone("stopped", 1)
    flights = sorted(path.name for path in (folder / "stopped").glob("flight-rank-*.jsonl"))
    assert flights == [f"flight-rank-{rank}.jsonl" for rank in (0,)]


@pytest.mark.slow  # tests/faults/test_culprit.py judges, in the default run, what ranks report
def test_an_exception_is_printed_once_by_the_rank_that_raises_it(folder: Path) -> None:
    ended = start(folder, "raised", fault="raise:1:1").ended()
    assert ended.code == 1
    assert ours(ended) == ["pretrain.py: rank 1 failed"]
    assert ended.err.count("InjectedError: CPM_FAULT: backward raises\nstep 2") == 1
    assert ended.err.count("objective.backward()") == 1, "one trace of ours"


@pytest.mark.slow  # tests/train/test_signals.py sends it to a process in the default run
def test_a_signal_of_slurm_saves(folder: Path, whole: Path) -> None:
    """torchrun forwards the signal if ``--signals-to-handle`` says so, as the launch files do."""
    handled = ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"]
    program = start(folder, "warned", torchrun=handled).when(at_step(3))
    stopped = program.signalled(signal.SIGUSR1, to_group=False).ended()
    (step,) = re.findall(r"stopped after step (\d+)", stopped.out)
    assert int(step) in (3, 4, 5)
    assert (folder / "warned" / f"step-{step}").is_dir()
    assert all_gone("warned", 5)


def test_ranks_whose_launcher_is_killed_save_and_leave(folder: Path) -> None:
    program = start(folder, "orphans", steps=5000).when(at_step(3))
    os.kill(program.process.pid, signal.SIGKILL)
    program.process.wait()
    assert all_gone("orphans", 8), processes("orphans")
    last = max(int(path.name[5:]) for path in (folder / "orphans").glob("step-*"))
    assert last >= metrics_of(folder / "orphans")[-1]["step"] >= 3, "no step is lost"


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_others_leave_within_two_seconds_of_a_kill(folder: Path, ranks: int) -> None:
    save = f"kill-of-{ranks}"
    flags = ["--tensor-parallel-size", str(ranks // 2)]
    program = start(folder, save, *flags, ranks=ranks, steps=5000, save_interval=5000)
    program.when(at_step(3))
    pids = [int(line.split()[0]) for line in processes(save) if "torchrun" not in line]
    assert len(pids) == ranks
    began = time.monotonic()
    os.kill(pids[-1], signal.SIGKILL)
    while any(map(is_alive, pids)):
        time.sleep(0.01)
    took = time.monotonic() - began
    print(f"{ranks} ranks: all gone {took:.2f} s after the kill")
    assert took < 2
    ended = program.ended()
    assert ended.code == 1
    (line,) = ours(ended)
    assert re.match(rf"pretrain\.py: rank {ranks - 1} \(process {pids[-1]} ", line)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_at_the_timeout(folder: Path) -> None:
    timeout = ["--distributed-timeout-minutes", "0.05", "--tensor-parallel-size", "2"]
    ended = start(folder, "hung", *timeout, ranks=4, fault="hang:3:2").ended()
    assert ended.code == 1
    (line,) = ours(ended)
    assert re.match(r"pretrain\.py: rank 3 \(.*\) is running but did not join the collective", line)
    assert all_gone("hung", 1)


@pytest.mark.slow
def test_a_rank_that_exits_is_named(folder: Path) -> None:
    flags = ["--tensor-parallel-size", "2"]
    ended = start(folder, "left", *flags, ranks=4, fault="exit:2:2").ended()
    assert ended.code == 1
    (line,) = ours(ended)
    assert line.startswith("pretrain.py: rank 2 (")


STAGES = [
    *("--pipeline-parallel-size", "2", "--pipeline-model-parallel-layout", "E|tL"),
    *("--micro-batch-size", "1"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("kill:2:2", r"rank 2 \(stage 1, process \d+ on \S+, (gone|dead)\) does not answer"),
        ("hang:1:2", r"rank 1 \(stage 0, .*\) is running but did not join the collective"),
    ],
)
def test_a_dead_and_a_stuck_stage_are_named(folder: Path, fault: str, says: str) -> None:
    save = fault.split(":")[0] + "-stage"
    timeout = ["--distributed-timeout-minutes", "0.2"]
    ended = start(folder, save, *STAGES, *timeout, ranks=4, fault=fault).ended()
    assert ended.code == 1
    (line,) = ours(ended)
    assert re.match(rf"pretrain\.py: {says}", line)
    assert all_gone(save, 1)


@pytest.mark.slow
def test_a_slow_stage_is_named_and_one_that_waits_is_not(folder: Path) -> None:
    ended = start(folder, "slow-stage", *STAGES, ranks=4, fault="slow:3:2").ended()
    assert ended.code == 0
    late = {line.split(" is ")[0] for line in ended.out.splitlines() if " late in a step" in line}
    assert {text.split(": ")[1] for text in late} == {"rank 3 (stage 1)"}


@pytest.mark.slow
def test_a_step_that_is_skipped_is_skipped_by_all_stages(folder: Path) -> None:
    flags = [*STAGES, "--skip-budget", "1"]
    ended = start(folder, "skipped-stage", *flags, ranks=4, fault="nan:0:2").ended()
    assert ended.code == 0
    assert ended.out.count("step 3: ") == 1
    assert "skipped (1 of at most 1" in ended.out


# The program, except that one rank does not send in one round of a step.
SKIPS = f"""
import os, sys
sys.path.insert(0, {str(Path(SCRIPT).parents[1])!r})
from cp_megatron.context_parallel import p2p
from launch import pretrain
post, calls = p2p.post, [0]
def skipping(group, *, sends=(), **options):
    calls[0] += 1
    mute = os.environ["RANK"] == "1" and calls[0] == 21
    return post(group, sends=() if mute else sends, **options)
p2p.post = skipping
sys.exit(pretrain.main(sys.argv[1:], os.environ, sys.argv[0]))
"""


@pytest.mark.slow
def test_a_missing_message_shows_in_what_each_rank_waits_for(folder: Path) -> None:
    (folder / "skips.py").write_text(SKIPS)
    flags = [*FLAGS, "--save", "skipped", "--train-iters", str(STEPS), "--cp-comm-type", "p2p"]
    flags += ["--distributed-timeout-minutes", "0.15"]  # the start of a busy machine takes seconds
    ended = Program(["torchrun", "--nproc-per-node", "2", "skips.py", *flags], folder).ended()
    assert ended.code == 1
    (line,) = [line for line in ended.err.splitlines() if line.startswith("skips.py: ")]
    assert "the ranks wait for different messages (rank 0 waited for keys in step" in line
    # The rank that times out last may lose its peer first.
    told = r"rank (\d) (?:waited|lost its peer, waiting) for ([a-z ]+),? in (step \d+), after gloo:"
    waits = re.findall(told, line)
    assert [rank for rank, *_ in waits] == ["0", "1"]
    assert waits[0][2] == waits[1][2], "in the same step"
    assert waits[0][1] == "keys"
    assert waits[1][1] != "keys", "this rank has sent all but one message, and is further on"
    assert all_gone("skipped", 1)
