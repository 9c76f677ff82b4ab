"""Watches the ranks of a run: the launcher's death, and which rank broke the run.

    rank 0   lost rank 2 -> tells 1, 2, 3: 1 and 3 answer, 2 does not   -> "rank 2 is gone"
    rank 1   lost rank 2 -> tells 0, 2, 3: 0 and 3 answer, 2 does not      (rank 0 has said it)
    rank 2   killed
    rank 3   waits for rank 1 ... its connection breaks when rank 1 exits

One rank of each host says it, so that the output of every launcher names what was lost.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from torch.distributed import Store  # type: ignore[attr-defined]

from cp_megatron.comm.flight import last_collective, write_flight
from cp_megatron.comm.runtime import Launch
from cp_megatron.comm.trace import AWAITED
from cp_megatron.faults.culprit import Report, judge, kind_of
from cp_megatron.faults.peers import ANSWER_SECONDS, Peers

REPORT_SECONDS = 1.5
"""How long a rank that broke waits for the reports of ranks that answer it."""
STORE_SECONDS = 1.0
"""How long it waits for the store, which may be gone or cut off."""
ORPHAN_SECONDS = 30.0
"""The time that a rank whose launcher died has to finish its step and save."""
OVER_SECONDS = 6.0
"""The time that a rank has to notice by itself that another one broke."""
_PAUSE = 0.5
_STATES: Mapping[str, str] = MappingProxyType(
    {"T": "stopped", "t": "stopped", "Z": "dead", "X": "dead", "D": "waiting for a disk"}
)


class Watch:
    """The watch of one rank, a context manager around the training. All ranks make it together.

    Args:
        launch: how this process was started.
        store: a store that all ranks can reach.
        folder: the run's folder, for the record of collectives.
        program: the name that messages to the user begin with.
        orphaned: called once when the launcher has died.
        place_of: what to say of a rank beside its process, such as its pipeline stage.
    """

    def __init__(
        self,
        launch: Launch,
        store: Store,
        *,
        folder: Path,
        program: str,
        orphaned: Callable[[], None],
        place_of: Callable[[int], str] = lambda rank: "",
    ) -> None:
        self._place_of = place_of
        self._launch, self._folder, self._program = launch, folder, program
        self._store: Store = store.clone() if hasattr(store, "clone") else store
        self._prefix = f"watch{launch.restarts}"
        self._orphaned, self._parent = orphaned, os.getppid()
        self._ended, self._broken = threading.Event(), threading.Event()
        self._host = socket.gethostname()
        key = f"{self._prefix}/who"
        self._peers = Peers(launch.rank, launch.world_size, store, key, launch.master)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def explain(self, error: BaseException) -> None:
        """Prints what broke the run, once on each host, after ``error`` ended this rank.

        A stack trace is printed once over all ranks. A rank that is stuck on this node is killed.
        """
        self._broken.set()
        notes = list(getattr(error, "__notes__", ()))
        awaited = [note for note in notes if note.startswith(AWAITED)]
        words, newest = " ".join(x for x in notes if x not in awaited), last_collective()
        if awaited and newest:  # torch has not recorded the message
            newest = f"after {newest}"
        where = ", ".join(part for part in (words, newest) if part)
        kind = kind_of(error)
        traced = kind == "failed" and self._claims("failure") is not False
        with suppress(OSError):
            write_flight(self._folder / f"flight-rank-{self._launch.rank}.jsonl")
        if traced:
            trace = "".join(traceback.format_exception(error))
            self._say(f"rank {self._launch.rank} failed\n{trace.rstrip()}")
        what = awaited[0].removeprefix(AWAITED) if awaited else ""
        self._conclude(Report(kind=kind, where=where, traced=traced, awaited=what))

    def _conclude(self, report: Report | None) -> None:
        """Tells the others and, if it is this rank's turn, the user."""
        self._peers.tell(report)
        self._collect()
        traced = [rank for rank, other in self._peers.reports.items() if other.traced]
        if any(self._host_of(rank) == self._host for rank in traced):
            return  # the output of this launcher has the stack trace
        culprits, text = self._verdict(traced)
        if self._speaks():
            self._say(text)
            self._peers.tell_spoken()
        for rank in culprits:
            self._end(rank)

    def _verdict(self, traced: Sequence[int]) -> tuple[tuple[int, ...], str]:
        """The ranks that broke the run, as far as they can be killed, and one line for the user."""
        if traced:
            there = f"rank {traced[0]} ({self._seen(traced[0])})"
            return (), f"{there} failed; the output of its launcher has the stack trace"
        ranks, reports = range(self._launch.world_size), dict(self._peers.reports)
        alive = [rank for rank in ranks if self._lives(rank)]
        seen = {rank: self._seen(rank) for rank in ranks}
        culprits, text = judge(reports, world_size=len(ranks), alive=alive, seen=seen)
        return culprits, text + self._alternative(reports)

    def _collect(self) -> None:
        """Waits until all ranks have reported, have ended or had the time for it."""
        peers, begin = self._peers, time.monotonic()
        while (waited := time.monotonic() - begin) < ANSWER_SECONDS:
            time.sleep(0.05)
            silent = [x for x in range(self._launch.world_size) if x not in peers.reports]
            running = [rank for rank in silent if not self._has_ended(rank)]
            told = not any(rank in peers.pending for rank in {*running, *peers.reports})
            if told and (not running or waited > REPORT_SECONDS):
                break

    def _alternative(self, reports: Mapping[int, Report]) -> str:
        """Where no other host answers, this one may be the one that is cut off."""
        elsewhere = [
            rank for rank in range(self._launch.world_size) if self._host_of(rank) != self._host
        ]
        heard = {*reports, *self._peers.answered, *self._peers.refused}
        if not elsewhere or heard.intersection(elsewhere):
            return ""
        return f"; no other host answers, so {self._host} itself may be cut off"

    def _lives(self, rank: int) -> bool:
        """Whether its process runs; on another node, whether it answers."""
        if self._state_of(rank):
            return not self._has_ended(rank)
        return rank == self._launch.rank or rank in self._peers.answered

    def _has_ended(self, rank: int) -> bool:
        """Whether its process is known to be gone or, on this node, stopped."""
        return self._state_of(rank) in ("gone", "dead", "stopped")

    def _state_of(self, rank: int) -> str:
        """The state of its process, if this node can tell: from /proc, or because it is refused."""
        refused = "gone" if rank in self._peers.refused else ""
        if self._host_of(rank) != self._host or not Path("/proc").is_dir():
            return refused
        stat = _stat(self._peers.processes[rank].pid)
        return _STATES.get(stat[0], "running") if stat else "gone"

    def _claims(self, what: str) -> bool | None:
        """Whether this rank is the first to claim ``what``; None if the store does not answer."""
        first: list[bool] = []

        def claim() -> None:
            with suppress(RuntimeError, OSError):
                first.append(self._store.add(f"{self._prefix}/{what}", 1) == 1)

        thread = threading.Thread(target=claim, daemon=True)
        thread.start()
        thread.join(STORE_SECONDS)
        return first[0] if first else None

    def _speaks(self) -> bool:
        """Whether this rank tells the user, as one of this host.

        Without the store it is the first of those that have reported, unless another has spoken.
        """
        if (claimed := self._claims(f"verdict/{self._host}")) is not None:
            return claimed
        peers, rank = self._peers, self._launch.rank
        here = [other for other in peers.reports if self._host_of(other) == self._host]
        spoken = any(self._host_of(other) == self._host for other in peers.spoken)
        return not spoken and rank <= min(here, default=rank)

    def _seen(self, rank: int) -> str:
        """A description of a rank's process, with its state if it is known."""
        process = self._peers.processes[rank]
        words = self._place_of(rank), f"process {process.pid} on {process.host}"
        return ", ".join(filter(None, (*words, self._state_of(rank))))

    def _host_of(self, rank: int) -> str:
        return self._peers.processes[rank].host

    def _end(self, rank: int) -> None:
        """Kills a stuck rank on this node, which does not react to a milder signal.

        The process must have the same launcher, because its number may belong to another one now.
        """
        pid = self._peers.processes[rank].pid
        if self._host_of(rank) == self._host and _stat(pid)[1:2] == [str(self._parent)]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _watch(self) -> None:
        orphan = 0.0
        while not self._ended.wait(_PAUSE):
            now = time.monotonic()
            if self._launch.under_torchrun and os.getppid() != self._parent:
                if not orphan:
                    self._orphaned()
                    orphan = now
                if now - orphan > ORPHAN_SECONDS:
                    os._exit(1)
            # Others have given up, so this rank waits for a message that will not arrive.
            heard = self._peers.first_heard
            if heard and now - heard > OVER_SECONDS and not self._broken.is_set():
                self._conclude(None)
                os._exit(1)

    def _say(self, text: str) -> None:
        print(f"{self._program}: {text}", file=sys.stderr, flush=True)


def _stat(pid: int) -> list[str]:
    """The state of a process on this node, its parent and more, from /proc; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
