"""Prints the results of an evaluation, and writes results.json and the pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.metrics.plots import Curve, draw_by_position, draw_heat_map


@dataclass(frozen=True, kw_only=True)
class Score:
    """Scores of a group of predicted tokens.

    Attributes:
        tokens: the number of tokens.
        loss: the mean loss in nats; 0 if there are no tokens.
        accuracy: the share of tokens that the model finds most likely.
    """

    tokens: int
    loss: float
    accuracy: float

    @classmethod
    def of(cls, sums: Iterable[float]) -> Score:
        """Makes a score from the sum of losses, the number of right guesses and of tokens."""
        loss, right, tokens = sums
        count = max(tokens, 1)
        return cls(tokens=round(tokens), loss=loss / count, accuracy=right / count)

    @property
    def perplexity(self) -> float:
        """e to the mean loss; inf if a float cannot hold it."""
        return math.exp(self.loss) if not self.loss > 700 else math.inf


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Scores of predictions with ``first`` + 1 to ``end`` tokens of context."""

    first: int
    end: int
    score: Score


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Scores of the rows of one length, in total and by position."""

    length: int
    rows: int
    whole: Score
    buckets: tuple[Bucket, ...]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The result of one question.

    Attributes:
        task: needle or variables.
        length, depth, sample: the numbers of the task.
        answer: the correct answer.
        exact: whether greedy decoding gives the whole answer.
        token_accuracy: the share of its tokens that are most likely after the correct ones.
        log_probability: the log probability of the whole answer, in nats.
    """

    task: str
    length: int
    depth: int
    sample: int
    answer: str
    exact: bool
    token_accuracy: float
    log_probability: float


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """The results of an evaluation.

    Attributes:
        about: model, data and grid, as plain data.
        perplexity: one entry per length.
        answers: one entry per question.
    """

    about: Mapping[str, Any]
    perplexity: tuple[Perplexity, ...]
    answers: tuple[Answer, ...]

    def cells(self) -> dict[tuple[str, int, int], list[Answer]]:
        """Returns the answers by (task, length, depth); those of a cell are neighbours."""
        cells = groupby(self.answers, lambda answer: (answer.task, answer.length, answer.depth))
        return {key: list(answers) for key, answers in cells}

    def cells_of(self, task: str) -> dict[tuple[int, int], list[Answer]]:
        """Returns the answers of one task by (length, depth)."""
        return {key[1:]: answers for key, answers in self.cells().items() if key[0] == task}

    @property
    def tasks(self) -> list[str]:
        """The tasks that have answers."""
        return list(dict.fromkeys(answer.task for answer in self.answers))


def write_results(results: EvaluationResults, folder: Path, *, plot: bool) -> list[Path]:
    """Writes results.json and the pictures into ``folder``, which is created.

    Returns:
        the files.

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    new = file.with_suffix(".tmp")
    new.write_text(json.dumps(_plain(results), indent=1) + "\n", encoding="utf-8")
    new.replace(file)
    return [file, *(_pictures(results, folder) if plot else [])]


def print_results(results: EvaluationResults, console: Console) -> None:
    """Prints the tables of perplexity by position and of exact answers."""
    if results.perplexity:
        console.print(_perplexity_table(results.perplexity), highlight=False)
    for task in results.tasks:
        console.print(_answer_table(results, task), highlight=False)


def _plain(results: EvaluationResults) -> dict[str, Any]:
    """Returns plain data, with None for numbers that JSON cannot hold."""
    rows = [
        {
            "length": row.length,
            "rows": row.rows,
            **_score(row.whole),
            "buckets": [{"first": b.first, "end": b.end, **_score(b.score)} for b in row.buckets],
        }
        for row in results.perplexity
    ]
    cells = [
        {"task": task, "length": length, "depth": depth, "samples": len(cell), **_mean(cell)}
        for (task, length, depth), cell in results.cells().items()
    ]
    answers = [asdict(answer) for answer in results.answers]
    for entry in answers:
        entry["log_probability"] = _finite(entry["log_probability"])
    return {**results.about, "perplexity": rows, "cells": cells, "answers": answers}


def _score(score: Score) -> dict[str, Any]:
    return {
        "tokens": score.tokens,
        "loss": _finite(score.loss),
        "perplexity": _finite(score.perplexity),
        "accuracy": score.accuracy,
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _mean(answers: Sequence[Answer]) -> dict[str, Any]:
    count = len(answers)
    return {
        "exact": sum(answer.exact for answer in answers) / count,
        "token_accuracy": sum(answer.token_accuracy for answer in answers) / count,
        "log_probability": _finite(sum(answer.log_probability for answer in answers) / count),
    }


def _perplexity_table(rows: Sequence[Perplexity]) -> Table:
    table = Table(title="perplexity by position (right guesses)", box=SIMPLE_HEAD)
    table.add_column("positions", justify="right")
    for row in rows:
        table.add_column(f"{row.length:,} tokens x {row.rows}", justify="right")
    columns = [{(b.first, b.end): b.score for b in row.buckets} for row in rows]
    for first, end in sorted({span for scores in columns for span in scores}):
        shown = [_shown(scores.get((first, end))) for scores in columns]
        table.add_row(f"{first:,} to {end - 1:,}", *shown)
    table.add_section()
    table.add_row("all", *(_shown(row.whole) for row in rows))
    return table


def _shown(score: Score | None) -> str:
    return "" if score is None else f"{score.perplexity:.4g} ({score.accuracy:.1%})"


def _answer_table(results: EvaluationResults, task: str) -> Table:
    cells = results.cells_of(task)
    lengths = sorted({length for length, _ in cells})
    table = Table(title=f"{task}: exact answers (right tokens)", box=SIMPLE_HEAD)
    table.add_column("depth" if task == "needle" else "", justify="right")
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    for depth in sorted({depth for _, depth in cells}):
        means = [_mean(cells[length, depth]) for length in lengths]
        shown = [f"{mean['exact']:.0%} ({mean['token_accuracy']:.0%})" for mean in means]
        table.add_row(f"{depth}%" if task == "needle" else "all over the text", *shown)
    return table


def _pictures(results: EvaluationResults, folder: Path) -> list[Path]:
    files = []
    name = str(results.about.get("model", ""))
    if results.perplexity:
        curves = [
            Curve(
                label=f"{row.length:,} tokens",
                ends=[bucket.end for bucket in row.buckets],
                values=[bucket.score.perplexity for bucket in row.buckets],
            )
            for row in results.perplexity
        ]
        files.append(draw_by_position(folder / "perplexity.png", curves, title=name))
    tasks = results.tasks
    return files + [_heat_map(results, task, folder / f"{task}.png", name) for task in tasks]


def _heat_map(results: EvaluationResults, task: str, path: Path, name: str) -> Path:
    cells = results.cells_of(task)
    lengths, depths = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    exact = [[_mean(cells[length, depth])["exact"] for length in lengths] for depth in depths]
    samples = min(map(len, cells.values()))
    return draw_heat_map(
        path,
        exact,
        rows=[f"{depth}%" for depth in depths] if task == "needle" else ["all over"],
        columns=[f"{length:,}" for length in lengths],
        row_name="depth in the text",
        column_name="tokens",
        title=f"{name}\n{task}: exact answers of {samples}",
    )
