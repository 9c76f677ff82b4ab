"""Teams of processes that run the same work, timed fairly against each other.

In every round each contestant runs once, in a new random order, so that other load on the machine
affects all of them alike. The result is the median of the ratios of the rounds.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PAUSE = 0.05  # seconds between two measurements
ANSWER_TIMEOUT = 3600.0  # seconds: the longest rows take minutes


def hardware() -> Mapping[str, object]:
    """The machine and software that the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


@dataclass(frozen=True, kw_only=True)
class Place:
    """A process's place in its team: ``rank`` of ``size``. A team of one has no process group."""

    rank: int
    size: int
    threads: int
    store: str


def serve(
    connection: Connection,
    place: Place,
    bench: Callable[[Place], Any],
    enter: Callable[[Place], None] | None = None,
) -> None:
    """Runs in a separate process and answers (method, argument) until the pipe closes."""
    if enter is not None:
        enter(place)
    torch.set_num_threads(place.threads)
    if place.size > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{place.store}",
            rank=place.rank,
            world_size=place.size,
        )
    answers = bench(place)
    while True:
        try:
            method, argument = connection.recv()
        except EOFError:
            break
        connection.send(getattr(answers, method)(argument))
    if place.size > 1:
        dist.destroy_process_group()


class Team:
    """The parent's handle on ``size`` processes with ``threads`` threads each.

    Each process calls ``bench`` with its ``Place``; the methods of the result answer ``ask``. Its
    ``time`` returns when it began and ended, on the monotonic clock that the processes share.
    ``enter`` is called first, before the process group is made.
    """

    def __init__(
        self,
        size: int,
        threads: int,
        bench: Callable[[Place], Any],
        enter: Callable[[Place], None] | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "rendezvous")
        self._members: list[tuple[Connection, SpawnProcess]] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            place = Place(rank=rank, size=size, threads=threads, store=store)
            given = (theirs, place, bench, *([enter] if enter else []))
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self._members.append((ours, process))

    def ask(self, method: str, argument: object) -> list[Any]:
        """The answers of all members, in rank order."""
        for connection, _ in self._members:
            connection.send((method, argument))
        return [self._answer(connection) for connection, _ in self._members]

    @staticmethod
    def _answer(connection: Connection) -> Any:
        if not connection.poll(ANSWER_TIMEOUT):
            raise TimeoutError(f"no answer within {ANSWER_TIMEOUT:g} s")
        return connection.recv()

    def seconds(self, name: str) -> float:
        """Seconds from the first member's begin to the last one's end."""
        spans = self.ask("time", name)
        return float(max(end for _, end in spans) - min(begin for begin, _ in spans))

    def close(self) -> None:
        """Ends the processes."""
        for connection, _ in self._members:
            connection.close()
        for _, process in self._members:
            process.join(10)
        self._folder.cleanup()


def measure(teams: Mapping[str, Team], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Seconds per contestant and round.

    The order changes in every round, because the threads of a process that has just finished keep
    spinning for a moment and slow down the next contestant. The pause lets them go to sleep.
    """
    names = list(teams)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + rounds):
        shuffle(names)
        for name in names:
            time.sleep(PAUSE)
            elapsed = teams[name].seconds(name)
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return seconds


def paired(over: Sequence[float], under: Sequence[float]) -> dict[str, object]:
    """The median and the quartiles of the ratios of the rounds."""
    ratios = [first / second for first, second in zip(over, under, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)]}


def compared(seconds: Mapping[str, list[float]], ours: str) -> dict[str, object]:
    """Medians, and the time of every other contestant over ``ours`` (above 1, ours is faster)."""
    medians = {name: round(statistics.median(values) * 1e3, 3) for name, values in seconds.items()}
    over = {name: paired(values, seconds[ours]) for name, values in seconds.items() if name != ours}
    return {"rounds": len(seconds[ours]), "median_ms": medians, f"over_{ours}": over}
