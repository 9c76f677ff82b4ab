"""Plots of a run: they show what was logged, and are real PNG files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp_megatron.errors import ConfigError
from cp_megatron.metrics import plots
from cp_megatron.metrics.plots import (
    CURVES_FILE,
    column,
    draw_curves,
    draw_experts,
    main,
    read_metrics,
    require_matplotlib,
    running_mean,
)

PNG = b"\x89PNG\r\n\x1a\n"


def row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2 + 3 / step,
        "grad_norm": 1 + 40 / step,
        "lr": 1e-3 / step,
        "tokens": 1000 * step,
        "tokens_per_second": 500.0,
        "step_seconds": 2.0,
        "mfu": None,
        "memory_bytes": 2**30,
        **more,
    }


def run_of(folder: Path, rows: Sequence[dict[str, Any]], torn: str = "") -> Path:
    text = "".join(json.dumps(line) + "\n" for line in rows)
    (folder / "metrics.jsonl").write_text(text + torn)
    return folder


class Recorder:
    """Keeps a figure instead of writing it."""

    def __init__(self) -> None:
        self.figures: list[Any] = []

    def __call__(self, figure: Any, path: Path) -> Path:
        figure.canvas.draw()
        self.figures.append(figure)
        return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(plots, "save_figure", recorder)
    return recorder


def lines_of(axes: Any) -> list[tuple[list[float], list[float]]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()]


def test_every_number_that_was_logged_is_drawn(tmp_path: Path, drawn: Recorder) -> None:
    rows = [row(step, **({"valid_loss": 3.5} if step == 3 else {})) for step in (1, 2, 3)]
    draw_curves(run_of(tmp_path, rows))
    loss, norm, speed, rate = drawn.figures[0].axes[:4]
    steps = [1, 2, 3]
    assert lines_of(loss) == [(steps, [5.0, 3.5, 3.0]), ([3], [3.5])]
    assert lines_of(norm) == [(steps, [41.0, 21.0, 1 + 40 / 3])]
    assert lines_of(speed) == [(steps, [500.0] * 3)]
    assert lines_of(rate) == [(steps, [1e-3, 5e-4, 1e-3 / 3])]
    names = [axes.get_ylabel() for axes in (loss, norm, speed, rate)]
    assert names == ["loss (nats per token)", "gradient norm", "tokens per second", "learning rate"]
    assert "peak memory 1.00 GiB" in speed.get_title()
    assert "MFU" not in speed.get_title()
    words = [text.get_text() for text in loss.get_legend().get_texts()]
    assert words == ["training, at the end 3", "validation, at the end 3.5"]


def test_many_lines_have_a_mean_on_top_and_the_share_of_the_peak(
    tmp_path: Path, drawn: Recorder
) -> None:
    rows = [row(step, mfu=0.5, grad_norm=1.0) for step in range(1, 101)]
    draw_curves(run_of(tmp_path, rows))
    loss, norm, speed, _ = drawn.figures[0].axes[:4]
    (_, raw), (_, mean) = lines_of(loss)
    assert raw == [line["loss"] for line in rows]
    assert max(mean) < max(raw)
    assert min(mean) > min(raw)
    assert norm.get_yscale() == "linear"
    assert "MFU 50.0%" in speed.get_title()


@pytest.mark.parametrize("count", [1, 2, 100])
def test_the_picture_is_a_png_and_is_drawn_again(
    tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, [row(step) for step in range(1, count + 1)], torn='{"step": 7, "lo')
    (run / CURVES_FILE).write_text("an older one")
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / CURVES_FILE)
    assert (run / CURVES_FILE).read_bytes().startswith(PNG)
    assert not list(run.glob("*.tmp"))
    assert len(read_metrics(run)) == count


def test_what_can_not_be_drawn_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = run_of(tmp_path, [], torn="{")
    for argv in ([str(empty)], [str(tmp_path / "none")], [], ["--help"]):
        assert main(argv) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_flag_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require_matplotlib("--plot")
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cp_megatron\[plot\]'"):
        require_matplotlib("--plot")


def test_importing_it_loads_neither_matplotlib_nor_torch() -> None:
    code = "import sys, cp_megatron.metrics.plots; print({'torch', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def slow_mean(steps: Sequence[int], values: Sequence[float], half_life: float) -> list[float]:
    """The running mean by its definition, in quadratic time."""
    means = []
    for here in steps:
        weights = [2.0 ** (-abs(step - here) / half_life) for step in steps]
        means.append(math.fsum(w * v for w, v in zip(weights, values)) / math.fsum(weights))
    return means


@given(
    gaps=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    half_life=st.floats(0.5, 100),
    seed=st.integers(0, 2**20),
)
def test_the_mean_is_its_definition(gaps: list[int], half_life: float, seed: int) -> None:
    steps = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    values = [1 + math.sin(seed + step) for step in steps]
    found = running_mean(steps, values, half_life)
    assert found == pytest.approx(slow_mean(steps, values, half_life), rel=1e-12)


def test_a_mean_over_nothing_around_is_the_value() -> None:
    assert running_mean([1, 2, 3], [5.0, 7.0, 9.0], 0.0) == [5.0, 7.0, 9.0]
    assert running_mean([], [], 1.0) == []


def test_lines_without_the_number_are_left_out() -> None:
    rows = [row(1), row(2, valid_loss=4.0), row(3, valid_loss=None)]
    assert column(rows, "valid_loss") == ([2], [4.0])


# ---- experts -------------------------------------------------------------------------------------


def expert_row(step: int) -> dict[str, Any]:
    load = {"moe_expert_load": 3 - step, "moe_rank_load": 1.5, "moe_aux_loss": 0.1, "moe_z_loss": 0}
    return row(step, **load)


def test_the_load_of_experts_has_curves_of_its_own(tmp_path: Path, drawn: Recorder) -> None:
    draw_curves(run_of(tmp_path, [expert_row(1), expert_row(2)]))
    _, _, load, _, _, terms = drawn.figures[0].axes[:6]
    assert lines_of(load) == [([1, 2], [2, 1]), ([1, 2], [1.5, 1.5])]
    assert lines_of(terms) == [([1, 2], [0.1, 0.1]), ([1, 2], [0, 0])]
    words = [text.get_text() for text in load.get_legend().get_texts()]
    assert words == ["busiest expert, at the end 1", "busiest rank, at the end 1.5"]


def test_the_tokens_of_experts_are_drawn_at_three_moments_and_over_time(
    tmp_path: Path, drawn: Recorder
) -> None:
    assert draw_experts(tmp_path) is None  # no experts
    counts = {
        1: [[0, 0, 0, 8], [2, 2, 2, 2]],
        2: [[1, 1, 2, 4], [4, 2, 1, 1]],
        5: [[2, 2, 2, 2], [1, 3, 2, 2]],
        9: [[2, 2, 2, 2], [2, 2, 2, 2]],
    }
    lines = (json.dumps({"step": step, "counts": counts[step]}) + "\n" for step in counts)
    (tmp_path / "experts.jsonl").write_text("".join(lines) + '{"step": 10, "cou')
    draw_experts(tmp_path)
    first, middle, last, over_time = drawn.figures[0].axes[:4]
    titles = [axes.get_title() for axes in (first, middle, last, over_time)]
    assert titles == ["step 1", "step 5", "step 9", "the busiest expert"]
    levels = [axes.get_images()[0].get_array().tolist() for axes in (first, last, over_time)]
    assert levels[0] == [[-2, -2, -2, 2], [0, 0, 0, 0]]
    assert levels[1] == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert levels[2] == [[2, 1, 0, 0], [0, 1, math.log2(1.5), 0]]
    labels = [text.get_text() for text in over_time.get_xticklabels()]
    assert labels == ["1", "2", "5", "9"]


@pytest.mark.parametrize("size", [(1, 1, 8), (60, 48, 128)])
def test_the_picture_of_experts_is_a_png(
    tmp_path: Path, size: tuple[int, int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    num_steps, layers, experts = size
    run = run_of(tmp_path, [expert_row(step) for step in range(1, num_steps + 1)])
    lines = (
        json.dumps({"step": step, "counts": [list(range(experts))] * layers}) + "\n"
        for step in range(1, num_steps + 1)
    )
    (run / "experts.jsonl").write_text("".join(lines))
    assert main([str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / CURVES_FILE), str(run / "experts.png")]
    assert (run / "experts.png").read_bytes().startswith(PNG)
