"""The program as users run it: started by torchrun and by python, stopped, and resumed.

Everything happens in a separate folder, with a small model on a small text. Tests that need no
separate process are in tests/train/test_loop.py, which uses the shared pool of ranks.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.checkpoints import differing, metrics_of, numbers

SCRIPT = str(Path(__file__).parents[2] / "launch" / "pretrain.py")
TORCHRUN = ["torchrun", "--nproc-per-node", "4"]
SHAPE = ["--num-layers", "1", "--hidden-size", "32", "--lr-warmup-iters", "0"]
MODEL = ["--preset", "toy", *SHAPE, "--seq-length", "64"]
GRID = ["--context-parallel-size", "2", "--tensor-parallel-size", "2", "--sequence-parallel"]
STEPS = 6
BATCH = ["--micro-batch-size", "1", "--global-batch-size", "4"]
RUN = [*BATCH, "--train-iters", str(STEPS), "--log-interval", "1", "--data-path", "text"]
SECONDS = 90.0

METRICS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second"),
    *("step_seconds", "mfu", "memory_bytes"),
}


@dataclass(frozen=True)
class Ended:
    """The exit code and the output of a program."""

    code: int
    out: str
    err: str

    @property
    def noise(self) -> list[str]:
        """The lines on standard error that are not torchrun's."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return [line for line in lines if not re.match(r"[WE]\d{4} .*torch/distributed/", line)]

    @property
    def resume(self) -> str:
        """The command that continues the run."""
        found = re.search(r"(?:continue|train longer) with:\n  (.+)", self.out)
        assert found, self.out + self.err
        return found[1]


def environment() -> dict[str, str]:
    """The environment variables, with the programs of this interpreter's environment first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "COLUMNS": "80"}


class Program:
    """A running program in a separate session, like a command in a terminal."""

    def __init__(self, command: Sequence[str] | str, folder: Path) -> None:
        self.folder = folder
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        with self._out.open("w") as out, self._err.open("w") as err:
            self.process = subprocess.Popen(
                command,
                shell=isinstance(command, str),
                cwd=folder,
                env=environment(),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def when(self, ready: Callable[[str], bool]) -> Program:
        """Waits until the standard output is ``ready``; ends the program at the timeout."""
        end = time.monotonic() + SECONDS
        try:
            while not ready(self._out.read_text()):
                assert self.process.poll() is None, self._err.read_text()
                assert time.monotonic() < end, self._err.read_text()
                time.sleep(0.02)
        except BaseException:
            self.kill()
            raise
        return self

    def signalled(self, number: signal.Signals, *, to_group: bool = True) -> Program:
        """Sends a signal, to the whole process group like Ctrl-C in a terminal."""
        send = os.killpg if to_group else os.kill
        send(self.process.pid, number)
        return self

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def ended(self) -> Ended:
        """Waits for the end; kills the program at the timeout."""
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.kill()
        return Ended(code, self._out.read_text(), self._err.read_text())


def run(command: Sequence[str] | str, folder: Path) -> Ended:
    return Program(command, folder).ended()


def ours_in_trace(ended: Ended) -> list[str]:
    """The program's own files in a stack trace; torchrun prints a trace too."""
    files = re.findall(r'File "(.*?)"', ended.err)
    return [file for file in files if "cp_megatron" in file or file == SCRIPT]


def at_step(number: int) -> Callable[[str], bool]:
    return lambda out: re.search(rf"step +{number}/", out) is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the programs run in, with a user's texts."""
    folder = tmp_path_factory.mktemp("user")
    texts = folder / "text"
    (texts / "deep").mkdir(parents=True)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "rests"]
    for number, name in enumerate(("a.txt", "deep/b.md")):
        lines = (" ".join(words[i % 11 :] + words[: i % 7]) for i in range(number, 300))
        (texts / name).write_text("\n".join(lines))
    (texts / "picture.bin").write_bytes(bytes(range(256)))
    return folder


@pytest.fixture(scope="module")
def flags() -> list[str]:
    return [*MODEL, *GRID, *RUN, "--hidden-dropout", "0.1"]


@pytest.fixture(scope="module")
def whole(folder: Path, flags: list[str]) -> Ended:
    """The undisturbed run, runs/toy-1, started by the command that a refusal prints."""
    refused = run(["torchrun", SCRIPT, *flags, "--save-interval", "3"], folder)
    assert refused.code == 1, "torchrun's own code"
    (line,) = (line for line in refused.noise if line.startswith("pretrain.py: error: "))
    command = re.search(r"\(works: (.*)\)$", line)
    assert command
    assert command[1] == shlex.join([*TORCHRUN, SCRIPT, *flags, "--save-interval", "3"])
    assert not (folder / "runs").exists()
    return run(command[1], folder)


def test_a_run_is_quiet_and_leaves_a_whole_folder(whole: Ended, folder: Path) -> None:
    assert (whole.code, whole.noise) == (0, [])
    assert whole.out.count(f"step {STEPS}/{STEPS}  loss ") == 1, "only rank 0 prints"
    assert "4 ranks = dp 1 x cp 2 x tp 2" in whole.out
    assert max(len(line) for line in whole.out.splitlines() if line.startswith("step")) <= 96
    found = folder / "runs" / "toy-1"
    names = {path.name for path in found.iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    files = {"config.yaml", "metrics.jsonl", "curves.png"}
    assert names - events == files | {"step-3", f"step-{STEPS}"}
    assert "curves      runs/toy-1/curves.png" in whole.out


def test_its_metrics_are_all_there_and_finite(whole: Ended, folder: Path) -> None:
    rows = metrics_of(folder / "runs" / "toy-1")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {frozenset(row) for row in rows[:-1]} == {frozenset(METRICS)}
    assert set(rows[-1]) == METRICS | {"valid_loss"}
    for row in rows:
        assert all(value is None or math.isfinite(value) for value in row.values())
        assert row["tokens"] == row["step"] * 4 * 64
        assert row["tokens_per_second"] == pytest.approx(4 * 64 / row["step_seconds"])
        assert row["memory_bytes"] > 2**20
    assert rows[0]["loss"] - rows[-1]["loss"] > 0.25


@pytest.mark.slow
def test_a_run_ended_by_ctrl_c_goes_on_bit_for_bit(
    whole: Ended, folder: Path, flags: list[str]
) -> None:
    program = Program([*TORCHRUN, SCRIPT, *flags], folder).when(at_step(2))
    stopped = program.signalled(signal.SIGINT).signalled(signal.SIGINT).ended()
    run_2 = folder / "runs" / "toy-2"
    steps = [path.name for path in run_2.glob("step-*")]
    assert len(steps) == 1
    last = int(steps[0].removeprefix("step-"))
    assert 2 <= last < STEPS
    assert f"stopped after step {last}" in stopped.out
    assert stopped.err.count("SIGINT: finishing the step, then saving") == 1
    assert "pretrain.py" not in "".join(re.findall(r'File "(.*?)"', stopped.err)), (
        "no trace of ours"
    )
    assert stopped.resume == shlex.join([*TORCHRUN, SCRIPT, "--load", "runs/toy-2"])

    ended = run(stopped.resume, folder)
    assert (ended.code, ended.noise) == (0, [])
    run_1 = folder / "runs" / "toy-1"
    assert differing(run_1 / f"step-{STEPS}", run_2 / f"step-{STEPS}") == []
    rows, others = metrics_of(run_1), metrics_of(run_2)
    assert [numbers(row) for row in rows] == [numbers(row) for row in others]


@pytest.mark.slow
def test_a_run_that_diverges_ends_in_one_line(folder: Path) -> None:
    two = ["torchrun", "--nproc-per-node", "2"]
    grid = ["--context-parallel-size", "2", "--lr", "1e30", "--save", "hot"]
    grid += ["--skip-budget", "0"]
    ended = run([*two, SCRIPT, *MODEL, *RUN, *grid], folder)
    assert ended.code == 1
    (line,) = (line for line in ended.noise if line.startswith("pretrain.py: "))
    assert re.fullmatch(
        r"pretrain\.py: error: step 2: loss \S+, gradient norm (nan|inf); its batch is in "
        r"hot/bad-step-2\.safetensors; there is no checkpoint \(works: often a lower --lr\)",
        line,
    )
    assert not ours_in_trace(ended)
    assert [row["step"] for row in metrics_of(folder / "hot")] == [1]


def plain(*flags: str) -> list[str]:
    return ["python", SCRIPT, *MODEL, *RUN, *flags]


def test_python_alone_trains_on_one_rank_and_refuses_late_in_one_line(folder: Path) -> None:
    ended = run(plain("--save", "alone"), folder)
    assert (ended.code, ended.err) == (0, "")
    assert ended.resume == shlex.join(
        ["python", SCRIPT, "--load", "alone", "--train-iters", str(2 * STEPS)]
    )
    again = run(["python", SCRIPT, "--load", "alone"], folder)
    assert again.code == 2
    assert f"--train-iters {STEPS}: the run is already at step {STEPS}" in again.err
    assert len(again.err.splitlines()) == 1


@pytest.mark.slow
def test_sigterm_to_torchrun_alone_saves_and_the_command_goes_on_elsewhere(
    whole: Ended, folder: Path, flags: list[str]
) -> None:
    words = [*TORCHRUN, SCRIPT, *flags, "--save", "ended"]
    program = Program(words, folder).when(at_step(3))
    stopped = program.signalled(signal.SIGTERM, to_group=False).ended()
    assert not ours_in_trace(stopped)
    moved = (folder / "ended").rename(folder / "moved")
    assert run(stopped.resume, folder).code == 1, "the folder is not there any more"
    alone = ["--tensor-parallel-size", "1", "--context-parallel-size", "1"]
    (step,) = moved.glob("step-*")
    ended = run(["python", SCRIPT, "--load", f"moved/{step.name}", *alone], folder)
    assert (ended.code, ended.err) == (0, "")
    assert (moved / f"step-{STEPS}").is_dir()
    assert (moved / f"config-{step.name}.yaml").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.5, 2.5, 4.0, 5.0])
def test_a_signal_at_any_time_of_the_start_leaves_no_trace(folder: Path, seconds: float) -> None:
    program = Program([*TORCHRUN, SCRIPT, *MODEL, *RUN, "--save", f"early-{seconds}"], folder)
    time.sleep(seconds)
    begin = time.monotonic()
    ended = program.signalled(signal.SIGINT).ended()
    assert time.monotonic() - begin < 10
    assert ended.code != 0
    assert not ours_in_trace(ended)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 1.5, 2.0, 2.5, 3.0])
def test_a_signal_to_python_alone_at_any_time_leaves_no_trace(folder: Path, seconds: float) -> None:
    program = Program(plain("--save", f"alone-{seconds}", "--save-interval", "1"), folder)
    time.sleep(seconds)
    ended = program.signalled(signal.SIGINT).signalled(signal.SIGTERM).ended()
    assert ended.code in (0, -signal.SIGINT, -signal.SIGTERM)
    assert "Traceback" not in ended.err
    if ended.code == 0 and "stopped" in ended.out:
        assert run(ended.resume, folder).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--device", "cuda"], "--device cuda: 4 ranks on this node need a GPU each"),
        (["--seq-length=65536"], "--seq-length 65536: a row needs 65537 tokens"),
    ],
)
def test_what_is_detected_after_the_start_is_one_line_too(
    folder: Path, flags: list[str], expected: str
) -> None:
    begin = time.monotonic()
    ended = run([*TORCHRUN, SCRIPT, "--preset", "toy", *SHAPE, *RUN, *flags], folder)
    assert time.monotonic() - begin < 30
    (line,) = (line for line in ended.noise if line.startswith("pretrain.py: "))
    assert line.startswith(f"pretrain.py: error: {expected}")
    assert not ours_in_trace(ended)
    # When the first rank exits, torchrun ends those that are about to exit in the same way.
    codes = re.findall(r"exitcode +: (-?\d+)", ended.err)
    assert len(codes) == 4
    assert {"2"} <= set(codes) <= {"2", str(-signal.SIGTERM)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--context-parallel-size", "4", "--eval-interval", "3", "--save-interval", "3"],
        ["--tensor-parallel-size", "4", "--sequence-parallel", "--bf16"],
        ["--tensor-parallel-size", "2", "--recompute-granularity", "full"],
        ["--context-parallel-size", "2", "--recompute-granularity", "selective"],
        ["--context-parallel-size", "2", "--tensor-parallel-size", "2", "--document-mask"],
        ["--preset", "toy-gpt", "--tensor-parallel-size", "2", "--context-parallel-size", "2"],
        [
            *("--context-parallel-size", "4", "--cp-comm-type", "a2a+p2p"),
            *("--hierarchical-context-parallel-sizes", "2", "2", "--window-size", "16", "0"),
        ],
        ["--context-parallel-size", "4", "--document-mask", "--cp-comm-type", "allgather"],
        ["--context-parallel-size", "2", "--attention-dropout", "0.1", "--document-mask"],
    ],
    ids=" ".join,
)
def test_every_kind_of_run_is_quiet(folder: Path, flags: list[str]) -> None:
    model = [*SHAPE, "--seq-length", "64"] if "--preset" in flags else MODEL
    ended = run([*TORCHRUN, SCRIPT, *model, *RUN, *flags], folder)
    assert (ended.code, ended.noise) == (0, [])
    again = run(ended.resume, folder)
    assert (again.code, again.noise) == (0, [])
