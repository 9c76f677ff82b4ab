"""Locks a folder for one writer, on one machine and among machines that share the folder.

The lock is a file in the folder that says who holds it. It appears by a hard link, which only one
of several processes can make, also on a network's file system, and is complete when it appears.

    the holder is            it lives as long as
    on this machine          its process exists (number and start time, so that a recycled number
                             is not mistaken for it)
    on another machine       it refreshes the time of the file, which it does every 20 seconds;
                             it counts as gone after three minutes

The lock of a holder that is gone is taken over. Meanwhile ``flock`` on the old file keeps others
away. Where a file system has no ``flock`` among machines, two of them could take over the same lock
at once; the one that was first finds out within a second, or at its next refreshment.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from cp_megatron.errors import ConfigError

LOCK_FILE = "lock.json"
"""The lock's name; a lock that is being written has a longer name that begins in the same way."""
BEAT_SECONDS = 20.0
GONE_SECONDS = 180.0
"""More than the minute for which a client of NFS may show an old time."""
_PATIENCE = 5.0
"""How long a process tries while others take over the same lock, in seconds."""
_PAUSE = 1.0
"""How long two machines need to see that they have taken over the same lock, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        host: the name of its machine, for people.
        machine: its machine since the last start, and its space of process numbers.
        pid: its process number.
        started: when the process was started, in the units of ``/proc``.
        since: when it took the lock, for people.
        launchers: marks of the processes that started the ranks of its run.
        token: a random word that no other holder has.
    """

    host: str
    machine: str
    pid: int
    started: int
    since: str
    launchers: tuple[str, ...]
    token: str

    def is_gone(self, silent: float) -> bool:
        """Whether it has ended, if its last sign of life is ``silent`` seconds old."""
        if self.machine == _machine():
            return _start_of(self.pid) != self.started
        return silent > GONE_SECONDS

    def refusal(self, flag: str, folder: Path) -> ConfigError:
        """The error of another run that wants to write into the folder."""
        rule = f"process {self.pid} on {self.host} writes into this folder since {self.since}"
        works = "wait until it ends, or another folder"
        if self.machine != _machine():
            works += f"; if that process is gone, wait {GONE_SECONDS / 60:.0f} minutes"
        return ConfigError(flag, folder, rule, works)


def refuse_held(flag: str, folder: Path) -> None:
    """Refuses a folder that another process has locked; writes nothing.

    Raises:
        ConfigError: names the holder.
    """
    found = _read(folder / LOCK_FILE)
    if found is not None and not found[0].is_gone(time.time() - found[1]):
        raise found[0].refusal(flag, folder)


def is_lock(file: Path) -> bool:
    """Whether the file is a lock, which does not count as a content of its folder."""
    return file.name.startswith(LOCK_FILE)


def parent_mark() -> str:
    """A word for the process that started this one; no other process has the same word."""
    parent = os.getppid()
    text = f"{_machine()} {parent} {_start_of(parent)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_UNKNOWN = Holder(
    host="an unknown machine",
    machine="",
    pid=0,
    started=0,
    since="an unknown time",
    launchers=(),
    token="",
)


class FolderLock:
    """The lock of one folder, held by this process from ``acquire`` to ``release``.

    Args:
        folder: it is created if it does not exist.
        flag: the flag that names the folder, for errors.
        launchers: ``parent_mark`` of the ranks of this run.
        again: a launcher has started the ranks again, so that a lock of ranks that it started
            before is this run's own.
        lost: called in a thread if another run has taken over the lock, with the error to show.

    Attributes:
        note: what the lock does not achieve on this file system; empty on most.
    """

    def __init__(
        self,
        folder: Path,
        *,
        flag: str,
        launchers: Sequence[str] = (),
        again: bool = False,
        lost: Callable[[ConfigError], None],
    ) -> None:
        self.folder, self.note = folder, ""
        self._flag, self._again, self._lost = flag, again, lost
        self._path = folder / LOCK_FILE
        self._me = Holder(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            since=f"{datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}",
            launchers=tuple(sorted(set(launchers))),
            token=secrets.token_hex(8),
        )
        self._fd = -1
        self._made: list[Path] = []
        self._released = threading.Event()

    def acquire(self, *, new: bool = False) -> None:
        """Creates the folder if necessary, and takes the lock.

        Args:
            new: the folder must not exist.

        Raises:
            FileExistsError: ``new``, and the folder exists.
            ConfigError: another process holds the lock, or the folder cannot be written.
        """
        path = self.folder.absolute()
        missing = [x for x in (path, *path.parents) if not os.path.lexists(x)]
        try:
            self.folder.mkdir(parents=True, exist_ok=not new)
            self._made = missing
            self._take()
        except OSError as error:
            if new and isinstance(error, FileExistsError):
                raise
            self.release()
            rule = f"cannot be written: {error.strerror}"
            raise ConfigError(self._flag, self.folder, rule, "another folder") from None
        except BaseException:
            self.release()
            raise
        self._refresh()
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()

    def release(self) -> None:
        """Removes the lock, and folders that ``acquire`` created if they are empty."""
        self._released.set()
        if self._fd >= 0:
            with suppress(OSError):
                if self._is_ours():
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def _take(self) -> None:
        """Makes the lock, or raises the refusal of its living holder."""
        draft = self._path.with_name(f"{LOCK_FILE}.{self._me.token}")
        self._fd = self._write(draft)
        try:
            end, pause = time.monotonic() + _PATIENCE, 0.0
            while not (self._link(draft) and self._stays_ours(pause)):
                found = _read(self._path)
                holder, refreshed = found or (_UNKNOWN, 0.0)
                self._refresh()  # the age is measured by the clock that made both times
                silent = os.fstat(self._fd).st_mtime - refreshed
                if time.monotonic() > end or not self._may_take_over(holder, silent):
                    raise holder.refusal(self._flag, self.folder)
                pause = max(pause, self._remove(holder))
        finally:
            with suppress(OSError):
                draft.unlink()

    def _write(self, path: Path) -> int:
        """Makes a file with this process as the holder, locks it and returns it open."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        os.write(fd, json.dumps(asdict(self._me)).encode())
        _flock(fd)
        return fd

    def _link(self, draft: Path) -> bool:
        """Names the draft as the lock; returns False if there is a lock."""
        try:
            os.link(draft, self._path)
        except FileExistsError:
            # A network's file system may repeat a request that has succeeded.
            return os.fstat(self._fd).st_nlink == 2
        except OSError:  # this file system has no hard links
            try:
                fd = self._write(self._path)
            except FileExistsError:
                return False
            os.close(self._fd)
            self._fd = fd
        return True

    def _stays_ours(self, pause: float) -> bool:
        """Whether the lock is still this process's after ``pause`` seconds."""
        time.sleep(pause)
        return self._is_ours()

    def _refresh(self) -> None:
        try:
            os.utime(self._fd)
        except OSError as error:
            self.note = (
                f"{self.folder}: its lock's time cannot be refreshed ({error.strerror}); a run on "
                f"another machine takes it for abandoned after {GONE_SECONDS / 60:.0f} minutes"
            )

    def _may_take_over(self, holder: Holder, silent: float) -> bool:
        """Whether the holder is gone, or is a rank that this run's launcher started before."""
        earlier = self._again and bool(set(self._me.launchers) & set(holder.launchers))
        return earlier or holder.is_gone(silent)

    def _remove(self, holder: Holder) -> float:
        """Removes the lock of a holder that is gone, unless another process was faster.

        Returns:
            How many seconds later a process that was faster is sure to be seen.
        """
        here = holder.machine == self._me.machine
        try:
            fd = os.open(self._path, os.O_RDWR)
        except OSError:
            return 0.0
        try:
            # A machine that has crashed may keep its flock until it is started again.
            if (_flock(fd) or not here) and _same_file(fd, self._path):
                self._path.unlink()
        except FileNotFoundError:
            pass
        finally:
            os.close(fd)
        time.sleep(secrets.randbelow(20) / 1000)
        return 0.0 if here else _PAUSE

    def _is_ours(self) -> bool:
        try:
            return _same_file(self._fd, self._path)
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        """Refreshes the lock's time, until the lock is released or another run has it."""
        while not self._released.wait(BEAT_SECONDS):
            found = _read(self._path)
            if found is not None and found[0].token != self._me.token:
                self._lost(found[0].refusal(self._flag, self.folder))
                return
            # The server of the files may be away for a while, or the folder has been moved.
            with suppress(OSError):
                os.utime(self._fd)


def _read(path: Path) -> tuple[Holder, float] | None:
    """The holder of a lock and when it last refreshed it, or None if there is no lock."""
    try:
        with path.open(encoding="utf-8") as file:
            refreshed, text = os.fstat(file.fileno()).st_mtime, file.read()
    except OSError:
        return (_UNKNOWN, time.time()) if os.path.lexists(path) else None
    try:
        words = json.loads(text)
        return Holder(**{**words, "launchers": tuple(words["launchers"])}), refreshed
    except (ValueError, TypeError, KeyError):  # it is being written, or was damaged
        return _UNKNOWN, refreshed


def _flock(fd: int) -> bool:
    """Locks an open file; False if another process has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # this file system has no such locks
        return True
    return True


def _same_file(fd: int, path: Path) -> bool:
    return os.path.samestat(os.fstat(fd), path.stat())


def _machine() -> str:
    """A word for this machine since its last start and for its space of process numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _start_of(pid: int) -> int:
    """When a process of this machine was started, in clock ticks; 0 if it is gone.

    Without ``/proc`` it is 1 for every process that exists.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        except OSError:
            pass
        return 1
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if words[0] in "ZX" else int(words[19])
