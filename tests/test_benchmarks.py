"""Every script of benchmarks/ runs from any folder and reports its hardware."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parent.parent / "benchmarks").glob("*.py"))


def test_there_are_benchmarks() -> None:
    assert SCRIPTS


# These build several trainers or start several processes.
SLOW = (
    "alternatives",
    "attention",
    "families",
    "versions",
    "faults",
    "gpu",
    "longest_on_gpu",
    "memory",
    "recurrences",
)
WORDS = {"longest_on_gpu": ["--device", "cpu"]}
CASES = [
    pytest.param(
        path, WORDS.get(path.stem, []), id=path.stem, marks=pytest.mark.slow if slow else ()
    )
    for path in SCRIPTS
    for slow in [path.stem in SLOW]
]
SHORT = [path for path in SCRIPTS if path.stem == "attention"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        *CASES,
        *(
            pytest.param(path, ["--only", "long"], id="attention, long", marks=pytest.mark.slow)
            for path in SHORT
        ),
    ],
)
def test_the_script_runs_in_its_quick_mode(script: Path, words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--quick", *words]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines
    assert all(line["hardware"]["cores"] >= 1 for line in lines)
    assert list(tmp_path.iterdir()) == []
