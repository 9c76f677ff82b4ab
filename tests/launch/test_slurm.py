"""Tests the SLURM script with doubles of srun, scontrol and scancel.

The double of srun records its arguments and waits as the test requests; in the slow test it starts
the torchrun that it is given. bash and the script are real.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.train.checkpoints import metrics_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "slurm.sh"
SECONDS = 60.0

SRUN = """
echo $$ > srun.pid
printf '%s\\n' "$@" > srun.arguments
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT $SRUN_CPUS_PER_TASK" > srun.environment
trap 'echo saved > saved; exit "${ON_TERM:-1}"' TERM
[ -z "${WAITS:-}" ] || { touch waiting; while :; do sleep 0.02; done; }
exit "${CODE:-0}"
"""
# Runs the command from the word torchrun on, as the only task of the only node.
SRUN_STARTS = """
while [ "$1" != torchrun ]; do shift; done
echo $$ > srun.pid
exec "$@"
"""
SCONTROL = """
echo "$@" >> scontrol.arguments
[ "$1" != show ] || printf 'node-a\\nnode-b\\n'
"""
SCONTROL_HERE = SCONTROL.replace("node-a", "localhost")
SCANCEL = """
echo "$@" >> scancel.arguments
kill -TERM "$(cat srun.pid)"
"""


class Slurm:
    """A folder to run in, with the three doubles first in PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program("srun", SRUN)
        self.program("scontrol", SCONTROL)
        self.program("scancel", SCANCEL)

    def program(self, name: str, text: str) -> None:
        file = self.folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}")
        file.chmod(0o755)

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        before = [str(self.folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        environ = {
            **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
            "PATH": os.pathsep.join(before),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NAME": "long",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "3",
            **variables,
        }
        with (self.folder / "log.txt").open("w") as log:
            return subprocess.Popen(
                ["bash", str(SCRIPT), *flags],
                cwd=self.folder,
                env=environ,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )

    def run(self, *flags: str, **variables: str) -> int:
        return ended(self.start(*flags, **variables))

    def arguments(self, program: str) -> list[str]:
        file = self.folder / f"{program}.arguments"
        return file.read_text().splitlines() if file.exists() else []

    def when(self, name: str) -> None:
        end = time.monotonic() + SECONDS
        while not (self.folder / name).exists():
            assert time.monotonic() < end, (self.folder / "log.txt").read_text()
            time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> int:
    """Waits for the exit code; ends the process at the timeout."""
    try:
        return process.wait(SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def training_flags(slurm: Slurm) -> Sequence[str]:
    words = slurm.arguments("srun")
    return words[words.index("launch/pretrain.py") + 1 :]


def test_one_torchrun_per_node_meets_at_the_first(slurm: Slurm) -> None:
    assert slurm.run("--preset", "toy gpt", SLURM_GPUS_ON_NODE="8") == 0
    assert slurm.arguments("srun") == [
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"),
        *("torchrun", "--nnodes", "2", "--nproc-per-node", "8"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"),
        *("--rdzv-id", "77-0"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "node-a:20077"),
        *("launch/pretrain.py", "--save", "runs/long-77", "--load", "auto"),
        *("--preset", "toy gpt"),
    ]
    assert slurm.arguments("scontrol") == ["show hostnames node-[a-b]"]
    assert (slurm.folder / "srun.environment").read_text() == "240 3\n"


@pytest.mark.parametrize("restart", ["0", "1"])
def test_the_same_words_begin_a_run_and_go_on_with_it(slurm: Slurm, restart: str) -> None:
    assert slurm.run("--lr", "1", RUN="r", SLURM_RESTART_COUNT=restart, RANKS_PER_NODE="4") == 0
    assert training_flags(slurm) == ["--save", "r", "--load", "auto", "--lr", "1"]
    found = slurm.arguments("srun")
    assert found[found.index("--nproc-per-node") + 1] == "4"
    assert found[found.index("--rdzv-id") + 1] == f"77-{restart}"


def test_its_time_nearly_over_the_run_is_saved_and_requeued(slurm: Slurm) -> None:
    script = slurm.start(WAITS="yes")
    slurm.when("waiting")
    script.send_signal(signal.SIGUSR1)
    assert ended(script) == 1
    assert (slurm.folder / "saved").exists()
    assert slurm.arguments("scancel") == ["--signal=TERM 77"]
    assert slurm.arguments("scontrol")[1:] == ["requeue 77"]


def test_a_run_that_was_complete_by_then_is_not_requeued(slurm: Slurm) -> None:
    script = slurm.start(WAITS="yes", ON_TERM="0")
    slurm.when("waiting")
    script.send_signal(signal.SIGUSR1)
    assert ended(script) == 0
    assert len(slurm.arguments("scontrol")) == 1


def test_a_crash_is_passed_on_and_not_requeued(slurm: Slurm) -> None:
    assert slurm.run(CODE="3") == 3
    assert len(slurm.arguments("scontrol")) == 1
    assert slurm.arguments("scancel") == []


def test_the_ranks_get_less_time_than_slurm_gives() -> None:
    text = SCRIPT.read_text()
    (given,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.M)
    (used,) = re.findall(r"^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)$", text, re.M)
    assert 30 < int(used) < int(given)
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.slow
def test_a_real_run_is_saved_requeued_and_finished(slurm: Slurm) -> None:
    """srun starts the torchrun that it is given, on two ranks."""
    slurm.program("srun", SRUN_STARTS)
    slurm.program("scontrol", SCONTROL_HERE)
    (slurm.folder / "text.txt").write_text("three blind mice, see how they run. " * 200)
    flags = ["--preset", "toy", "--num-layers", "1", "--hidden-size", "32"]
    flags += ["--seq-length", "64", "--data-path"]
    flags += ["text.txt", "--log-interval", "1", "--context-parallel-size", "2"]
    flags += ["--device", "cpu", "--lr-warmup-iters", "0", "--train-iters", "2000"]
    variables = {"SLURM_JOB_NUM_NODES": "1", "RANKS_PER_NODE": "2", "RUN": "r"}
    variables["SCRIPT"] = str(ROOT / "launch" / "pretrain.py")
    script = slurm.start(*flags, **variables)
    slurm.when("r/metrics.jsonl")
    while len(metrics_of(slurm.folder / "r")) < 3:
        time.sleep(0.02)
    script.send_signal(signal.SIGUSR1)
    log = slurm.folder / "log.txt"
    assert ended(script) == 1, log.read_text()
    (saved,) = (slurm.folder / "r").glob("step-*")
    last = int(saved.name.removeprefix("step-"))
    assert f"stopped after step {last}" in log.read_text()
    assert slurm.arguments("scontrol")[1:] == ["requeue 77"]
    flags[flags.index("2000")] = str(last + 2)
    assert slurm.run(*flags, **variables, SLURM_RESTART_COUNT="1") == 0, log.read_text()
    assert f"finished {last + 2} steps" in log.read_text()
