"""Runs a function on several ranks inside one test: ``run_ranks(fn, world_size, *args)``.

One pool of processes serves the whole test session, because starting ranks takes time and a job in
a running pool takes milliseconds. The pool grows to the largest world size requested, and keeps its
process group from one job to the next while the world size stays the same. It is killed and
restarted after any failure, so that no test inherits a broken group. Its processes are forks of a
server that has imported torch once, so that a restart does not import it again.

The ranks connect through a file, never through a port. What they print goes to a log that is shown
only if they fail.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

Result = TypeVar("Result")

MAX_WORLD_SIZE = 8
START_TIMEOUT = 120.0  # seconds until the server of forks has imported torch on a busy machine
GROUP_TIMEOUT = timedelta(minutes=10)  # longer than any job's: the pool decides when a job hangs
GRACE = 0.5  # seconds after the first failure in which the other ranks may report theirs
LOG_TAIL = 4000  # characters of a failed rank's output that are shown

# Modules that the server imports; one that is not installed is passed over.
PRELOADED = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch._dynamo",
    "transformers.modeling_utils",
    "hypothesis",
    "pytest",
    "cp_megatron.train.run",
)

# Errors of a rank that has lost its peer; such a rank is never the root cause.
LOST_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|pair is not connected", re.I)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The failure of one rank: a traceback, the stack of a hung rank, or an exit code."""

    rank: int
    kind: str  # "raised" | "hung" | "died"
    detail: str
    log: str

    @property
    def secondary(self) -> bool:
        """Whether the rank failed only because another rank failed."""
        return self.kind == "raised" and LOST_PEER.search(self.detail.splitlines()[-1]) is not None

    def __str__(self) -> str:
        log = f"\n--- output of rank {self.rank} ---\n{self.log}" if self.log.strip() else ""
        return f"rank {self.rank} {self.kind}:\n{self.detail.rstrip()}{log}"


class RanksFailed(RuntimeError):  # noqa: N818 (reads as what happened)
    """A job failed on some rank. ``failures`` lists those of all ranks, the root cause first."""

    def __init__(self, world_size: int, failures: Iterable[Failure]) -> None:
        self.failures = sorted(failures, key=lambda failure: failure.secondary)
        root, *others = self.failures
        parts = [f"job of {world_size} ranks: {root}"]
        for other in others:
            last = other.detail.rstrip().splitlines()[-1]
            parts.append(str(other) if other.kind == "hung" else f"rank {other.rank}: {last}")
        super().__init__("\n\n".join(parts))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A message to a worker.

    Attributes:
        world_size: the number of ranks.
        store: a new rendezvous file; None keeps the process group.
        payload: the pickled (fn, args), unpickled only where a failed import can be reported.
    """

    world_size: int
    store: str | None
    payload: bytes


def run_ranks(
    fn: Callable[..., Result], world_size: int, *args: object, timeout: float = 60
) -> list[Result]:
    """Runs ``fn(rank, world_size, *args)`` on ``world_size`` ranks of a gloo default group.

    Args:
        fn: a function at the top of a module, so that another process can import it.
        world_size: the number of ranks, 1 to 8.
        args: arguments that can be pickled; every rank gets a copy.
        timeout: seconds until a job counts as hung; starting processes does not count.

    Returns:
        The results of ``fn``, in rank order.

    Raises:
        RanksFailed: a rank raised, died or hung; the message starts with the root cause.
    """
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise ValueError(f"world_size {world_size}: the pool has 1 to {MAX_WORLD_SIZE} ranks")
    pool = _session_pool()
    payload = pickle.dumps((fn, args))
    try:
        return [pickle.loads(answer) for answer in pool.run(payload, world_size, timeout)]
    except BaseException:
        pool.stop()
        raise


def stop_pool() -> None:
    """Ends every process of the pool. The next job starts new ones."""
    _session_pool().stop()


@functools.cache
def _session_pool() -> _Pool:
    pool = _Pool()
    atexit.register(pool.stop)
    return pool


class _Worker:
    """The parent's handle on the process of one rank."""

    def __init__(self, rank: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self.rank = rank
        self.log_path = folder / f"rank{rank}.log"
        self.connection, theirs = context.Pipe()
        self.process: ForkServerProcess = context.Process(
            target=_serve, args=(rank, theirs, str(self.log_path)), daemon=True
        )
        self.process.start()
        theirs.close()
        self.log_start = 0

    def send(self, job: _Job) -> None:
        self.log_start = self.log_path.stat().st_size
        with contextlib.suppress(BrokenPipeError):  # a dead process is reported by collect
            self.connection.send_bytes(pickle.dumps(job))

    def log(self) -> str:
        with self.log_path.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")[-LOG_TAIL:]

    def died(self) -> Failure:
        self.process.join(1)
        code = self.process.exitcode
        name = f" ({signal.Signals(-code).name})" if code is not None and code < 0 else ""
        return Failure(
            rank=self.rank, kind="died", detail=f"exit code {code}{name}", log=self.log()
        )

    def hung(self, seconds: float) -> Failure:
        """Requests the stack of the process, which its fault handler writes to the log."""
        before = self.log_path.stat().st_size
        pid = self.process.pid
        assert pid is not None
        os.kill(pid, signal.SIGUSR1)
        time.sleep(0.2)
        stack = self.log_path.read_bytes()[before:].decode(errors="replace")
        detail = f"not finished after {seconds:g} s, it was at\n{stack}"
        return Failure(rank=self.rank, kind="hung", detail=detail, log="")


class _Pool:
    """All worker processes, the folder that they share, and the size of their world."""

    def __init__(self) -> None:
        self.workers: list[_Worker] = []
        self.folder: Path | None = None
        self.world_size = 0
        self.worlds_made = 0

    def run(self, payload: bytes, world_size: int, timeout: float) -> list[bytes]:
        folder = self._grow(world_size)
        store = None
        if world_size != self.world_size:
            self.worlds_made += 1
            store = str(folder / f"rendezvous{self.worlds_made}")
            self.world_size = world_size
        workers = self.workers[:world_size]
        job = _Job(world_size=world_size, store=store, payload=payload)
        for worker in workers:
            worker.send(job)
        return _collect(workers, timeout)

    def stop(self) -> None:
        workers, self.workers, self.world_size = self.workers, [], 0
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join(5)
            worker.connection.close()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _grow(self, world_size: int) -> Path:
        if self.folder is None:
            self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        missing = range(len(self.workers), world_size)
        started = [_Worker(rank, self.folder) for rank in missing]
        self.workers += started
        if started:
            _collect(started, START_TIMEOUT)
        return self.folder


def _collect(workers: list[_Worker], timeout: float) -> list[bytes]:
    """Waits for an answer of every worker; raises with all failures that have occurred by then."""
    answers: dict[int, bytes] = {}
    failures: list[Failure] = []
    waiting = {worker.rank: worker for worker in workers}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = _ready(waiting.values(), deadline - time.monotonic())
        if not ready:
            break
        for worker in ready:
            del waiting[worker.rank]
            ok, answer = _receive(worker)
            if ok:
                answers[worker.rank] = answer
                continue
            if not failures:
                deadline = min(deadline, time.monotonic() + GRACE)
            detail = answer.decode()
            failures.append(
                Failure(rank=worker.rank, kind="raised", detail=detail, log=worker.log())
                if detail
                else worker.died()
            )
    if not failures:
        failures = [worker.hung(timeout) for worker in waiting.values()]
    if failures:
        raise RanksFailed(len(workers), failures)
    return [answers[worker.rank] for worker in workers]


def _ready(workers: Iterable[_Worker], seconds: float) -> list[_Worker]:
    by_handle: dict[object, _Worker] = {}
    for worker in workers:
        by_handle[worker.connection] = worker
        by_handle[worker.process.sentinel] = worker
    handles = wait(list(by_handle), max(seconds, 0))  # type: ignore[arg-type]
    return list({by_handle[handle].rank: by_handle[handle] for handle in handles}.values())


def _receive(worker: _Worker) -> tuple[bool, bytes]:
    """(True, pickled result), (False, traceback), or (False, b"") if the process died."""
    try:
        if worker.connection.poll():
            message = worker.connection.recv_bytes()
            return message[:1] == b"+", message[1:]
    except (EOFError, OSError):
        pass
    return False, b""


# ---- the code below runs in the process of a rank ------------------------------------------------


def _serve(rank: int, connection: Connection, log_path: str) -> None:
    """Runs jobs until the pipe closes."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends this process
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    faulthandler.enable(log)  # prints where a kernel crashed
    faulthandler.register(signal.SIGUSR1, log, all_threads=False)
    folder = Path(log_path).parent
    threading.Thread(target=_follow_parent, args=(folder,), daemon=True).start()
    sys.dont_write_bytecode = False  # as the session's; the server is started without the cache
    gc.freeze()  # what the server imported is never garbage
    connection.send_bytes(b"+")
    while True:
        try:
            job = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(_answer(job, rank))


def _follow_parent(folder: Path) -> None:
    """Ends this process with its parent, even while a collective hangs, and removes the folder."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(job: _Job, rank: int) -> bytes:
    try:
        _clean_state()
        if job.store is not None:
            _enter_world(rank, job.world_size, job.store)
        fn, args = pickle.loads(job.payload)
        return b"+" + pickle.dumps(fn(rank, job.world_size, *args))
    except BaseException:  # includes SystemExit of the tested code
        return b"-" + traceback.format_exc().encode()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _enter_world(rank: int, world_size: int, store_path: str) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store_path}",
        rank=rank,
        world_size=world_size,
        timeout=GROUP_TIMEOUT,
    )


def _clean_state() -> None:
    """Removes the state of the previous job, which every rank has finished by now.

    DTensor caches layouts and their conversions together with their mesh. An equal mesh of a later
    job would get the groups of the old one from these caches, and a group that a cache keeps alive
    keeps three threads, so they are cleared together with the groups.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    if "torch.distributed.tensor" in sys.modules:
        _clear_caches_of_dtensor()
    if dist.is_initialized():
        world = dist.group.WORLD
        groups = [x for x in dist.distributed_c10d._world.pg_map if x is not world]
        for group in groups:
            dist.destroy_process_group(group)
        if groups:
            del group, groups  # models and their groups are in cycles
            while gc.collect():  # torch's objects may take two rounds
                pass
            gc.freeze()  # the next collection looks at the next job's objects only


def _clear_caches_of_dtensor() -> None:
    from torch.distributed.tensor import _redistribute
    from torch.distributed.tensor._collective_utils import MeshTopoInfo
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache

    _clear_sharding_prop_cache()
    MeshTopoInfo.build_from_mesh.cache_clear()
    # Versions of torch differ in what else they cache.
    for clear in (
        getattr(_redistribute, "clear_redistribute_planner_cache", None),
        getattr(getattr(_redistribute, "_gen_transform_infos", None), "cache_clear", None),
    ):
        if clear is not None:
            clear()
