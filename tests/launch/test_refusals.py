"""The program itself: a mistake ends in one line, in code 2, at once, without torch."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/pretrain.py"
SECONDS = 5.0


def launched(*argv: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-c", code] if code else [sys.executable, SCRIPT]
    return subprocess.run(
        [*start, *argv], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seq-lenght", "20"], "--seq-lenght 20: unknown flag (works: --seq-length)"),
        (
            ["--context-parallel-size", "2", "--tensor-parallel-size", "2"],
            "torchrun --nproc-per-node 4 launch/pretrain.py --context-parallel-size 2 "
            "--tensor-parallel-size 2)",
        ),
        (["--dry-run", "--world-size", "6", "--tensor-parallel-size", "4"], "--world-size 6: "),
        (["--load", "no-such-run"], "--load no-such-run: "),
    ],
)
def test_a_mistake_ends_in_one_line_and_code_2(argv: list[str], expected: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = launched(*argv)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Other tests run at the same time, so that seconds on the clock say less.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < SECONDS
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("pretrain.py: error: ")
    assert expected in line


CHECK = """
import sys
sys.path.insert(0, "launch")
import pretrain
code = pretrain.main(sys.argv[2:], {"RANK": sys.argv[1], "WORLD_SIZE": "4"})
assert "torch" not in sys.modules, "torch was imported"
sys.exit(code)
"""


def test_a_dry_run_needs_no_torch() -> None:
    argv = ["0", "--dry-run", "--tensor-parallel-size", "2"]
    ended = launched(*argv, code=CHECK)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "4 ranks = dp 2 x cp 1 x tp 2" in ended.stdout


def test_only_the_first_rank_speaks() -> None:
    for argv in (["--dry-run"], ["--help"]):
        ended = launched("3", *argv, code=CHECK)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert "--lr" in launched("0", "--lr", "-1", code=CHECK).stderr


def test_the_program_is_thin() -> None:
    assert len((ROOT / SCRIPT).read_text().splitlines()) < 60
