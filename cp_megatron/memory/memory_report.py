"""What each rank holds, for people and for programs: a table, and ``memory.json``. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cp_megatron.memory import predict as kinds
from cp_megatron.memory.predict import Held, predict_ranks
from cp_megatron.preflight.run_plan import RunPlan
from cp_megatron.preflight.start_table import print_start

MEMORY_FILE = "memory.json"
RANKS_SHOWN = 8
MIB = 2**20
_NAME_WIDTH, _NUMBER_WIDTH = 22, 13

Key = tuple[str, str]
"""Kind and detail."""
Column = tuple[str, dict[Key, int], dict[Key, int]]
"""Its head, and bytes predicted and measured."""


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """What all ranks hold.

    Attributes:
        plan: the run, on its device.
        predicted: of each rank.
        measured: the same; empty where nothing ran.
    """

    plan: RunPlan
    predicted: Sequence[Sequence[Held]]
    measured: Sequence[Sequence[Held]] = ()

    def write(self, folder: Path, *, step: int) -> None:
        """Bytes of every rank as ``memory.json``, of the training step ``step``."""
        ranks = [
            {
                "rank": rank,
                "held": [
                    {"kind": kind, "detail": detail, **_numbers((kind, detail), column)}
                    for kind, detail in _keys([column])
                ],
            }
            for rank, column in enumerate(self._ranks())
        ]
        found = {"step": step, "device": self.plan.device, "dtype": self.plan.dtype, "ranks": ranks}
        path = folder / MEMORY_FILE
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def print(self, console: Console) -> None:
        """The table, in as many parts as the console is narrow."""
        columns = self._columns()
        # A row of zeros says nothing; memory.json has it.
        keys = [key for key in _keys(columns) if any(_some(key, column) for column in columns)]
        per_column = _NUMBER_WIDTH * (2 if self.measured else 1)
        at_once = max(1, (console.width - _NAME_WIDTH) // per_column)
        for first in range(0, len(columns), at_once):
            console.print(self._table(keys, columns[first : first + at_once]), highlight=False)
        for note in self._notes():
            console.print(note, highlight=False, markup=False)

    def _ranks(self) -> list[Column]:
        measured = [*self.measured] or [()] * len(self.predicted)
        return [
            (f"rank {rank}", _by_key(plan), _by_key(found))
            for rank, (plan, found) in enumerate(zip(self.predicted, measured, strict=True))
        ]

    def _columns(self) -> list[Column]:
        """One for all ranks that are alike; of many ranks the least and the most."""
        ranks = self._ranks()
        if len(ranks) > RANKS_SHOWN and any(rank[1:] != ranks[0][1:] for rank in ranks):
            keys = _keys(ranks)
            return [
                (
                    head,
                    {key: of(rank[1].get(key, 0) for rank in ranks) for key in keys},
                    {key: of(rank[2].get(key, 0) for rank in ranks) for key in keys},
                )
                for head, of in (("least of all ranks", min), ("most of all ranks", max))
            ]
        alike: list[list[int]] = []
        for number, rank in enumerate(ranks):
            same = (group for group in alike if ranks[group[0]][1:] == rank[1:])
            group = next(same, None)
            if group is None:
                alike.append([number])
            else:
                group.append(number)
        return [(_head(group), *ranks[group[0]][1:]) for group in alike]

    def _table(self, keys: Sequence[Key], columns: Sequence[Column]) -> Table:
        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1), title_justify="left")
        table.add_column("MiB", no_wrap=True)
        for head, _, _ in columns:
            table.add_column(f"{head}\npredicted", justify="right", no_wrap=True)
            if self.measured:
                table.add_column("\nmeasured", justify="right", no_wrap=True)
        for name, group in _lines(keys):
            cells = []
            for _, predicted, measured in columns:
                cells.append(_mib(group, predicted))
                cells += [_mib(group, measured)] if self.measured else []
            table.add_row(name, *cells)
        return table

    def _notes(self) -> Iterator[str]:
        if self.plan.grid.cp > 1 and self.plan.sequence.per_batch:
            yield "exchange buffers are predicted for rows that are one document"


def predict_report(plan: RunPlan) -> Iterator[MemoryReport]:
    """What would be held, on each device that the run may still get."""
    for device in plan.kernels:
        on_device = plan if plan.device else plan.on_device(device)
        ranks = range(plan.grid.world_size)
        yield MemoryReport(plan=on_device, predicted=predict_ranks(on_device, ranks))


def print_prediction(plan: RunPlan, console: Console | None = None) -> None:
    """Prints that, to standard output unless a console is given."""
    console = console or Console()
    for report in predict_report(plan):
        title = f"memory on {report.plan.device}, {report.plan.dtype}"
        console.print(title, highlight=False, markup=False)
        report.print(console)


def print_dry_run(plan: RunPlan) -> int:
    """Prints the start table, and with --memory-report what would be held; the exit code."""
    print_start(plan, None)
    if plan.config.memory.memory_report:
        print_prediction(plan)
    return 0


def _by_key(held: Sequence[Held]) -> dict[Key, int]:
    return {(row.kind, row.detail): row.num_bytes for row in held}


def _numbers(key: Key, column: Column) -> dict[str, int | None]:
    return {"predicted": column[1].get(key), "measured": column[2].get(key)}


def _some(key: Key, column: Column) -> bool:
    return bool(column[1].get(key) or column[2].get(key))


def _keys(columns: Sequence[Column]) -> list[Key]:
    """All kinds and details that any has, in order."""
    return list(dict.fromkeys(key for column in columns for part in column[1:] for key in part))


def _lines(keys: Sequence[Key]) -> Iterator[tuple[str, list[Key]]]:
    """What each line says and adds up: activations together, then one by one."""
    activations = [key for key in keys if key[0] == kinds.ACTIVATIONS]
    for key in keys:
        kind, detail = key
        if activations and key == activations[0]:
            yield kind, activations
        if kind == kinds.ACTIVATIONS:
            yield f"  {detail}", [key]
        else:
            yield ", ".join(word for word in key if word), [key]


def _head(ranks: Sequence[int]) -> str:
    """rank 0, ranks 0-3, ranks 0, 2."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"


def _mib(keys: Sequence[Key], found: dict[Key, int]) -> str:
    known = [found[key] for key in keys if key in found]
    if not known:
        return "-"
    size = sum(known) / MIB
    return f"{size:,.4f}" if size < 1000 else f"{size:,.1f}"
