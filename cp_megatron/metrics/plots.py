"""Plots of a run as PNG files. This is the only file that imports matplotlib, which is optional.

    python -m cp_megatron.metrics.plots RUN     draws RUN/curves.png (and RUN/experts.png) again

Figures are drawn by the Agg backend without pyplot, so they need no display and no closing.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median_high
from typing import Any

from cp_megatron.config.files.run_folders import EXPERTS_FILE, METRICS_FILE
from cp_megatron.errors import ConfigError

CURVES_FILE = "curves.png"
EXPERTS_PICTURE = "experts.png"
INSTALL = "pip install 'cp_megatron[plot]'"

_FEW = 40
"""Up to this number of points, each is marked, and no running mean is drawn."""
_RAW, _MEAN, _OTHER = "#9db8d9", "#1f4e8c", "#d1661f"

LoggedStep = Mapping[str, Any]
"""One line of metrics.jsonl."""


def has_matplotlib() -> bool:
    """Whether matplotlib is installed; does not import it."""
    return find_spec("matplotlib") is not None


def require_matplotlib(flag: str, value: object = "") -> None:
    """Raises ``ConfigError`` for a flag that requests a plot if matplotlib is not installed."""
    if not has_matplotlib():
        raise ConfigError(flag, value, "needs the package matplotlib", INSTALL)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure; width and height in inches."""
    # On its first use, matplotlib announces that it builds a font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> Path:
    """Writes a figure as PNG; an existing file is replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    new = path.with_name(f"{path.name}.tmp")
    figure.savefig(new, format="png", dpi=120)
    new.replace(path)
    return path


def read_metrics(run: Path) -> list[LoggedStep]:
    """The lines of a run's metrics.jsonl, without incomplete ones."""
    return _read_lines(run / METRICS_FILE)


def _read_lines(file: Path) -> list[LoggedStep]:
    rows: list[LoggedStep] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                rows.append(row)
    return rows


def draw_curves(run: Path) -> Path:
    """Draws loss, gradient norm, throughput and learning rate over a whole run.

    If the model has experts, their load and what it adds to the trained loss are drawn as well.

    Args:
        run: a run's folder, with a metrics.jsonl.

    Returns:
        The plot, ``curves.png`` in that folder.

    Raises:
        ConfigError: no step is logged.
        OSError: the metrics cannot be read, or the plot cannot be written.
    """
    rows = read_metrics(run)
    if not rows:
        raise ConfigError("RUN", run, f"its {METRICS_FILE} has no logged step", "a run's folder")
    num_columns = 3 if column(rows, "moe_expert_load")[0] else 2
    figure = new_figure(6 * num_columns, 7.5)
    steps, tokens = rows[-1]["step"], _amount(rows[-1]["tokens"])
    figure.suptitle(f"{run.resolve().name}: after step {steps:,}, {tokens} tokens")
    (loss, norm, *load), (speed, rate, *terms) = figure.subplots(2, num_columns, sharex=True)
    _draw_loss(loss, rows)
    _draw_norm(norm, rows)
    _draw_speed(speed, rows)
    rate.plot(*column(rows, "lr"), color=_MEAN, marker=_marker(rows))
    rate.set(ylabel="learning rate", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    for axes in load:
        _draw_each(
            axes, rows, {"moe_expert_load": "busiest expert", "moe_rank_load": "busiest rank"}
        )
        axes.set(ylabel="tokens over the mean", ylim=(1, None))
    for axes in terms:
        _draw_each(axes, rows, {"moe_aux_loss": "balance of experts", "moe_z_loss": "z-loss"})
        axes.set_ylabel("added to the loss (nats per token)")
    for axes in (loss, norm, speed, rate, *load, *terms):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (speed, rate, *terms):
        axes.set_xlabel("step")
        axes.locator_params(axis="x", integer=True)
    return save_figure(figure, run / CURVES_FILE)


def _draw_loss(axes: Any, rows: Sequence[LoggedStep]) -> None:
    _draw_with_mean(axes, rows, "loss", "training")
    valid_steps, valid = column(rows, "valid_loss")
    if valid:
        label = f"validation, at the end {valid[-1]:.4g}"
        axes.plot(valid_steps, valid, color=_OTHER, marker="o", markersize=4, label=label)
    axes.set_ylabel("loss (nats per token)")
    axes.legend(frameon=False, loc="upper right")
    per_step = rows[-1]["tokens"] / rows[-1]["step"]
    if len(rows) == 1 or not per_step:
        return  # one point gives the axis no scale
    top = axes.secondary_xaxis("top", functions=(lambda s: s * per_step, lambda t: t / per_step))
    top.set_xlabel("tokens")
    top.xaxis.set_major_formatter(lambda value, _: _amount(value))
    top.tick_params(labelsize="small")


def _draw_norm(axes: Any, rows: Sequence[LoggedStep]) -> None:
    _, norms = column(rows, "grad_norm")
    _draw_with_mean(axes, rows, "grad_norm", "before clipping")
    if max(norms) > 20 * min(norms) > 0:
        axes.set_yscale("log")
    axes.set_ylabel("gradient norm")
    axes.legend(frameon=False, loc="upper right")


def _draw_speed(axes: Any, rows: Sequence[LoggedStep]) -> None:
    steps, speeds = column(rows, "tokens_per_second")
    axes.plot(steps, speeds, color=_MEAN, marker=_marker(rows))
    axes.set(ylabel="tokens per second", ylim=(0, None))
    axes.yaxis.set_major_formatter(lambda value, _: _amount(value))
    _, shares = column(rows, "mfu")
    words = [f"median {_amount(median_high(speeds))} tokens/s"]
    words += [f"MFU {median_high(shares):.1%}"] if shares else []
    words.append(f"peak memory {max(row['memory_bytes'] for row in rows) / 2**30:.2f} GiB")
    axes.set_title(", ".join(words), fontsize="medium")


def _draw_each(axes: Any, rows: Sequence[LoggedStep], labels: Mapping[str, str]) -> None:
    for (name, label), color in zip(labels.items(), (_MEAN, _OTHER), strict=True):
        steps, values = column(rows, name)
        label += f", at the end {values[-1]:.4g}"
        axes.plot(steps, values, color=color, marker=_marker(rows), label=label)
    axes.legend(frameon=False, loc="upper right")


def _draw_with_mean(axes: Any, rows: Sequence[LoggedStep], name: str, label: str) -> None:
    """Draws the values in a pale colour, with their running mean on top unless they are few."""
    steps, values = column(rows, name)
    label = f"{label}, at the end "
    if len(values) <= _FEW:
        label += f"{values[-1]:.4g}"
        axes.plot(steps, values, color=_MEAN, marker=_marker(rows), label=label)
        return
    # A hundredth of the run, but at least three logged steps.
    half_life = (steps[-1] - steps[0]) / min(100, len(steps) // 3)
    mean = running_mean(steps, values, half_life)
    axes.plot(steps, values, color=_RAW, linewidth=0.9)
    axes.plot(steps, mean, color=_MEAN, linewidth=1.8, label=f"{label}{mean[-1]:.4g} (smoothed)")


def column(rows: Sequence[LoggedStep], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric; lines without it are left out."""
    logged = [row for row in rows if row.get(name) is not None]
    return [row["step"] for row in logged], [row[name] for row in logged]


def running_mean(steps: Sequence[int], values: Sequence[float], half_life: float) -> list[float]:
    """The mean around every step; a value ``half_life`` steps away has half the weight.

    Both sides contribute, so the mean does not lag behind a falling loss. The steps need not be
    equally spaced. A forward and a backward pass, each a discounted sum (an exponential moving
    average before it is normalised), give all means:

        weight of a value     1/4   1/2    1    1/2   1/4
        at a distance of      -2h    -h    0     h    2h
    """
    forward = _discounted(steps, values, half_life)
    backward = _discounted(steps[::-1], values[::-1], half_life)[::-1]
    # Both passes contain the value itself.
    return [
        (before + after - value) / (weight_before + weight_after - 1)
        for value, (before, weight_before), (after, weight_after) in zip(values, forward, backward)
    ]


def _discounted(
    steps: Sequence[int], values: Sequence[float], half_life: float
) -> list[tuple[float, float]]:
    """For each value, the discounted sums of all values up to it and of their weights."""
    sums: list[tuple[float, float]] = []
    total = weight = 0.0
    before = steps[0] if steps else 0
    for step, value in zip(steps, values, strict=True):
        kept = math.exp2(-abs(step - before) / half_life) if half_life > 0 else 0.0
        total, weight, before = total * kept + value, weight * kept + 1.0, step
        sums.append((total, weight))
    return sums


def _marker(rows: Sequence[LoggedStep]) -> str:
    return "." if len(rows) <= _FEW else ""


def _amount(value: float) -> str:
    """A large number with three digits, e.g. 1.05M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A value for each bucket of positions; bucket ``i`` ends before position ``ends[i]``."""

    label: str
    ends: Sequence[int]
    values: Sequence[float]


def draw_by_position(path: Path, curves: Sequence[Curve], *, title: str = "") -> Path:
    """Draws perplexity by position, with both axes logarithmic.

    The first bucket begins at position 0; it is drawn from half of its end on.

    Raises:
        OSError: the plot cannot be written.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for curve in curves:
        edges = [max(1, curve.ends[0] // 2), *curve.ends]
        values = [value if math.isfinite(value) else math.nan for value in curve.values]
        axes.stairs(values, edges, baseline=None, label=curve.label, linewidth=1.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    axes.set(xlabel="position in the row (tokens)", ylabel="perplexity", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_figure(figure, path)


def draw_heat_map(
    path: Path,
    shares: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_name: str,
    column_name: str,
    title: str = "",
) -> Path:
    """Draws a table of shares in [0, 1] as coloured squares with percentages.

    Args:
        shares: one list per row.
        rows, columns: the labels of the rows and the columns.
        row_name, column_name: the labels of the axes.

    Raises:
        OSError: the plot cannot be written.
    """
    figure = new_figure(2.5 + 0.9 * len(columns), 1.8 + 0.5 * len(rows))
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0.0, vmax=1.0, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=column_name, ylabel=row_name)
    axes.set_title(title, fontsize="medium")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            ink = "black" if 0.15 < value < 0.9 else "white"  # both ends of the scale are dark
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=ink)
    bar = figure.colorbar(image, ax=axes)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return save_figure(figure, path)


def draw_experts(run: Path) -> Path | None:
    """Draws how a run's tokens were spread over its experts.

    Three pictures of layers x experts, at the beginning, in the middle and at the end, and one of
    the busiest expert of each layer over time.

    Returns:
        The plot, ``experts.png`` in the run's folder; None if the run has no experts.

    Raises:
        OSError: the counts cannot be read, or the plot cannot be written.
    """
    file = run / EXPERTS_FILE
    rows = _read_lines(file) if file.exists() else []
    if not rows:
        return None
    ratios = [[_over_mean(layer) for layer in row["counts"]] for row in rows]
    middle = min(range(len(rows)), key=lambda i: abs(2 * rows[i]["step"] - rows[-1]["step"]))
    figure = new_figure(12, min(10, 5 + 0.2 * len(ratios[0])))
    grid = figure.subplots(2, 2).flat
    for axes, i in zip(grid, (0, middle, len(rows) - 1)):
        image = _draw_ratios(axes, ratios[i])
        axes.set(title=f"step {rows[i]['step']:,}", xlabel="expert", ylabel="layer with experts")
    over_time = [[max(row[layer]) for row in ratios] for layer in range(len(ratios[0]))]
    axes = grid[3]
    _draw_ratios(axes, over_time)
    some = sorted({round(i * (len(rows) - 1) / 4) for i in range(5)})
    axes.set_xticks(some, [f"{rows[i]['step']:,}" for i in some])
    axes.set(title="the busiest expert", xlabel="step", ylabel="layer with experts")
    bar = figure.colorbar(image, ax=list(grid), label="tokens over the mean of the layer")
    bar.ax.set_yticks(range(-2, 3), ["1/4", "1/2", "1", "2", "4"])
    return save_figure(figure, run / EXPERTS_PICTURE)


def _over_mean(counts: Sequence[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    return [count / mean if mean else 1.0 for count in counts]


def _draw_ratios(axes: Any, ratios: Sequence[Sequence[float]]) -> Any:
    """Draws ratios as colours, from a quarter or less to four or more."""
    levels = [[math.log2(max(ratio, 0.25)) for ratio in row] for row in ratios]
    axes.locator_params(integer=True)
    return axes.imshow(
        levels, vmin=-2, vmax=2, cmap="RdBu_r", aspect="auto", interpolation="nearest"
    )


def main(argv: Sequence[str]) -> int:
    """Draws the curves of the named runs; returns exit code 2 if that fails, else 0."""
    try:
        require_matplotlib("plots")
        if not argv or argv[0].startswith("-"):
            raise ConfigError("RUN", " ".join(argv), "must be a run's folder", "runs/toy-1")
        for run in map(Path, argv):
            print(*filter(None, (draw_curves(run), draw_experts(run))), sep="\n")
    except (ConfigError, OSError) as error:
        print(f"plots: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
