"""Two runs never write into one folder, and a run that was killed does not keep its folder."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cp_megatron.config.files.lock_holder import LOCK_FILE
from tests.launch.test_end_to_end import MODEL, SCRIPT, Program, at_step, environment, run
from tests.train.checkpoints import metrics_of

FLAGS = [*MODEL, "--seq-length", "64", "--global-batch-size", "4", "--data-path", "text.txt"]
FLAGS += ["--log-interval", "1", "--eval-iters", "0", "--no-plot"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    return folder


def place(folder: Path, name: str) -> Path:
    """A folder with the text, for the output of one program."""
    (folder / name).mkdir()
    (folder / name / "text.txt").symlink_to(folder / "text.txt")
    return folder / name


@pytest.mark.slow  # tests/checkpoint/test_claim_folder.py claims folders in one process
def test_the_second_run_is_refused_at_once_and_the_lock_of_a_killed_one_is_taken_over(
    folder: Path,
) -> None:
    save = folder / "run"
    words = [sys.executable, SCRIPT, *FLAGS, "--train-iters", "100000", "--save-interval", "1"]
    first = Program([*words, "--save", str(save)], place(folder, "a")).when(at_step(2))
    try:
        before = (save / LOCK_FILE).read_text()
        assert json.loads(before)["pid"] == first.process.pid
        for again in (["--save", str(save)], ["--load", str(save)]):
            began = time.monotonic()
            second = run([*words, *again], folder)
            assert time.monotonic() - began < 5, "before torch is imported"
            assert (second.code, second.out) == (2, "")
            (line,) = second.err.splitlines()
            assert line.startswith(f"pretrain.py: error: --save {save}: process ")
            assert f" {first.process.pid} on " in line
        assert (save / LOCK_FILE).read_text() == before
        planned = run([sys.executable, SCRIPT, "--load", str(save), "--dry-run"], folder)
        assert planned.code == 0, planned.err
    finally:
        first.kill()
    last = max(int(path.name[5:]) for path in save.glob("step-*[0-9]"))
    ends = ["--load", str(save), "--train-iters", str(last + 1)]
    ended = run([sys.executable, SCRIPT, *ends], folder)
    assert ended.code == 0, ended.err
    assert [row["step"] for row in metrics_of(save)] == list(range(1, last + 2))
    assert not list(save.glob(f"{LOCK_FILE}*"))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False], ids=["one folder", "default folders"])
def test_of_two_jobs_that_start_at_once(folder: Path, shared: bool) -> None:
    """One of them trains in a folder that both name; by default each has a folder of its own."""
    name = "shared" if shared else "own"
    here = place(folder, name)
    words = ["torchrun", "--standalone", "--nproc-per-node", "2", SCRIPT, *FLAGS]
    words += ["--train-iters", "40", "--context-parallel-size", "2"]
    words += ["--save", "run"] if shared else []
    pipe = subprocess.PIPE
    jobs = [
        subprocess.Popen(words, cwd=here, env=environment(), stdout=pipe, stderr=pipe, text=True)
        for _ in range(2)
    ]
    told = [job.communicate(timeout=120) for job in jobs]
    codes = sorted(job.returncode for job in jobs)
    if not shared:
        assert codes == [0, 0]
        assert sorted(path.name for path in (here / "runs").iterdir()) == ["toy-1", "toy-2"]
        return
    assert codes == [0, 1]
    (err,) = (err for job, (_, err) in zip(jobs, told) if job.returncode)
    lines = [line for line in err.splitlines() if line.startswith("pretrain.py")]
    assert len(lines) == 1
    assert "--save run: process " in lines[0]
    ends = set(re.findall(r"exitcode +: (-?\d+)", err))
    assert {"2"} <= ends <= {"2", str(-signal.SIGTERM)}
    assert len(metrics_of(here / "run")) == 40


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_have_their_own_lock(folder: Path) -> None:
    words = ["torchrun", "--nproc-per-node", "2", "--max-restarts", "1", SCRIPT, *FLAGS]
    words += ["--train-iters", "6", "--context-parallel-size", "2", "--save", "killed"]
    words += ["--save-interval", "2"]
    ended = run(["env", "CPM_FAULT=kill:0:4", *words], place(folder, "restarted"))
    assert ended.code == 0, ended.err
    assert not list((folder / "restarted" / "killed").glob(f"{LOCK_FILE}*"))


@pytest.mark.slow  # tests/train/test_stopping.py signals the ranks of the pool
def test_ctrl_c_during_a_validation_of_hours_saves_and_prints_the_way_on(folder: Path) -> None:
    words = ["torchrun", "--nproc-per-node", "2", SCRIPT, *FLAGS, "--save", "long"]
    words[words.index("--eval-iters") + 1] = "1000000"
    words += ["--train-iters", "4", "--eval-interval", "2", "--context-parallel-size", "2"]
    here = place(folder, "validating")
    program = Program(words, here).when(at_step(1))
    time.sleep(2)  # the second step takes milliseconds
    stopped = program.signalled(signal.SIGINT).ended()
    assert "step 2: its validation was interrupted and has no result" in stopped.out
    assert "step 2: SIGINT ends the run" in stopped.out
    assert re.search(
        r"stopped after step 2; continue with:\n  torchrun .* --load long", stopped.out
    )
    ended = run([*stopped.resume.split(), "--eval-iters", "1"], here)
    assert ended.code == 0, ended.err
    assert (here / "long" / "step-4").is_dir()
