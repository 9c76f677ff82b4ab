"""Every script of benchmarks/ runs from any folder and reports its hardware."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TABLES = FOLDER / "tables.py"
SCRIPTS = sorted({*FOLDER.glob("*.py")} - {TABLES})


def test_there_are_benchmarks() -> None:
    assert SCRIPTS


# These build several trainers or start several processes.
SLOW = (
    "alternatives",
    "attention",
    "experts",
    "families",
    "versions",
    "faults",
    "gpu",
    "longest_on_gpu",
    "memory",
    "network",
    "recurrences",
    "scaling",
    "train",
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


MACHINE = {"cores": 2, "cpu": "a CPU", "torch": "2"}
RATIO = {"median": 0.875, "quartiles": [0.8, 0.95]}
LINES = (
    {"benchmark": "train", "tokens": 8, "way": "ours", "tokens_per_second": 12.0, "gemm": 0.5},
    {"benchmark": "train", "tokens": 8, "way": "ours", "tokens_per_second": 34.0},
    {"benchmark": "network", "result": "not run", "reason": "it needs root"},
)


def test_the_tables_are_written_between_their_markers(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "results.jsonl"
    names = ("train", "scaling", "network")
    marks = [f"<!-- table: {name} -->\nold {name}\n<!-- end: {name} -->\n" for name in names]
    readme.write_text("\n".join(["before", *marks, "after"]))
    lines = [{**line, "speed_over_ours": RATIO, "hardware": MACHINE} for line in LINES]
    results.write_text("\n".join(map(json.dumps, lines)))
    words = ["--results", str(results), "--readme", str(readme), "--plots", str(tmp_path / "plots")]
    subprocess.run([sys.executable, str(TABLES), *words], check=True, timeout=60)
    text = readme.read_text()
    assert "| 8 | ours | 34 | 0.88 (0.80 to 0.95) |  | 50% |" in text
    assert "Not run: it needs root." in text
    assert "old scaling" in text
    assert "old train" not in text
    assert text.startswith("before")
    assert text.endswith("after")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["train.svg"]
