"""Traces: which steps and ranks are recorded, under which names."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_megatron.config import LogConfig
from cp_megatron.train.profiler import StepProfiler
from tests.ranks import run_ranks
from tests.train.test_loop import Place, train

SILENT_CPU = torch.device("cpu")


def events_of(file: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace; each must have what a viewer needs."""
    with gzip.open(file, "rt") as text:
        events: list[dict[str, Any]] = json.load(text)["traceEvents"]
    for event in events:
        assert {"name", "ph", "pid", "tid"} <= event.keys()
        assert event["ph"] != "X" or event["dur"] >= 0
    return events


def names_in(file: Path) -> Counter[str]:
    ranges = [event for event in events_of(file) if event.get("cat") == "user_annotation"]
    return Counter(event["name"] for event in ranges)


def profiled(
    folder: Path, start: int, end: int, *, first: int = 0, steps: int = 6, rank: int = 0
) -> tuple[list[str], list[str]]:
    """The trace files of a run of small sums, and the printed lines."""
    log = LogConfig(profile=True, profile_step_start=start, profile_step_end=end)
    said: list[str] = []
    profiler = StepProfiler(
        log, rank=rank, folder=folder, start_step=first, device=SILENT_CPU, say=said.append
    )
    for step in range(first + 1, steps + 1):
        with profiler.step(step):
            torch.ones(2).sum()
    profiler.close()
    return sorted(path.name for path in folder.glob("trace*")), said


@pytest.mark.parametrize(
    ("start", "end", "first", "steps"),
    [(2, 4, 0, {3, 4}), (0, 1, 0, {1}), (3, 6, 3, {4, 5, 6}), (5, 6, 3, {6})],
)
def test_the_steps_asked_for_are_in_the_trace(
    tmp_path: Path, start: int, end: int, first: int, steps: set[int]
) -> None:
    names, said = profiled(tmp_path, start, end, first=first)
    assert names == ["trace-rank0.json.gz"]
    assert said == [f"trace       {tmp_path / names[0]}: open it in https://ui.perfetto.dev"]
    found = names_in(tmp_path / names[0])
    assert {name for name in found if name.startswith("step ")} == {f"step {n}" for n in steps}
    # The profiler's own count, from the step that it warmed up in, where there was one.
    assert ("ProfilerStep#1" in found) == (start > first)


def test_a_run_that_is_stopped_keeps_what_was_recorded(tmp_path: Path) -> None:
    names, _ = profiled(tmp_path, 2, 6, steps=4)
    assert {"step 3", "step 4"} <= names_in(tmp_path / names[0]).keys()


def test_a_second_trace_overwrites_nothing(tmp_path: Path) -> None:
    profiled(tmp_path, 1, 2)
    before = (tmp_path / "trace-rank0.json.gz").read_bytes()
    names, _ = profiled(tmp_path, 1, 2)
    assert names == ["trace-rank0.2.json.gz", "trace-rank0.json.gz"]
    assert (tmp_path / "trace-rank0.json.gz").read_bytes() == before


def test_other_ranks_write_none(tmp_path: Path) -> None:
    assert profiled(tmp_path, 1, 2, rank=1) == ([], [])


def test_a_trace_that_can_not_be_written_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profiled(tmp_path / "gone", 1, 2) == ([], [])
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert "the trace is not written" in warning


PARTS = {
    *("wait for rows", "forward", "backward", "gradient norm", "optimizer"),
    *("attention tile", "attention tile, backward"),
}


@pytest.mark.parametrize(
    ("exchange", "waits"),
    [
        ("p2p", {"wait for keys", "wait for keys and gradients"}),
        ("all_gather", {"wait for keys", "wait for gradients"}),
        ("a2a", {"all-to-all of heads"}),
    ],
)
def test_the_parts_of_a_step_have_names(tmp_path: Path, exchange: str, waits: set[str]) -> None:
    (tmp_path / "text.txt").write_text("three blind mice, see how they run. " * 200)
    place = Place(tmp_path)
    flags = ["--context-parallel-size", "2", "--cp-comm-type", exchange, "--profile"]
    flags += ["--profile-step-start", "1", "--profile-step-end", "2", "--profile-ranks", "0", "1"]
    words = ["--profile-memory", "--pytorch-profiler-collect-shapes"] if exchange == "p2p" else []
    run_ranks(train, 2, place.argv("run", *flags, *words))
    for rank in (0, 1):
        file = tmp_path / "run" / f"trace-rank{rank}.json.gz"
        found = names_in(file)
        assert found.keys() >= PARTS | waits | {"step 2"}
        assert "step 1" not in found
        assert found["forward"] == found["backward"] == 4, "micro batches of the one step"
        kinds = {event["name"] for event in events_of(file)}
        assert ("[memory]" in kinds) == bool(words)
    assert "profile: false" in (tmp_path / "run" / "config.yaml").read_text()
