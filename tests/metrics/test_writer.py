"""The metrics of a run: lines, resumed runs, and FLOPs computed by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cp_megatron.config.files.run_folders import METRICS_FILE
from cp_megatron.metrics.writer import (
    Metrics,
    MetricsWriter,
    keep_aside,
    peak_flops,
    peak_memory,
)
from cp_megatron.train.progress import ProgressView

ROW = Metrics(
    step=1,
    loss=2.5,
    grad_norm=1.25,
    lr=3e-4,
    tokens=1024,
    tokens_per_second=12345.6,
    step_seconds=0.5,
    mfu=None,
    memory_bytes=2**30,
)


def written(folder: Path, steps: list[int], *, start_step: int = 0) -> None:
    writer = MetricsWriter(folder, start_step=start_step)
    for step in steps:
        writer.write(replace(ROW, step=step))
    writer.close()


def steps_in(file: Path) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_a_line_has_every_number_and_is_json(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    writer.write(ROW)
    line = json.loads((tmp_path / METRICS_FILE).read_text())  # before it is closed
    assert line == {
        "step": 1,
        "loss": 2.5,
        "grad_norm": 1.25,
        "lr": 3e-4,
        "tokens": 1024,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.5,
        "mfu": None,
        "memory_bytes": 2**30,
    }
    writer.write(replace(ROW, step=2, valid_loss=2.75))
    assert json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[1])["valid_loss"] == 2.75
    with pytest.raises(ValueError, match="JSON"):
        writer.write(replace(ROW, loss=float("nan")))
    writer.close()


def test_the_board_has_the_same(tmp_path: Path) -> None:
    written(tmp_path, [5, 10])
    board = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(5, 2.5), (10, 2.5)]
    assert "mfu" not in board.Tags()["scalars"]


def test_a_resumed_run_goes_on_below(tmp_path: Path) -> None:
    written(tmp_path, [1, 2])
    written(tmp_path, [3], start_step=2)
    assert steps_in(tmp_path / METRICS_FILE) == [1, 2, 3]
    assert not list(tmp_path.glob("metrics-*"))


def test_what_was_logged_after_the_checkpoint_and_a_torn_line_step_aside(tmp_path: Path) -> None:
    written(tmp_path, [1, 2, 3, 4])
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')
    before = (tmp_path / METRICS_FILE).read_text()
    written(tmp_path, [3, 4], start_step=2)
    assert steps_in(tmp_path / METRICS_FILE) == [1, 2, 3, 4]
    assert (tmp_path / "metrics-step-2.jsonl").read_text() == before


def test_nothing_set_aside_is_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    for text in ("first", "second", "third"):
        file.write_text(text)
        assert keep_aside(file, 4).read_text() == text
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "config-step-4.2.yaml",
        "config-step-4.3.yaml",
        "config-step-4.yaml",
        file.name,
    ]


def test_the_process_says_its_memory_and_no_peak_speed() -> None:
    device = torch.device("cpu")
    assert 2**25 < peak_memory(device) < 2**40
    assert peak_flops(device) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_fits_a_terminal(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=80, force_terminal=terminal, no_color=True, legacy_windows=False)
    with ProgressView(console, quiet=False, start_step=0, train_iters=20000) as view:
        view.log(replace(ROW, step=10))
        view.step_done(10)
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if "grad" in line)
    assert line.removeprefix("\x1b[2K").removeprefix("\r") == (
        "step    10/20000  loss 2.5000  grad 1.250  lr 3.00e-04  12,346 tok/s  1.00 GiB"
    )
    bars = [line for line in lines if "eta" in line]
    assert bool(bars) == terminal
    if terminal:
        assert "loss 2.500  12,346 tok/s  1.00 GiB" in bars[-1]


def test_the_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=True)
    with ProgressView(console, quiet=True, start_step=0, train_iters=2) as view:
        view.log(ROW)
        view.step_done(1)
        view.say("hello")
    assert capsys.readouterr().out == ""


def counts_in(folder: Path) -> list[tuple[int, list[list[int]]]]:
    lines = map(json.loads, (folder / "experts.jsonl").read_text().splitlines())
    return [(line["step"], line["counts"]) for line in lines]


def test_the_tokens_of_experts_are_written_ever_more_rarely(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, start_step=0)
    for step in range(10, 10_001, 10):
        metrics = replace(ROW, step=step, moe_expert_load=1.5, moe_counts=((step, 1), (2, 3)))
        writer.write(metrics)
        writer.write(replace(metrics, valid_loss=2.0))  # the same step again
    writer.close()
    steps = [step for step, _ in counts_in(tmp_path)]
    assert steps[:20] == [*range(10, 201, 10)]
    assert len(steps) < 110
    assert steps[-1] > 9500
    assert counts_in(tmp_path)[0] == (10, [[10, 1], [2, 3]])
    line = json.loads((tmp_path / METRICS_FILE).read_text().splitlines()[0])
    assert line["moe_expert_load"] == 1.5
    assert "moe_counts" not in line
    dense = tmp_path / "dense"
    dense.mkdir()
    written(dense, [1, 2])
    assert not (dense / "experts.jsonl").exists()


def test_a_resumed_run_writes_the_tokens_of_experts_again(tmp_path: Path) -> None:
    for start, last in ((0, 300), (200, 400)):
        writer = MetricsWriter(tmp_path, start_step=start)
        for step in range(start + 10, last + 1, 10):
            writer.write(replace(ROW, step=step, moe_counts=((start, 1),)))
        writer.close()
    found = counts_in(tmp_path)
    assert [counts[0][0] for step, counts in found if step <= 200] == [0] * 20
    later = [step for step, counts in found if counts[0][0] == 200]
    assert later == [210, 230, 250, 270, 290, 310, 330, 350, 370, 390]
    assert (tmp_path / "experts-step-200.jsonl").exists()
