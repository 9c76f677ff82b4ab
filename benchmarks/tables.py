"""Writes the tables and plots of README.md from the lines that benchmarks printed.

Each table stands between two markers, ``<!-- table: train -->`` and ``<!-- end: train -->``; the
tables of benchmarks of which there are no lines stay as they are. A plot is an SVG in ``plots/``.

    python benchmarks/train.py > results.jsonl
    python benchmarks/scaling.py >> results.jsonl
    python benchmarks/network.py >> results.jsonl
    python benchmarks/tables.py --results results.jsonl

Of two lines about the same thing, the values of the later one count.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness  # lets a script import this project's packages
import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from cp_megatron.config.words import read_options

HERE = Path(harness.__file__).resolve().parents[1]
SETTINGS = {"svg.hashsalt": "cp_megatron", "svg.fonttype": "none", "font.size": 9}
Line = Mapping[str, Any]
KEYS = ("tokens", "way", "axis", "ranks", "rate", "exchange")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tables and plots from the lines of benchmarks."""

    results: tuple[str, ...] = ()
    """Files of JSON lines."""
    readme: str = str(HERE / "README.md")
    """The file with the markers."""
    plots: str = str(HERE / "plots")
    """The folder of the plots."""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def ratio(value: Mapping[str, Any] | None) -> str:
    """A median with its quartiles."""
    if value is None:
        return ""
    low, high = value["quartiles"]
    return f"{value['median']:.2f} ({low:.2f} to {high:.2f})"


def share(value: float | None) -> str:
    """A share in percent."""
    return "" if value is None else f"{value:.0%}"


def train_table(lines: Sequence[Line]) -> str:
    """Tokens per second, shares and peaks of each way to train."""
    before = any("speed_over_before" in line for line in lines)
    columns = ["tokens", "way", "tokens/s", "over ours", "over transformers"]
    columns += ["over the same before"] * before + ["GEMM", "attention", "together", "peak"]
    rows = []
    for line in lines:
        row = [f"{line['tokens']:,}", line["way"], f"{line['tokens_per_second']:,.0f}"]
        row += [ratio(line.get(f"speed_over_{other}")) for other in ("ours", "transformers")]
        row += [ratio(line.get("speed_over_before"))] * before
        row += [share(line.get(key)) for key in ("gemm", "attention", "gemm_and_attention")]
        row.append(f"{line['peak_mib']:,.0f} MiB" if "peak_mib" in line else "")
        rows.append(row)
    return table(columns, rows)


def scaling_table(lines: Sequence[Line]) -> str:
    """Time and CPU time as the ranks grow."""
    columns = ["ranks", "tokens", "axis", "tokens/s", "GFLOP/s a rank", "CPU ms a token"]
    columns += ["speed-up over one process", "efficiency in CPU seconds"]
    rows = []
    for line in lines:
        shared = ", share the cores" if line["shares_cores"] else ""
        row = [f"{line['ranks']}{shared}", f"{line['tokens']:,}", line["axis"]]
        row += [f"{line['tokens_per_second']:,.0f}", f"{line['gflops_per_rank']:.0f}"]
        row += [f"{line['cpu_seconds_per_token'] * 1e3:.3f}"]
        row += [ratio(line.get("speedup")), ratio(line.get("efficiency"))]
        rows.append(row)
    return table(columns, rows)


def network_table(lines: Sequence[Line]) -> str:
    """Times and waiting of each exchange at each rate."""
    refused = [line["reason"] for line in lines if line.get("result") == "not run"]
    if refused:
        return f"Not run: {refused[-1]}."
    columns = ["ranks", "link, Mbit/s (of the doubling rate)", "exchange", "ms"]
    columns += ["waiting, ms", "waiting over computation", "over the fastest"]
    rows = []
    for line in lines:
        link = "no limit" if line["rate"] is None else f"{line['mbit']:,} ({line['rate']:g})"
        name, over = line["exchange"], ratio(line["over_fastest"])
        if name == "auto":
            rows.append([line["ranks"], link, f"`auto` picks {line['picks']}", "", "", "", over])
            continue
        times = [f"{line['ms']:,.0f}", f"{line['waiting_ms']:,.0f}", share(line["waiting_share"])]
        rows.append([line["ranks"], link, name, *times, over])
    return table(columns, rows)


def train_plot(axes: Any, lines: Sequence[Line]) -> None:
    """Bars: tokens per second, for each length of a row."""
    ways, lengths = [*dict.fromkeys(line["way"] for line in lines)], sizes(lines, "tokens")
    for number, tokens in enumerate(lengths):
        speeds = {x["way"]: x["tokens_per_second"] for x in lines if x["tokens"] == tokens}
        places = [i + 0.8 * number / len(lengths) for i in range(len(ways))]
        heights = [speeds.get(way, 0) for way in ways]
        axes.barh(places, heights, height=0.8 / len(lengths), label=f"{tokens:,} tokens")
    axes.set_yticks([i + 0.2 for i in range(len(ways))], ways)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second")


def scaling_plot(axes: Any, lines: Sequence[Line]) -> None:
    """Curves: efficiency over the number of ranks, for each axis."""
    for axis in ("cp", "tp"):
        points = [(1, 1.0)]
        points += [(x["ranks"], x["efficiency"]["median"]) for x in lines if x["axis"] == axis]
        axes.plot(*zip(*points, strict=True), marker="o", label=axis.upper())
    axes.set_xticks(sizes(lines, "ranks"))
    axes.set_xlabel("ranks")
    axes.set_ylabel("efficiency in CPU seconds")
    axes.set_ylim(0, 1.1)


def network_plot(axes: Any, lines: Sequence[Line]) -> None:
    """Curves: waiting over the rate of the link, for each exchange and number of ranks."""
    limited = [x for x in lines if x.get("rate") is not None and x["exchange"] != "auto"]
    for key in dict.fromkeys((x["ranks"], x["exchange"]) for x in limited):
        points = [x for x in limited if (x["ranks"], x["exchange"]) == key]
        rates, waiting = [x["rate"] for x in points], [x["waiting_share"] for x in points]
        axes.plot(rates, waiting, marker="o", label=f"{key[0]} ranks, {key[1]}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(
        "rate of the link, of the rate at which a ring of whole shards doubles the time"
    )
    axes.set_ylabel("waiting / computation")


def sizes(lines: Sequence[Line], key: str) -> list[int]:
    """The values of ``key``, in ascending order."""
    return sorted({line[key] for line in lines})


MAKERS: Mapping[str, tuple[Callable[..., str], Callable[..., None]]] = {
    "train": (train_table, train_plot),
    "scaling": (scaling_table, scaling_plot),
    "network": (network_table, network_plot),
}


def read_lines(files: Sequence[str]) -> dict[str, list[Line]]:
    """The lines of each benchmark; those about the same thing are merged."""
    found: dict[str, dict[tuple[object, ...], Line]] = {}
    for file in files:
        for text in Path(file).read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            key = tuple(line.get(name) for name in KEYS)
            same = found.setdefault(line["benchmark"], {})
            same[key] = {**same.get(key, {}), **line}
    return {name: [*lines.values()] for name, lines in found.items()}


def draw(path: Path, plot: Callable[..., None], lines: Sequence[Line]) -> None:
    """Draws one plot."""
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        plot(axes, lines)
        axes.legend(fontsize=7)
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    arguments = read_options(sys.argv[1:], Arguments, program=sys.argv[0], description=__doc__)
    readme, plots = Path(arguments.readme), Path(arguments.plots)
    text = readme.read_text(encoding="utf-8")
    plots.mkdir(exist_ok=True)
    for name, lines in read_lines(arguments.results).items():
        if name not in MAKERS:
            continue
        make, plot = MAKERS[name]
        machine = lines[-1]["hardware"]
        parts = [make(lines)]
        if not any("result" in line for line in lines):
            draw(plots / f"{name}.svg", plot, lines)
            parts.append(f"![{name}]({plots.name}/{name}.svg)")
        parts.append(f"{machine['cores']} cores of {machine['cpu']}, PyTorch {machine['torch']}.")
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        whole = "\n\n".join([begin, *parts, end])
        text, count = re.subn(pattern, lambda _, whole=whole: whole, text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"{readme} has {count} tables with the marker {begin}")
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
