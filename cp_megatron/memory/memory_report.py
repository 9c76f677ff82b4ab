"""Reports the memory of each rank as a table and as ``memory.json``. It does not import torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.memory import kinds
from cp_megatron.memory.kinds import Held
from cp_megatron.memory.predict import expert_rows, predict_ranks
from cp_megatron.memory.stage_notes import MIB, stage_notes
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.start_table import print_start

MEMORY_FILE = "memory.json"
RANKS_SHOWN = 8
_NAME_WIDTH, _NUMBER_WIDTH = 22, 13

Key = tuple[str, str]
"""Kind and detail."""
Parts = Sequence[Mapping[Key, int]]
"""The predicted bytes and the measured bytes."""


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """The memory that all ranks hold.

    Attributes:
        plan: the run, on its device.
        predicted: the predicted memory of each rank.
        measured: the measured memory of each rank; empty if nothing ran.
    """

    plan: RunPlan
    predicted: Sequence[Sequence[Held]]
    measured: Sequence[Sequence[Held]] = ()

    def write(self, folder: Path, *, step: int) -> None:
        """Writes the bytes of every rank in the training step ``step`` to ``memory.json``."""
        ranks = []
        for rank, (predicted, measured) in enumerate(self._ranks()):
            held = [
                {"kind": key[0], "detail": key[1]}
                | {"predicted": predicted.get(key), "measured": measured.get(key)}
                for key in _keys([predicted, measured])
            ]
            ranks.append({"rank": rank, "held": held})
        about = {"step": step, "device": self.plan.device, "dtype": self.plan.dtype}
        text = json.dumps({**about, "ranks": ranks}, indent=1)
        (folder / MEMORY_FILE).write_text(text + "\n", encoding="utf-8")

    def print(self, console: Console) -> None:
        """Prints the table, in several parts on a narrow console."""
        columns = self._columns()
        # Rows of zeros are left out here; memory.json has them.
        shown = [part for _, parts in columns for part in parts]
        keys = [key for key in _keys(shown) if any(part.get(key) for part in shown)]
        per_column = _NUMBER_WIDTH * (2 if self.measured else 1)
        at_once = max(1, (console.width - _NAME_WIDTH) // per_column)
        for first in range(0, len(columns), at_once):
            console.print(self._table(keys, columns[first : first + at_once]), highlight=False)
        for note in self._notes():
            console.print(note, highlight=False, markup=False)

    def _notes(self) -> Iterator[str]:
        """What the numbers assume, and what they depend on."""
        if self._shows_stages:
            yield "a column has the most that a rank of a stage holds"
        yield from stage_notes(self.plan)
        if self.plan.grid.cp > 1 and self.plan.sequence.per_batch:
            kept = ""
            if self.plan.config.model.has_linear_layers:
                kept = " and the states that recurrences keep"
            yield f"exchange buffers{kept} are predicted for rows that are one document"
        if self.plan.grid.ep > 1:
            balanced, most = expert_rows(self.plan)
            note = f"a layer's experts are predicted to keep {balanced / MIB:,.4f} MiB of tokens"
            yield f"{note}, as many on every rank; at worst, one rank keeps {most / MIB:,.4f}"

    @property
    def _shows_stages(self) -> bool:
        return len(self.predicted) > RANKS_SHOWN and self.plan.grid.pp > 1

    def _ranks(self) -> list[Parts]:
        measured = [*self.measured] or [()] * len(self.predicted)
        return [
            [{(row.kind, row.detail): row.num_bytes for row in held} for held in pair]
            for pair in zip(self.predicted, measured, strict=True)
        ]

    def _columns(self) -> list[tuple[str, Parts]]:
        """Merges the columns of equal ranks; for many ranks returns the least and the most, or the
        most of each stage."""
        ranks = self._ranks()
        if self._shows_stages:
            size = len(ranks) // self.plan.grid.pp
            stages = [ranks[at : at + size] for at in range(0, len(ranks), size)]
            return [(f"stage {i}", _each(max, stage)) for i, stage in enumerate(stages)]
        if len(ranks) > RANKS_SHOWN and any(rank != ranks[0] for rank in ranks):
            heads = ("least of all ranks", min), ("most of all ranks", max)
            return [(head, _each(of, ranks)) for head, of in heads]
        equal: dict[tuple[object, ...], list[int]] = {}
        for number, parts in enumerate(ranks):
            equal.setdefault(tuple(frozenset(part.items()) for part in parts), []).append(number)
        return [(self._head(group), ranks[group[0]]) for group in equal.values()]

    def _head(self, ranks: Sequence[int]) -> str:
        """Names the ranks of a column and, if there are several, their stages."""
        stages = sorted({self.plan.grid.coordinates(rank).pp for rank in ranks})
        above = f"{_numbered('stage', stages)}\n" if self.plan.grid.pp > 1 else ""
        return above + _numbered("rank", ranks)

    def _table(self, keys: Sequence[Key], columns: Sequence[tuple[str, Parts]]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
        table.add_column("MiB", no_wrap=True)
        sides = 2 if self.measured else 1
        for head, _ in columns:
            blank = "\n" * head.count("\n")
            for title in (f"{head}\npredicted", f"{blank}\nmeasured")[:sides]:
                table.add_column(title, justify="right", no_wrap=True)
        for name, group in _lines(keys):
            table.add_row(name, *(_mib(group, x) for _, parts in columns for x in parts[:sides]))
        return table


def predict_report(plan: RunPlan) -> Iterator[MemoryReport]:
    """Predicts the memory for each device that the run can still get."""
    for device in plan.kernels:
        on_device = plan if plan.device else plan.on_device(device)
        ranks = range(plan.grid.world_size)
        yield MemoryReport(plan=on_device, predicted=predict_ranks(on_device, ranks))


def print_prediction(plan: RunPlan, console: Console | None = None) -> None:
    """Prints the predictions, to standard output by default."""
    console = console or Console()
    for report in predict_report(plan):
        title = f"memory on {report.plan.device}, {report.plan.dtype}"
        console.print(title, highlight=False, markup=False)
        report.print(console)


def print_dry_run(plan: RunPlan) -> int:
    """Prints the start table and, with --memory-report, the predictions; returns the exit code."""
    print_start(plan, None)
    if plan.config.memory.memory_report:
        print_prediction(plan)
    return 0


def _keys(parts: Parts) -> list[Key]:
    """Returns the kinds and details of all parts, in order."""
    return list(dict.fromkeys(key for part in parts for key in part))


def _lines(keys: Sequence[Key]) -> Iterator[tuple[str, list[Key]]]:
    """Yields each line's name and what it sums: activations in total, then one by one."""
    activations = [key for key in keys if key[0] == kinds.ACTIVATIONS]
    for key in keys:
        kind, detail = key
        if key in activations[:1]:
            yield kind, activations
        is_part = kind == kinds.ACTIVATIONS
        yield f"  {detail}" if is_part else ", ".join(filter(None, key)), [key]


def _each(of: Callable[..., int], ranks: Sequence[Parts]) -> Parts:
    """Applies ``min`` or ``max`` to every number of the ranks."""
    keys = _keys([part for parts in ranks for part in parts])
    return [{key: of(x.get(key, 0) for x in side) for key in keys} for side in zip(*ranks)]


def _numbered(name: str, numbers: Sequence[int]) -> str:
    """Returns ``rank 0``, ``ranks 0-3`` or ``ranks 0, 2``."""
    if len(numbers) == 1:
        return f"{name} {numbers[0]}"
    if numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{name}s {numbers[0]}-{numbers[-1]}"
    return f"{name}s {', '.join(map(str, numbers))}"


def _mib(keys: Sequence[Key], held: Mapping[Key, int]) -> str:
    known = [held[key] for key in keys if key in held]
    if not known:
        return "-"
    size = sum(known) / MIB
    return f"{size:,.4f}" if size < 1000 else f"{size:,.1f}"
