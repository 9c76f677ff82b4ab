"""Watches the ranks of a run: heartbeats, the launcher's death, and which rank broke the run.

    rank 0   beat beat beat  lost rank 2 -> reports, waits 1.5 s: 1 and 3 report, 2 has no beat
    rank 1   beat beat beat  lost rank 2 -> reports                         -> "rank 2 is gone"
    rank 2   beat beat X     killed
    rank 3   beat beat beat  waits for rank 1 ... its connection breaks when rank 1 exits

A thread writes an increasing number into the store through which the ranks met, over a connection
of its own. It keeps running while a collective waits, unless the process is stopped.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from torch.distributed import Store  # type: ignore[attr-defined]

from cp_megatron.comm.flight import last_collective, write_flight
from cp_megatron.comm.runtime import Launch
from cp_megatron.faults.culprit import Report, judge, kind_of

BEAT_SECONDS = 0.5
"""A beat takes two requests to the store, which serves all ranks by one thread."""
REPORT_SECONDS = 1.5
"""How long a rank collects reports after a connection broke; longer than two beats."""
ORPHAN_SECONDS = 30.0
"""The time that a rank whose launcher died has to finish its step and save."""
_OVER_SECONDS = 5.0
_STATES: Mapping[str, str] = MappingProxyType(
    {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead", "D": "waiting for a disk"}
)


class Watch:
    """The watch of one rank, a context manager around the training.

    Args:
        launch: how this process was started.
        store: a store that all ranks can reach.
        folder: the run's folder, for the record of collectives.
        program: the name that messages to the user begin with.
        orphaned: called once when the launcher has died.
    """

    def __init__(
        self,
        launch: Launch,
        store: Store,
        *,
        folder: Path,
        program: str,
        orphaned: Callable[[], None],
    ) -> None:
        self._launch, self._folder, self._program = launch, folder, program
        self._store: Store = store.clone() if hasattr(store, "clone") else store
        self._prefix = f"watch{launch.restarts}"
        self._orphaned, self._parent = orphaned, os.getppid()
        self._ended = threading.Event()
        who = [os.getpid(), socket.gethostname()]
        self._store.set(self._key("who", launch.rank), json.dumps(who))
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def explain(self, error: BaseException) -> None:
        """Prints what broke the run, once over all ranks, after ``error`` ended this rank.

        A rank that is stuck on this node is killed.
        """
        notes = " ".join(getattr(error, "__notes__", ()))
        where = ", ".join(part for part in (notes, last_collective()) if part)
        report = Report(kind=kind_of(error), where=where)
        with suppress(OSError):
            write_flight(self._folder / f"flight-rank-{self._launch.rank}.jsonl")
        try:
            self._explain(error, report)
        except (RuntimeError, OSError, ValueError):  # the rank that served the store is gone
            self._say(f"rank {self._launch.rank}: {error}; the ranks' store is gone too")

    def _explain(self, error: BaseException, report: Report) -> None:
        rank = self._launch.rank
        if report.kind == "failed":
            if self._is_first("failure"):
                trace = "".join(traceback.format_exception(error))
                self._say(f"rank {rank} failed\n{trace.rstrip()}")
            self._publish(report)
            return
        self._publish(report)
        reports, alive = self._collect()
        if any(other.kind == "failed" for other in reports.values()):
            return
        seen = {other: self._seen(other) for other in range(self._launch.world_size)}
        culprits, text = judge(reports, world_size=self._launch.world_size, alive=alive, seen=seen)
        if self._is_first("verdict"):
            self._say(text)
        for other in culprits:
            self._end(other)
        self._store.set(self._key("over"), "1")

    def _collect(self) -> tuple[dict[int, Report], list[int]]:
        """The ranks' reports, and the ranks that have shown a sign of life meanwhile."""
        others = range(self._launch.world_size)
        before = [self._read(self._key("beat", rank)) for rank in others]
        end = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < end:
            time.sleep(0.1)
            reports = self._reports()
            silent = [rank for rank in others if rank not in reports]
            # There is no need to wait for the beats of processes that have visibly ended.
            kinds = {report.kind for report in reports.values()}
            if "failed" in kinds or all(map(self._has_ended, silent)):
                break
        alive = [rank for rank in others if self._lives(rank, before[rank])]
        return self._reports(), alive

    def _lives(self, rank: int, beat: str) -> bool:
        """Whether its process runs; on another node, whether ``beat`` is outdated."""
        if self._state_of(rank):
            return not self._has_ended(rank)
        return self._read(self._key("beat", rank)) != beat

    def _has_ended(self, rank: int) -> bool:
        """Whether its process ran on this node and is gone or stopped."""
        return self._state_of(rank) in ("gone", "dead", "stopped")

    def _state_of(self, rank: int) -> str:
        """The state of its process, from /proc; empty on another node or without /proc."""
        pid, host = self._who(rank)
        if host != socket.gethostname() or not Path("/proc").is_dir():
            return ""
        stat = _stat(pid)
        return _STATES.get(stat[0], "running") if stat else "gone"

    def _reports(self) -> dict[int, Report]:
        ranks = range(self._launch.world_size)
        texts = {rank: self._read(self._key("report", rank)) for rank in ranks}
        return {rank: Report(**json.loads(text)) for rank, text in texts.items() if text}

    def _publish(self, report: Report) -> None:
        self._store.set(self._key("report", self._launch.rank), json.dumps(asdict(report)))

    def _is_first(self, what: str) -> bool:
        """Whether this rank is the first to claim ``what``."""
        return self._store.add(self._key(what), 1) == 1

    def _seen(self, rank: int) -> str:
        """A description of a rank's process, with its state if it runs on this node."""
        pid, host = self._who(rank)
        state = self._state_of(rank)
        return f"process {pid} on {host}" + (f", {state}" if state else "")

    def _who(self, rank: int) -> tuple[int, str]:
        pid, host = json.loads(self._read(self._key("who", rank)) or '[0, "?"]')
        return pid, host

    def _end(self, rank: int) -> None:
        """Kills a stuck rank on this node, which does not react to a milder signal.

        The process must have the same launcher, because its number may belong to another one now.
        """
        pid, host = self._who(rank)
        if host == socket.gethostname() and _stat(pid)[1:2] == [str(self._parent)]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        beat, over, orphan, reachable = 0, 0.0, 0.0, True
        while not self._ended.wait(BEAT_SECONDS):
            beat, now = beat + 1, time.monotonic()
            if self._launch.under_torchrun and os.getppid() != self._parent:
                if not orphan:
                    self._orphaned()
                    orphan = now
                if now - orphan > ORPHAN_SECONDS:
                    os._exit(1)
            if reachable:
                try:
                    self._store.set(self._key("beat", self._launch.rank), str(beat))
                    over = over or (now if self._read(self._key("over")) else 0.0)
                except (RuntimeError, OSError):  # once is enough: torch prints a long warning
                    reachable = False
            # The others have given up, so this rank waits for a message that will not arrive.
            if over and now - over > _OVER_SECONDS:
                os._exit(1)

    def _read(self, key: str) -> str:
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, *map(str, parts)])

    def _say(self, text: str) -> None:
        print(f"{self._program}: {text}", file=sys.stderr, flush=True)


def _stat(pid: int) -> list[str]:
    """The state of a process on this node, its parent and more, from /proc; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
